"""Checkpoint with the embedding rows of a corpus alone, and the tokenizer that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.labels import EMBEDDING, HEAD
from edgellama.errors import TextError
from edgellama.files import digest
from edgellama.model.labels import Vocabulary
from edgellama.text.label_prompt import prompt_parts
from edgellama.text.labelled import json_lines
from edgellama.text.pruned_vocabulary import Pruned, pruned, rewritten

UNKNOWN = ("bytes", "refuse")


@dataclass(frozen=True)
class Corpus:
    """Texts that keep their pieces. unknown: rule for texts with other tokens, of UNKNOWN."""

    texts: tuple[str, ...]
    unknown: str

    @property
    def sha256(self) -> str:
        return digest(list(self.texts))


def read_corpus(path: Path, unknown: str) -> Corpus:
    """Texts of a file: `text` of each JSON line in a file named `.jsonl`, else each line. Raises TextError."""
    if path.suffix == ".jsonl":
        texts = tuple(data["text"] for _, data in json_lines(path))
    else:
        try:
            texts = tuple(line for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: not readable as UTF-8 ({error})", remedy="Check the file.") from error
    if not texts:
        raise TextError(f"{path}: holds no text", remedy="Give a text a line.")
    return Corpus(texts, unknown)


def with_corpus(
    checkpoint: Checkpoint, classified: Checkpoint, corpus: Corpus
) -> tuple[Checkpoint, Vocabulary]:
    """The checkpoint with the tokens of a corpus, of the prompt around each text, and of the answers.

    checkpoint: before it became a classifier. classified: as a classifier, with its prompt and labels.
    """
    classifier = classified.classifier
    assert classifier is not None
    needed = {*classifier.tokens, *checkpoint.config.eos_token_ids}
    needed |= {x for x in (classifier.padding, checkpoint.config.bos_token_id) if x is not None}
    prompts = ("".join(part for part, _ in prompt_parts(classifier, text)) for text in corpus.texts)
    texts = [*corpus.texts, *prompts]
    found = pruned(checkpoint.tokenizer, texts, needed)
    vocabulary = Vocabulary(len(found.kept), found.seen, corpus.unknown, corpus.sha256)
    return with_vocabulary(checkpoint, found), vocabulary


def with_kept(checkpoint: Checkpoint, kept: Sequence[int], seen: int) -> Checkpoint:
    """The checkpoint with the rows of the old ids `kept`, in their order."""
    return with_vocabulary(checkpoint, rewritten(checkpoint.tokenizer, kept, seen))


def with_vocabulary(checkpoint: Checkpoint, found: Pruned) -> Checkpoint:
    """The checkpoint with another vocabulary: rows of the embedding and of the output layer, and ids in its config."""
    rows, new_ids, config = list(found.kept), found.new_ids, checkpoint.config
    names = [
        name
        for name in (EMBEDDING, HEAD)
        if name in checkpoint.infos and (name == EMBEDDING or not config.label_rows)
    ]

    def read(name: str) -> Tensor:
        weight = checkpoint.read(name)
        return weight[rows] if name in names else weight

    infos = {
        name: replace(info, shape=(len(rows), info.shape[1]), nbytes=info.nbytes // info.shape[0] * len(rows))
        if name in names
        else info
        for name, info in checkpoint.infos.items()
    }
    bos, classifier = config.bos_token_id, checkpoint.classifier
    if classifier is not None and classifier.padding is not None:
        classifier = replace(classifier, padding=new_ids[classifier.padding])
    return checkpoint.with_options(
        config=replace(
            config,
            vocab_size=len(rows),
            bos_token_id=None if bos is None else new_ids[bos],
            eos_token_ids=tuple(new_ids[token] for token in config.eos_token_ids),
        ),
        infos=infos,
        read=read,
        tokenizer=found.tokenizer,
        stop_tokens=tuple(replace(stop, id=new_ids[stop.id]) for stop in checkpoint.stop_tokens),
        classifier=classifier,
    )
