"""Guard: the conversation that a safety model such as Llama Guard judges, and the form of its answer.

The answer is `safe`, or `unsafe` with a line of category codes: `unsafe`, line feed, `S1,S2`. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgellama.errors import UsageError

SAFE, UNSAFE = "safe", "unsafe"
ROLES = ("user", "assistant")

Message = Mapping[str, str]  # {"role": "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Conversation:
    """Text around the messages of a conversation: `before`, message, `to_assistant`, message, `to_user`, …, `after`.

    Attributes:
        before: text before the first message, by the role of the last.
        after: text after the last message, by its role.
        to_assistant, to_user: text between two messages, by the role of the second.
        trim: contents first lose leading and trailing whitespace.
    """

    before: tuple[str, str]
    after: tuple[str, str]
    to_assistant: str
    to_user: str
    trim: bool

    def render(self, messages: Sequence[Message]) -> str:
        """Text of a conversation whose last message is judged.

        Raises UsageError unless user and assistant speak in turn, the user first.

        >>> plain = Conversation(("Judge User. U: ", "Judge Agent. U: "), ("?", "!"), " A: ", " U: ", True)
        >>> plain.render([{"role": "user", "content": " hello "}, {"role": "assistant", "content": "hi"}])
        'Judge Agent. U: hello A: hi!'
        """
        return "".join(text for text, _ in self.parts(messages))

    def parts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text of `render` in parts, each with whether it is the content of a message."""
        roles = [message["role"] for message in messages]
        if not roles or roles != [ROLES[number % 2] for number in range(len(roles))]:
            raise UsageError(
                f"the conversation has the roles {roles!r:.80}",
                remedy="Give messages of user and assistant in turn, user first; the last one is judged.",
            )
        last = ROLES.index(roles[-1])
        parts = [(self.before[last], False)]
        for number, message in enumerate(messages):
            between = "" if number == 0 else self.to_assistant if number % 2 else self.to_user
            content = message["content"].strip() if self.trim else message["content"]
            parts += [(between, False), (content, True)]
        return [*parts, (self.after[last], False)]

    def to_dict(self) -> dict[str, Any]:
        """The conversation as JSON data, with an object by role in place of a pair."""
        return {
            "before": dict(zip(ROLES, self.before, strict=True)),
            "after": dict(zip(ROLES, self.after, strict=True)),
            "to_assistant": self.to_assistant,
            "to_user": self.to_user,
            "trim": self.trim,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Conversation:
        """Inverse of `to_dict`."""
        before, after = ((data[key]["user"], data[key]["assistant"]) for key in ("before", "after"))
        return cls(before, after, data["to_assistant"], data["to_user"], data["trim"])


@dataclass(frozen=True)
class Category:
    """A category of the policy.

    Attributes:
        code: for example S1.
        name: as the prompt has it.
        first: tokens of the code as the first one of an answer, with the line feed before it.
        further: tokens of the code after another one, with the comma.
    """

    code: str
    name: str
    first: tuple[int, ...] = ()
    further: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guard:
    """Policy and answers of a guard.

    Attributes:
        conversation: text around the messages.
        categories: of the policy, in its order.
        rest: tokens of `unsafe` after its first one.
        end: tokens that end an answer.
        custom: whether the user gave the categories; False for those of the checkpoint's own template.
    """

    conversation: Conversation
    categories: tuple[Category, ...]
    rest: tuple[int, ...]
    end: tuple[int, ...]
    custom: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of all answers but the first, sorted."""
        parts = (self.rest, self.end, *(part for c in self.categories for part in (c.first, c.further)))
        return tuple(sorted({token for part in parts for token in part}))

    def start(self) -> GuardAnswer:
        """The answer after the first token of `unsafe`."""
        return GuardAnswer(self, tuple(((c.code,), (*self.rest, *c.first)) for c in self.categories), ())

    def to_dict(self) -> dict[str, Any]:
        """The guard as JSON data."""
        categories = [
            {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(c).items()} for c in self.categories
        ]
        return {
            "conversation": self.conversation.to_dict(),
            "categories": categories,
            "rest": list(self.rest),
            "end": list(self.end),
            "custom": self.custom,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Guard:
        """Inverse of `to_dict`."""
        categories = tuple(
            Category(c["code"], c["name"], tuple(c["first"]), tuple(c["further"])) for c in data["categories"]
        )
        return cls(
            Conversation.from_dict(data["conversation"]),
            categories,
            tuple(data["rest"]),
            tuple(data["end"]),
            data["custom"],
        )


@dataclass(frozen=True)
class GuardAnswer:
    """An answer that is written token by token.

    Attributes:
        guard: the policy.
        open: codes that the answer may come to have, each with the tokens that are still missing.
        codes: codes that are complete.
    """

    guard: Guard
    open: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    codes: tuple[str, ...]

    def allowed(self) -> tuple[int, ...]:
        """Tokens that may follow, sorted: those of codes that were not given yet, or an end after a whole code."""
        return tuple(sorted({token for token, _ in self._continuations()}))

    def then(self, token: int) -> GuardAnswer | None:
        """The answer with one more token; None at its end. The token is one of `allowed`."""
        if token in self.guard.end:
            return None
        states = tuple(
            state for first, state in self._continuations() if first == token and state is not None
        )
        whole = [codes for codes, missing in states if not missing]
        return GuardAnswer(self.guard, states, whole[0] if whole else self.codes)

    def _continuations(self) -> Iterator[tuple[int, tuple[tuple[str, ...], tuple[int, ...]] | None]]:
        for codes, missing in self.open:
            if missing:
                yield missing[0], (codes, missing[1:])
                continue
            for token in self.guard.end:
                yield token, None
            for category in self.guard.categories:
                if category.code not in codes:
                    yield category.further[0], ((*codes, category.code), category.further[1:])
