"""Conversation of a guard, read off the checkpoint's own chat template and proven equal to it.

A guard's template differs by the role of the last message, so it has no flat chat format. Five texts around the
messages are enough all the same. They are read from conversations of sentinel words, and compared with the template
on every probe. Categories come from the template, or from the user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgellama.errors import TokenizerError, UsageError
from edgellama.model.guard import ROLES, Conversation
from edgellama.text.chat import CONTENTS, ChatTemplate
from edgellama.text.tokenizer import Tokenizer

# Lines around the categories in the templates of all versions of Llama Guard.
BEGIN, END = "<BEGIN UNSAFE CONTENT CATEGORIES>", "<END UNSAFE CONTENT CATEGORIES>"
CODE = re.compile(r"[A-Z]{1,2}[0-9]{1,2}")
_LINE = re.compile(rf"^({CODE.pattern}): ?(.*)$", re.MULTILINE)
HEADER, LEAD = "<|end_header_id|>", "\n\n"  # end of a header, and the text that a model writes after it
_SENTINELS = ("qoneq", "qtwoq", "qthreeq", "qfourq")
_TURNS = 4

Render = Callable[[Sequence[str]], str]  # text of a conversation, from its contents


def read_conversation(
    tokenizer: Tokenizer, categories: Mapping[str, str] | None
) -> tuple[Conversation, dict[str, str]]:
    """The conversation of a guard, and the names of its categories by code.

    categories: the user's; None for the template's own. Raises UsageError for a tokenizer whose chat template is not
    one of a guard.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            "the checkpoint has no chat template, which holds a guard's policy",
            remedy="Put the model's own chat_template.jinja beside its tokenizer.json.",
        )
    template = ChatTemplate.of(tokenizer)
    render = _renderer(template, categories)
    conversation = _read_off(render)
    _prove(conversation, render)
    own = dict(_LINE.findall(_policy(conversation.before[0])[1]))
    if categories is not None and own != dict(categories):  # a template without the variable `categories`
        before = tuple(_with_categories(text, categories) for text in conversation.before)
        conversation = replace(conversation, before=(before[0], before[1]))
        own = dict(categories)
    if not own:
        raise UsageError(
            f"the chat template lists no categories of the form `S1: Name` between {BEGIN} and {END}",
            remedy="Give a checkpoint of Llama Guard with its own chat template.",
        )
    return _encoded_alike(_led(conversation), tokenizer), own


def _renderer(template: ChatTemplate, categories: Mapping[str, str] | None) -> Render:
    """A function from contents to text, with contents in the form that the template reads."""
    variables: dict[str, Any] = {} if categories is None else {"categories": dict(categories)}

    def render_as(parts: bool, contents: Sequence[str]) -> str:
        messages: list[Any] = [
            {"role": ROLES[n % 2], "content": [{"type": "text", "text": content}] if parts else content}
            for n, content in enumerate(contents)
        ]
        return template.render(messages, add_generation_prompt=True, variables=variables)

    errors = []
    for parts in (False, True):
        try:
            if _SENTINELS[0] in render_as(parts, _SENTINELS[:1]):
                return lambda contents: render_as(parts, contents)
        except TokenizerError as error:
            errors.append(error.message)
    raise UsageError(
        f"the chat template does not render a user's message ({'; '.join(errors) or 'its text does not appear'})",
        remedy="Give a checkpoint of Llama Guard with its own chat template.",
    )


def _read_off(render: Render) -> Conversation:
    """The only conversation that can agree with the template on the sentinels."""

    def between(count: int) -> list[str]:
        rest, parts = render(_SENTINELS[:count]), list[str]()
        for sentinel in _SENTINELS[:count]:
            before, found, rest = rest.partition(sentinel)
            if not found:
                raise UsageError(
                    f"the chat template leaves out message {len(parts) + 1} of {count}",
                    remedy="Give a checkpoint of Llama Guard with its own chat template.",
                )
            parts.append(before)
        return [*parts, rest]

    one, two, three = between(1), between(2), between(3)
    return Conversation(
        before=(one[0], two[0]),
        after=(one[-1], two[-1]),
        to_assistant=two[1],
        to_user=three[2],
        trim=f" {_SENTINELS[0]} " not in render([f" {_SENTINELS[0]} "]),
    )


def _prove(conversation: Conversation, render: Render) -> None:
    """Raises UsageError for a probe that the template renders otherwise."""
    for name, content in CONTENTS.items():
        for count in range(1, _TURNS + 1):
            contents = [f"{number}{content}" for number in range(count - 1)] + [content]
            messages = [{"role": ROLES[n % 2], "content": text} for n, text in enumerate(contents)]
            if conversation.render(messages) != render(contents):
                raise UsageError(
                    f"the chat template writes a conversation of {count} messages of {name} in a form that is not a guard's",
                    remedy="Give a checkpoint of Llama Guard with its own chat template.",
                )


def _policy(text: str) -> tuple[str, str, str]:
    """The text before the categories, with them, and after them. Raises UsageError if there is no place for them."""
    head, begin, rest = text.partition(BEGIN)
    policy, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(
            f"the chat template has no {BEGIN} and {END}, so it is not one of Llama Guard",
            remedy="Give a checkpoint of Llama Guard, or use --task classify with --labels and --prompt.",
        )
    return head + begin, policy, end + tail


def _with_categories(text: str, categories: Mapping[str, str]) -> str:
    head, _, tail = _policy(text)
    return f"{head}\n{''.join(f'{code}: {name}' + chr(10) for code, name in categories.items())}{tail}"


def _led(conversation: Conversation) -> Conversation:
    """The conversation with the line feeds that the answer begins with, if the template ends with a header."""
    one, other = (text + LEAD if text.endswith(HEADER) else text for text in conversation.after)
    return replace(conversation, after=(one, other))


def _encoded_alike(conversation: Conversation, tokenizer: Tokenizer) -> Conversation:
    """The conversation without the bos token that the tokenizer adds by itself.

    Raises UsageError if neither form gives the tokens of the template.
    """
    bos = tokenizer.bos_token or ""
    stripped = tuple(text.removeprefix(bos) for text in conversation.before)
    forms = (conversation, replace(conversation, before=(stripped[0], stripped[1])))
    messages = [{"role": role, "content": word} for role, word in zip(ROLES, ("Hello.", "x"), strict=True)]
    for form in forms:
        if all(
            tokenizer.encode(form.render(messages[:n]))
            == tokenizer.encode(conversation.render(messages[:n]), add_special_tokens=False)
            for n in (1, 2)
        ):
            return form
    raise UsageError(
        "the tokenizer adds special tokens to a text that the chat template does not write",
        remedy="Take tokenizer.json and the chat template from the same model.",
    )
