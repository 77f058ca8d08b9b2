"""Chat: conversations as text in the format that the model was trained on.

`ChatTemplate` renders the checkpoint's jinja template. Phones have no jinja, so `derive_format` finds
equivalent role prefixes and suffixes. It proves them equal to the template on probe conversations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from edgellama.errors import TokenizerError
from edgellama.text.template_sandbox import TemplateFailed, compile_template, render_template

if TYPE_CHECKING:
    from edgellama.text.tokenizer import Tokenizer

MAX_SOURCE = 1 << 18  # characters of a template; the longest in use have about 20,000

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

NO_DATE = "it writes the date (strftime_now), and no date is given"
_REMEDIES = {
    "no date": "Give a date with --date YYYY-MM-DD.",
    "refused": "Check the order of roles (system first, then user and assistant in turn), "
    "or use the model's original chat template.",
    "undefined": "The template needs a variable that edgellama does not define; "
    "use the model's original chat template.",
    "failed": "Use the model's original chat template.",
}


class ChatTemplate:
    """The checkpoint's jinja template, rendered as in transformers, in a sandbox in a process with limits.

    `strftime_now` is defined only `at` a date, so that the same conversation always gives the same text.
    Without one, templates that test for it fall back to the date that the model was trained with.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None,
        eos_token: str | None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Compiles jinja with the tokens as variables. Raises TokenizerError for bad or too long source.

        special_tokens: text by name of further tokens, such as `pad_token`.
        """
        if len(source) > MAX_SOURCE:
            raise TokenizerError(
                f"the chat template has {len(source)} characters, expected at most {MAX_SOURCE}",
                remedy="Use the model's original chat template.",
            )
        self.source = source
        tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._variables = {name: text for name, text in tokens.items() if text is not None}
        self._now: datetime | None = None
        try:
            compile_template(source)
        except TemplateFailed as error:
            raise TokenizerError(
                f"the chat template is not valid jinja: {error}",
                remedy="Use the model's original chat template.",
            ) from error

    @classmethod
    def of(cls, tokenizer: Tokenizer, now: datetime | None = None) -> ChatTemplate:
        """Template of a tokenizer that has one, with its special tokens. Raises TokenizerError.

        now: time for `strftime_now`; None for a template that does without.
        """
        assert tokenizer.chat_template is not None
        template = cls(
            tokenizer.chat_template,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.special_tokens,
        )
        return template.at(now)

    def at(self, now: datetime | None) -> ChatTemplate:
        """The same template at another time; None leaves `strftime_now` undefined."""
        other = copy(self)
        other._now = now
        return other

    def needs_date(self) -> bool:
        """True if the template calls `strftime_now` without asking whether it is defined."""
        if "strftime_now" not in self.source:
            return False
        try:
            self.at(None).render([{"role": "user", "content": "x"}], add_generation_prompt=True)
        except TokenizerError as error:
            return NO_DATE in error.message
        return False

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation; `add_generation_prompt` opens the assistant's turn.

        variables: further ones of the template, as JSON data.

        The text holds the special tokens, so encode it with `add_special_tokens=False`. Raises TokenizerError
        if the template refuses the conversation or fails.
        """
        given = dict(
            self._variables,
            **(variables or {}),
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        )
        try:
            return render_template(self.source, given, self._now)
        except TemplateFailed as error:
            undated = error.cause == "undefined" and "strftime_now" in str(error)
            raise TokenizerError(
                f"the chat template cannot render this conversation: {NO_DATE if undated else error}",
                remedy=_REMEDIES["no date" if undated else error.cause],
            ) from error


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Text around each message, enough for conversations of [system], user, assistant, user, ...

    A conversation begins with `system_prefix` content `system_suffix`, or with `no_system` if it has no
    system message. Prefix, content and suffix of every other message follow. `generation_prompt` then opens
    the assistant's turn.

    trim: contents first lose leading and trailing whitespace, as defined by Python's `str.strip` (Unicode's
    White_Space and U+001C to U+001F).
    """

    no_system: str
    system_prefix: str
    system_suffix: str
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    assistant_suffix: str
    generation_prompt: str
    trim: bool

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Text of a conversation, as by ChatTemplate.render.

        Raises TokenizerError for another order of roles, or a prompt after the assistant's message.
        """
        affixes = {
            "system": (self.system_prefix, self.system_suffix),
            "user": (self.user_prefix, self.user_suffix),
            "assistant": (self.assistant_prefix, self.assistant_suffix),
        }
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
            raise TokenizerError(
                f"the conversation has the roles {roles}",
                remedy="Give an optional system message, then user and assistant in turn, user first.",
            )
        if add_generation_prompt and roles[-1] == "assistant":
            raise TokenizerError(
                "the conversation ends with the assistant's message, and its turn is to be opened",
                remedy="Add the user's next message, or leave out the generation prompt.",
            )
        text = "" if roles[0] == "system" else self.no_system
        for message in messages:
            prefix, suffix = affixes[message["role"]]
            text += prefix + (message["content"].strip() if self.trim else message["content"]) + suffix
        return text + (self.generation_prompt if add_generation_prompt else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChatFormat:
        """Inverse of `to_dict`. Raises TokenizerError if a key is missing or has another type."""
        for field in fields(cls):
            expected = bool if field.name == "trim" else str
            if not isinstance(data.get(field.name), expected):
                raise TokenizerError(
                    f"chat format: {field.name} must be a {expected.__name__}, found {data.get(field.name)!r}",
                    remedy="Export the bundle again.",
                )
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def derive_format(template: ChatTemplate) -> tuple[ChatFormat | None, str]:
    """Returns (format, "") if prefixes and suffixes reproduce the template, else (None, reason).

    The format is read from conversations of sentinel words, then compared with the template on every probe.
    """
    try:
        chat_format = _read_off(template)
    except TokenizerError as error:
        return None, error.message
    except _NotFlat as error:
        return None, str(error)
    for name, messages in probes():
        for prompt in (False, True) if messages[-1]["role"] == "user" else (False,):
            where = f"{name}{', with generation prompt' if prompt else ''}"
            try:
                expected = template.render(messages, add_generation_prompt=prompt)
            except TokenizerError as error:
                return None, f"{where}: {error.message}"
            actual = chat_format.render(messages, add_generation_prompt=prompt)
            if actual != expected:
                return None, f"{where}: {_difference(expected, actual)}"
    return chat_format, ""


class _NotFlat(Exception):
    """Reason that a template cannot be written as prefixes and suffixes."""


def _read_off(template: ChatTemplate) -> ChatFormat:
    """The only format that can agree with the template on the sentinel conversations."""
    system, user, assistant = (
        _message("system", "qsystemq"),
        _message("user", "quserq"),
        _message("assistant", "qassistantq"),
    )

    def between(*messages: Message) -> list[str]:
        """Texts before, between and after the contents: one more than there are messages."""
        rest, parts = template.render(messages), list[str]()
        for message in messages:
            before, content, rest = rest.partition(message["content"])
            if not content:
                raise _NotFlat(f"the {message['role']} message does not appear in its place")
            parts.append(before)
        return [*parts, rest]

    system_prefix, system_user, user_assistant, assistant_user, _, assistant_suffix = between(
        system, user, assistant, user, assistant
    )
    no_system_user, user_suffix = between(user)
    user_prefix = _without(
        assistant_user, prefix=assistant_suffix, where="between assistant and user message"
    )
    opened = template.render([user], add_generation_prompt=True)
    padded = template.render([_message("user", " quserq ")])
    return ChatFormat(
        no_system=_without(no_system_user, suffix=user_prefix, where="before the first user message"),
        system_prefix=system_prefix,
        system_suffix=_without(system_user, suffix=user_prefix, where="between system and user message"),
        user_prefix=user_prefix,
        user_suffix=user_suffix,
        assistant_prefix=_without(
            user_assistant, prefix=user_suffix, where="between user and assistant message"
        ),
        assistant_suffix=assistant_suffix,
        generation_prompt=_without(
            opened, prefix=no_system_user + "quserq" + user_suffix, where="the generation prompt"
        ),
        trim=" quserq " not in padded,
    )


def _without(text: str, *, prefix: str = "", suffix: str = "", where: str) -> str:
    """`text` without an affix. Raises _NotFlat if the affix is absent: turns are then not written alike."""
    if not text.startswith(prefix) or not text.endswith(suffix):
        raise _NotFlat(
            f"the text {where} depends on more than the two roles: {text!r} has no {(prefix or suffix)!r}"
        )
    return text[len(prefix) : len(text) - len(suffix)]


# Contents that known templates treat specially, or that a careless one would.
CONTENTS: Mapping[str, str] = {
    "plain words": "What is the tallest mountain?",
    "several lines": "First line\n\nSecond line\n\tindented",
    "unicode": "Ünïcödé, 你好，世界, עברית, ไทย",
    "emoji": "🙂 👩‍👩‍👧‍👦 🏳️‍🌈",
    "spaces around": "  leading and trailing  ",
    "line ends around": "\n\nleading and trailing\r\n",
    "no-break spaces around": "\u00a0\u3000text\u2003\u0085",
    "whitespace only": " \n\t ",
    "nothing": "",
    "jinja": "{{ messages }} {% if true %}x{% endif %} {# note #}",
    "braces and quotes": "{'a': [1, \"two\", {}]} \\n \\\\ <b>&amp;</b>",
    "special tokens": "<s></s><|im_start|>system\n<|im_end|><|eot_id|><|end_of_text|><|user|>",
    "brackets of instructions": "[INST] <<SYS>>\nx\n<</SYS>>\n\n [/INST]",
    "thinking": "<think>\nsteps\n</think>\n\nanswer",
    "a tool call": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "a role's name": "system",
}


def probes() -> Iterator[tuple[str, list[Message]]]:
    """(name, conversation) for every content in every role, with and without system, one to four turns."""
    for name, content in CONTENTS.items():
        for system in (False, True):
            for length in range(1, 9):
                turns = [
                    _message(("user", "assistant")[i % 2], f"{i}" * (i % 3) + content) for i in range(length)
                ]
                turns[-1] = _message(turns[-1]["role"], content)
                head = [_message("system", content)] if system else []
                yield (
                    f"{'system message, ' if system else ''}{length} message{'s' * (length > 1)} of {name}",
                    head + turns,
                )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _difference(expected: str, found: str) -> str:
    """First difference between two texts, with a little of both."""
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    start = max(0, at - 10)
    return (
        f"at character {at} the template writes {expected[start : at + 30]!r}, "
        f"prefixes and suffixes would write {found[start : at + 30]!r}"
    )
