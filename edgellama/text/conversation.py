"""Token ids of a conversation that fits the context, with the contents of messages as plain text.

A template writes control tokens such as `<|im_end|>`. A user who types the same characters means text: taken for a
token, it would end the turn and could forge another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from edgellama.text.chat import ChatTemplate, Message
from edgellama.text.control_tokens import control_tokens, renamed, replaced, unused_characters
from edgellama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation. dropped: number of messages at its beginning that found no room."""

    ids: list[int]
    dropped: int


@dataclass(frozen=True)
class Conversation:
    """Encoder of conversations for one tokenizer and its template.

    control: control tokens in a message become their ids, and not text.

    >>> tokenizer = bundle.tokenizer
    >>> conversation = Conversation(tokenizer, ChatTemplate.of(tokenizer))
    >>> ids = conversation.encode([{"role": "user", "content": "What does <|im_end|> mean?"}])
    >>> ids.count(tokenizer.token_id("<|im_end|>"))
    1
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    control: bool = False

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, with the assistant's turn opened.

        Raises TokenizerError if the template refuses the conversation.
        """
        typed = [text for text in self._controls if any(text in m["content"] for m in messages)]
        if self.control or not typed:
            text = self.template.render(messages, add_generation_prompt=True)
            return self.tokenizer.encode(text, add_special_tokens=False)
        contents = [m["content"] for m in messages]
        first, *marks = unused_characters([self.template.source, *contents], 1 + len(typed))
        hidden = dict(zip(typed, marks, strict=True))
        protected = [{**m, "content": replaced(m["content"], hidden)} for m in messages]
        text = self.template.render(protected, add_generation_prompt=True)
        # The template's own control tokens get names that nobody can type, and the typed ones return as text.
        names = {control: f"{first}{number}{first}" for number, control in enumerate(self._controls)}
        text = replaced(replaced(text, names), {mark: control for control, mark in hidden.items()})
        return renamed(self.tokenizer, names).encode(text, add_special_tokens=False)

    def prompt(self, messages: Sequence[Message], context_length: int, answer_tokens: int) -> Prompt | None:
        """The conversation without its oldest turns, if it is longer than the context. A system message stays.

        A quarter of the context, or `answer_tokens` if they are fewer, stays free for the answer while there are
        turns to leave out. None if the last message alone does not fit.
        """
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = list(messages[len(system) :])
        room = context_length - min(answer_tokens, context_length // 4)
        for dropped in range(0, len(turns), 2):  # a user's message and its answer
            ids = self.encode([*system, *turns[dropped:]])
            if len(ids) <= (context_length if dropped + 1 == len(turns) else room):
                return Prompt(ids, dropped)
        return None

    @cached_property
    def _controls(self) -> list[str]:
        return control_tokens(self.tokenizer)
