"""Token ids of a conversation that fits the context, with the contents of messages as plain text.

A template writes control tokens such as `<|im_end|>`. A user who types the same characters means text: taken for a
token, it would end the turn and could forge another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from edgellama.text.chat import ChatTemplate, Message
from edgellama.text.tokenizer import Tokenizer

_PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text should hold


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
        first, *marks = self._marks(messages, 1 + len(typed))
        hidden = dict(zip(typed, marks, strict=True))
        protected = [{**m, "content": _replaced(m["content"], hidden)} for m in messages]
        text = self.template.render(protected, add_generation_prompt=True)
        # The template's own control tokens get names that nobody can type, and the typed ones return as text.
        names = {control: f"{first}{number}{first}" for number, control in enumerate(self._controls)}
        text = _replaced(_replaced(text, names), {mark: control for control, mark in hidden.items()})
        return _renamed(self.tokenizer, names).encode(text, add_special_tokens=False)

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
        """Texts of the control tokens, longest first."""
        tokens = json.loads(self.tokenizer.files["tokenizer.json"]).get("added_tokens") or ()
        return sorted((t["content"] for t in tokens if t.get("special")), key=len, reverse=True)

    def _marks(self, messages: Sequence[Message], count: int) -> Iterator[str]:
        """Characters that neither the conversation nor the template holds."""
        taken = set(self.template.source).union(*(m["content"] for m in messages))
        unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        return (next(unused) for _ in range(count))


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    """The text with all replacements made in one pass. Of two keys at a place, the first wins."""
    pattern = "|".join(map(re.escape, replacements))
    return re.sub(pattern, lambda match: replacements[match[0]], text)


def _renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """The tokenizer with other texts for its control tokens, and the same ids."""
    data = json.loads(tokenizer.files["tokenizer.json"])
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict):
        data["model"]["vocab"] = {names.get(text, text): token for text, token in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: pairs of text and score
        data["model"]["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    data["post_processor"] = None  # it names control tokens, and adds those that a chat brings itself
    return Tokenizer({**tokenizer.files, "tokenizer.json": json.dumps(data).encode()})
