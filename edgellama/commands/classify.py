"""Verb `classify`: answers of a bundle about texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.errors import TextError, UsageError
from edgellama.host.progress import Progress
from edgellama.model.guard import Message
from edgellama.runtimes.classify import Classification
from edgellama.runtimes.load import load
from edgellama.text.label_prompt import prompt_ids
from edgellama.text.labelled import json_lines


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines: a text each, with any other keys. Raises TextError."""
    rows = [data for _, data in json_lines(path)]
    if not rows:
        raise TextError(f"{path}: holds no text", remedy='Give lines of the form {"text": TEXT}.')
    return rows


def read_chat(path: Path) -> list[dict[str, str]]:
    """Messages of a JSON file: a list of {"role": …, "content": …}. Raises TextError."""
    form = 'A conversation is a JSON list of {"role": "user" or "assistant", "content": TEXT}.'
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TextError(f"{path}: not readable as JSON ({error})", remedy=form) from error
    if not isinstance(data, list) or not all(
        isinstance(m, dict)
        and m.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in m.values())
        for m in data
    ):
        raise TextError(f"{path}: holds no conversation", remedy=form)
    return data


def classify(
    bundle: Bundle | str | Path,
    texts: Sequence[str | Sequence[Message]],
    *,
    target: str | None = None,
    progress: Progress | None = None,
) -> list[Classification]:
    """Classifies texts, one after the other.

    texts: texts, or conversations for a guard. target: None for the bundle's first.

    All texts are encoded before the first is classified. Raises UsageError for a bundle that generates text and for an
    empty text, ContextLengthError for a text that does not fit.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    classifier, progress = bundle.classifier, progress or Progress()
    if classifier is None:
        raise UsageError(
            f"{bundle.path} generates text, and has no labels",
            remedy="Export the checkpoint with --task classify, or use `edgellama run`.",
        )
    tokenizer = bundle.tokenizer
    for text in texts:
        prompt_ids(classifier, tokenizer, text, bundle.context_length)
    answers = []
    with load(bundle, target) as runtime, progress.bar("classify", len(texts), "text") as bar:
        for text in texts:
            answers.append(runtime.classify(text))
            bar.update(1)
    return answers
