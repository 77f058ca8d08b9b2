"""Classifier of a checkpoint: a trained head, or the rows of the output layer that can be an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.errors import CheckpointError, InputError, UsageError
from edgellama.files import read_json
from edgellama.model.labels import TEXT, TOKENS, Classifier, Label
from edgellama.text.label_prompt import checked_prompt, with_prefix
from edgellama.text.tokenizer import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Texts before the answer, to see that it begins with the same token after each.
_PROBES = ("a", "Hello, world!", "9", "x = 1\n", "…")
_FORM = 'A file of labels is a JSON list of {"label": NAME, "text": TEXT or [TEXT, …], "description": TEXT}.'


def read_labels(path: Path) -> tuple[Label, ...]:
    """Labels of a JSON file, without the ids of their tokens. Raises InputError."""
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})", remedy=_FORM) from error
    if not isinstance(data, list):
        raise InputError(f"{path}: holds a JSON {type(data).__name__}, expected a list", remedy=_FORM)
    return tuple(_label(path, entry) for entry in data)


def _label(path: Path, entry: Any) -> Label:
    known = {"label", "text", "description"}
    if not isinstance(entry, Mapping) or not {"label", "text"} <= entry.keys() <= known:
        raise InputError(f"{path}: {entry!r:.80} is no label", remedy=_FORM)
    texts = entry["text"] if isinstance(entry["text"], list) else [entry["text"]]
    strings = [entry["label"], entry.get("description", ""), *texts]
    if not texts or not all(isinstance(x, str) for x in strings) or not all((entry["label"], *texts)):
        raise InputError(f"{path}: {entry!r:.80} has an empty text, or one that is no text", remedy=_FORM)
    return Label(entry["label"], tuple(texts), (), entry.get("description", ""))


def as_classifier(checkpoint: Checkpoint, labels: Sequence[Label] | None, prompt: str | None) -> Checkpoint:
    """The checkpoint as a classifier.

    Args:
        checkpoint: a model of the next token, or one with a trained head.
        labels: answers of a model of the next token; None for a trained head, which has its own labels.
        prompt: the text around the text to classify (`checked_prompt`). None, for a trained head, for none.

    Raises UsageError for labels that do not fit the checkpoint, or that the first token does not tell apart.
    """
    own = checkpoint.classifier
    if own is not None:
        if labels is not None:
            raise UsageError(
                f"{checkpoint.path} has a trained head with the labels {', '.join(own.names[:8])}",
                remedy="Leave out --labels, which are for a model of the next token.",
            )
        written = checked_prompt(prompt or TEXT, dict.fromkeys(own.names, ""))
        prompted = with_prefix(replace(own, prompt=written), checkpoint.tokenizer)
        return checkpoint.with_options(classifier=prompted)
    if labels is None or prompt is None:
        raise UsageError(
            f"{checkpoint.path} predicts the next token, so its labels and the text that asks for them are to be given",
            remedy=f"Add --labels FILE and --prompt TEMPLATE with {TEXT} in it, or give a model with a trained head.",
        )
    written = checked_prompt(prompt, {label.label: label.description for label in labels})
    classifier = Classifier(TOKENS, _with_tokens(labels, written, checkpoint.tokenizer), written)
    return with_rows(checkpoint, classifier)


def with_rows(checkpoint: Checkpoint, classifier: Classifier) -> Checkpoint:
    """The checkpoint with the rows of the classifier's tokens as its output layer. A tied table stays whole."""
    classifier = with_prefix(classifier, checkpoint.tokenizer)
    rows, source = list(classifier.tokens), HEAD if HEAD in checkpoint.infos else EMBEDDING

    def read(name: str) -> Tensor:
        return checkpoint.read(source)[rows] if name == HEAD else checkpoint.read(name)

    info = checkpoint.infos[source]
    pruned = replace(
        info,
        shape=(len(rows), info.shape[1]),
        nbytes=info.nbytes // info.shape[0] * len(rows),
    )
    return checkpoint.with_options(
        config=replace(checkpoint.config, label_rows=len(rows), tie_word_embeddings=False),
        infos={**checkpoint.infos, HEAD: pruned},
        read=read,
        classifier=classifier,
    )


def _with_tokens(labels: Sequence[Label], prompt: str, tokenizer: Tokenizer) -> tuple[Label, ...]:
    """The labels with the id of the first token of each text after the prompt."""
    if len(labels) < 2 or len({label.label for label in labels}) < len(labels):
        raise UsageError(
            f"there are {len(labels)} labels, and a classifier has two at least, of different names",
            remedy=_FORM,
        )
    found = tuple(
        replace(label, tokens=tuple(first_token(text, prompt, tokenizer) for text in label.texts))
        for label in labels
    )
    owner: dict[int, tuple[str, str]] = {}
    for label in found:
        for text, token in zip(label.texts, label.tokens, strict=True):
            if token in owner:
                other, before = owner[token]
                raise UsageError(
                    f"{text!r} of label {label.label!r} and {before!r} of label {other!r} begin with the same token "
                    f"{tokenizer.decode([token], skip_special_tokens=False)!r}, so the first token does not tell them apart",
                    remedy="Use answers with different beginnings, for example letters: ' A', ' B'.",
                )
            owner[token] = label.label, text
    return found


def first_token(text: str, prompt: str, tokenizer: Tokenizer) -> int:
    """Id of the first token of `text` after the prompt. Raises UsageError if it depends on the text before."""
    before, after = prompt.split(TEXT)
    firsts = set()
    for probe in _PROBES:
        ids = tokenizer.encode(f"{before}{probe}{after}")
        whole = tokenizer.encode(f"{before}{probe}{after}{text}")
        firsts.add(whole[len(ids)] if whole[: len(ids)] == ids and len(whole) > len(ids) else None)
    first = firsts.pop()
    if firsts or first is None:
        raise UsageError(
            f"the answer {text!r} joins the end of the prompt {after[-20:]!r} in one token, so it has no first token of its own",
            remedy="Begin the answer with a space or end the prompt with a line feed, as the model was trained.",
        )
    return first


def trained_labels(data: Mapping[str, Any], rows: int) -> Classifier:
    """Labels of a LlamaForSequenceClassification checkpoint.

    data: contents of config.json. rows: number of labels. Raises CheckpointError for names that are not one a row.
    """
    names = data.get("id2label")
    if names is None:
        names = {str(row): f"LABEL_{row}" for row in range(rows)}
    by_row = {str(row): name for row, name in names.items()}
    ordered = [by_row.get(str(row)) for row in range(rows)]
    if not all(isinstance(name, str) and name for name in ordered) or len({*ordered}) < rows:
        raise CheckpointError(
            f"config.json: id2label is {names!r:.80}, expected one name for each row 0 to {rows - 1}",
            remedy="Correct id2label; the names are the answers of the classifier.",
        )
    padding = data.get("pad_token_id")
    if padding is not None and (not isinstance(padding, int) or isinstance(padding, bool) or padding < 0):
        raise CheckpointError(
            f"config.json: pad_token_id must be a token id or null, got {padding!r:.40}",
            remedy="Check the file against the model's original one.",
        )
    return Classifier("score", tuple(Label(str(name)) for name in ordered), TEXT, padding)
