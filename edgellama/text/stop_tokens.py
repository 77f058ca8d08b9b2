"""Stop tokens: the ids that end an answer, and the places that name each.

No single file is reliable. A fine-tune often keeps its base model's end in config.json and ends its turns with
another token. So the ids of all sources count, and `stop_notes` says where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from edgellama.errors import TokenizerError
from edgellama.text.chat import ChatTemplate, Message
from edgellama.text.tokenizer import Tokenizer

TOKENIZER, TEMPLATE, OPTION = "the tokenizer's eos_token", "the chat template", "--stop-token"

# Texts of tokens that end a turn, in the order in which llama.cpp looks for them (`llama_vocab::impl::load`).
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>", "<|end_of_turn|>")

_USER, _ANSWER, _NEXT = "quserq", "qassistantq", "qnextq"
_PROBE_DATE = datetime(2024, 7, 26)  # for a template that writes a date before the turns


@dataclass(frozen=True)
class StopToken:
    """Token that ends an answer. `sources` are the places that name it, in the order of reading."""

    id: int
    text: str
    sources: tuple[str, ...]


def find_stop_tokens(
    stated: Mapping[str, Sequence[int]], tokenizer: Tokenizer, *, ask_tokenizer: bool = True
) -> tuple[StopToken, ...]:
    """Union of the stop tokens that all sources name, each with its sources.

    Args:
        stated: ids by the source that states them. They keep their order and come first.
        tokenizer: resolves texts, and names its own eos_token and the turn's end in its chat template.
        ask_tokenizer: False if the tokenizer's eos_token is one of the stated ids under another name.
    """
    sources: dict[int, list[str]] = {}
    for source, ids in stated.items():
        for token in dict.fromkeys(ids):
            sources.setdefault(token, []).append(source)
    eos = (
        None if tokenizer.eos_token is None or not ask_tokenizer else tokenizer.token_id(tokenizer.eos_token)
    )
    end = turn_end(tokenizer)
    for source, found in ((TOKENIZER, eos), (TEMPLATE, end if end is None else tokenizer.token_id(end))):
        if found is not None:
            sources.setdefault(found, []).append(source)
    return tuple(
        StopToken(token, tokenizer.decode([token], skip_special_tokens=False), tuple(names))
        for token, names in sources.items()
    )


def stop_notes(stops: Sequence[StopToken], tokenizer: Tokenizer, asked: int) -> tuple[str, ...]:
    """Notes on stop tokens: those that a single one of `asked` sources names, or that there are none."""
    notes = [
        f"stop token {stop.text!r} ({stop.id}) is named by {stop.sources[0]} only"
        for stop in stops
        if len(stop.sources) == 1 and asked > 1
    ]
    end = turn_end(tokenizer)
    if end is not None and tokenizer.token_id(end) is None:
        notes.append(
            f"the chat template ends a turn with {end!r}, which is no token of the tokenizer: it stops nothing"
        )
    if not stops:
        notes.append("no stop token: nothing but its length ends a generated text")
    return tuple(notes)


def turn_end(tokenizer: Tokenizer) -> str | None:
    """Text of the token that the chat template writes after an answer; None without one.

    A text such as `<|im_end|>` that is no token is returned too. Plain words are not.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        template = ChatTemplate.of(tokenizer)
    except TokenizerError:
        return None
    tokens = tokenizer.added_tokens
    for after in (_after_answer(template), _between_turns(template)):
        text = after.lstrip()
        token = max((t for t in tokens if text.startswith(t)), key=len, default=None)
        if token is not None:
            return token
        marker = _marker(text)
        if marker is not None:
            return marker
    return None


def _after_answer(template: ChatTemplate) -> str:
    """Text behind the answer that ends a conversation, empty if the template cannot say."""
    text = _render(template, [_message("user", _USER), _message("assistant", _ANSWER)])
    return text.rpartition(_ANSWER)[2]


def _between_turns(template: ChatTemplate) -> str:
    """Text between an answer and the user's next message, without the text that opens a user's message."""
    opening = _render(template, [_message("user", _USER)]).partition(_USER)[0]
    text = _render(
        template, [_message("user", _USER), _message("assistant", _ANSWER), _message("user", _NEXT)]
    )
    between = text.partition(_ANSWER)[2].partition(_NEXT)[0]
    for start in range(len(opening)):
        if between.endswith(opening[start:]):
            return between.removesuffix(opening[start:])
    return between


def _marker(text: str) -> str | None:
    """The `<…>` or `[…]` at the start of a text if it has no space in it."""
    for first, last in (("<", ">"), ("[", "]")):
        end = text.find(last)
        if text.startswith(first) and 1 < end < 40 and not any(c.isspace() for c in text[:end]):
            return text[: end + 1]
    return None


def _render(template: ChatTemplate, messages: list[Message]) -> str:
    for date in (None, _PROBE_DATE):
        try:
            return template.at(date).render(messages)
        except TokenizerError:
            continue
    return ""


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
