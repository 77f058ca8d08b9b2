"""Conversations of guards, read off chat templates, and templates that are refused."""

from __future__ import annotations

import pytest

from edgellama.checkpoints import Checkpoint
from edgellama.errors import UsageError
from edgellama.text.chat import ChatTemplate
from edgellama.text.guard_template import read_conversation
from edgellama.text.tokenizer import Tokenizer
from tests.helpers.tiny_guard import CATEGORIES, FIXED, TEMPLATE

CHAT = [
    {"role": "user", "content": " Is it?\n"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "Why {text}"},
]


def with_template(checkpoint: Checkpoint, template: str | None) -> Tokenizer:
    files = {n: d for n, d in checkpoint.tokenizer.files.items() if n != "chat_template.jinja"}
    bos = checkpoint.tokenizer.bos_token
    return Tokenizer(files, chat_template=template, bos_token=bos)


def rendered(template: str, messages: list[dict[str, str]], *, parts: bool) -> str:
    contents = [
        {**m, "content": [{"type": "text", "text": m["content"]}] if parts else m["content"]}
        for m in messages
    ]
    source = ChatTemplate(template, bos_token=None, eos_token=None)
    return source.render(contents, add_generation_prompt=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("template", "parts"), [(TEMPLATE, True), (FIXED, False)])
def test_a_conversation_is_the_template(tiny_checkpoint: Checkpoint, template: str, parts: bool) -> None:
    conversation, names = read_conversation(with_template(tiny_checkpoint, template), None)
    assert names == (CATEGORIES if parts else {"S1": "Theft."})
    for count in (1, 2, 3):
        assert conversation.render(CHAT[:count]) == rendered(template, CHAT[:count], parts=parts)
    for bad in ([], CHAT[1:], [{"role": "system", "content": "x"}]):
        with pytest.raises(UsageError, match="has the roles"):
            conversation.render(bad)


@pytest.mark.parametrize("template", [TEMPLATE, FIXED])
def test_categories_of_the_user(tiny_checkpoint: Checkpoint, template: str) -> None:
    """A template that has no variable for them gets their lines in place of its own."""
    own = {"A1": "Spoilers.", "A2": "Rudeness."}
    conversation, names = read_conversation(with_template(tiny_checkpoint, template), own)
    assert names == own
    for role in conversation.before:
        assert "CATEGORIES>\nA1: Spoilers.\nA2: Rudeness.\n<END" in role and "S1" not in role


def test_the_line_feeds_after_a_header(tiny_checkpoint: Checkpoint) -> None:
    template = TEMPLATE.replace("' is:'", "' is: <|end_header_id|>'")
    conversation, _ = read_conversation(with_template(tiny_checkpoint, template), None)
    assert all(text.endswith("<|end_header_id|>\n\n") for text in conversation.after)


def test_a_bos_token_is_there_once(tiny_checkpoint: Checkpoint) -> None:
    tokenizer = with_template(tiny_checkpoint, "{{ bos_token }}" + FIXED)
    conversation, _ = read_conversation(tokenizer, None)
    text = conversation.render(CHAT[:1])
    whole = ChatTemplate.of(tokenizer).render(CHAT[:1], add_generation_prompt=True)
    assert tokenizer.encode(text) == tokenizer.encode(whole, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "is not one of Llama Guard"),
        (TEMPLATE.replace("S1", "s-1").replace("S2", "s-2").replace("S10", "s-3"), "lists no categories"),
        ("{{ 'x' }}", "its text does not appear"),
        (FIXED + "{{ messages | length }}", "a form that is not a guard's"),
        (FIXED.replace("m.content", "m.content | upper"), "does not render a user's message"),
        (FIXED + "{{ messages[0].content | length }}", "a form that is not a guard's"),
    ],
)
def test_other_templates_are_refused(tiny_checkpoint: Checkpoint, template: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_conversation(with_template(tiny_checkpoint, template), None)
