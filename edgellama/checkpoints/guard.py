"""Guard of a checkpoint: Llama Guard with its own chat template, or with categories of the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.labels import first_token, with_rows
from edgellama.errors import InputError, UsageError
from edgellama.files import is_unicode
from edgellama.model.guard import SAFE, UNSAFE, Category, Guard
from edgellama.model.labels import TEXT, TOKENS, Classifier, Label
from edgellama.text.guard_template import CODE, read_conversation
from edgellama.text.tokenizer import Tokenizer

MAX_CATEGORIES = 64
_FORM = 'A file of categories is a JSON object of codes and names: {"S1": "Violent crimes.", "S2": "Fraud."}.'


def read_categories(path: Path) -> dict[str, str]:
    """Categories of a JSON file, by code and in their order. Raises InputError."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})", remedy=_FORM) from error
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        raise InputError(f"{path}: holds no JSON object of categories", remedy=_FORM)
    if len(pairs) > MAX_CATEGORIES or len(dict(pairs)) < len(pairs):
        raise InputError(
            f"{path}: holds {len(pairs)} categories, of which {len(dict(pairs))} are different; {MAX_CATEGORIES} are the most",
            remedy=_FORM,
        )
    for code, name in pairs:
        if not CODE.fullmatch(code):
            raise InputError(f"{path}: {code!r:.40} is no code such as S1", remedy=_FORM)
        if (
            not isinstance(name, str)
            or not is_unicode(name)
            or not name.strip()
            or "\n" in name
            or TEXT in name
        ):
            raise InputError(f"{path}: {code} has no name of one line", remedy=_FORM)
    return dict(pairs)


def as_guard(checkpoint: Checkpoint, categories: Mapping[str, str] | None) -> Checkpoint:
    """The checkpoint as a guard, whose output layer has the rows of tokens that can be in an answer.

    categories: names by code; None for those of the checkpoint's own chat template. Raises UsageError for a checkpoint
    whose template is not one of Llama Guard, and for answers that its tokens do not tell apart.
    """
    if checkpoint.classifier is not None:
        raise UsageError(
            f"{checkpoint.path} has a trained head, and a guard answers in words",
            remedy="Use --task classify.",
        )
    conversation, names = read_conversation(checkpoint.tokenizer, categories)
    prompt = conversation.before[0] + TEXT + conversation.after[0]
    if prompt.count(TEXT) != 1:
        raise UsageError(
            f"the chat template or a category holds {TEXT}, which stands for the text in a bundle",
            remedy="Write it otherwise.",
        )
    tokenizer = checkpoint.tokenizer
    labels = tuple(Label(word, (word,), (first_token(word, prompt, tokenizer),)) for word in (SAFE, UNSAFE))
    if labels[0].tokens == labels[1].tokens:
        raise UsageError(
            f"{SAFE!r} and {UNSAFE!r} begin with the same token after the prompt",
            remedy="Give a checkpoint of Llama Guard.",
        )
    end = tuple(sorted(checkpoint.config.eos_token_ids))
    if not end:
        raise UsageError(
            f"{checkpoint.path} names no token that ends an answer", remedy="Name one with --stop-token TEXT."
        )
    rest, found = _answers(prompt, tuple(names.items()), tokenizer)
    guard = Guard(conversation, found, rest, end, custom=categories is not None)
    return with_rows(checkpoint, Classifier(TOKENS, labels, prompt, guard=guard))


def _answers(
    prompt: str, names: tuple[tuple[str, str], ...], tokenizer: Tokenizer
) -> tuple[tuple[int, ...], tuple[Category, ...]]:
    """(tokens of `unsafe` after its first, categories with their tokens). Raises UsageError if tokens run together."""
    text = prompt.replace(TEXT, "a")

    def after(start: str, further: str) -> tuple[int, ...]:
        ids = tokenizer.encode(text + start)
        whole = tokenizer.encode(text + start + further)
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise UsageError(
                f"the tokens of the answer {start + further!r} do not begin with those of {start!r}",
                remedy="Use codes of a letter and a number.",
            )
        return tuple(whole[len(ids) :])

    rest, other = after("", UNSAFE)[1:], names[0][0]
    categories = []
    for code, name in names:
        previous = other if code != other or len(names) == 1 else names[1][0]
        category = Category(
            code, name, after(UNSAFE, f"\n{code}"), after(f"{UNSAFE}\n{previous}", f",{code}")
        )
        categories.append(category)
    return rest, tuple(categories)


def recorded_categories(guard: Guard) -> dict[str, str] | None:
    """Categories that a bundle's guard got from its user; None for those of the template."""
    return {c.code: c.name for c in guard.categories} if guard.custom else None
