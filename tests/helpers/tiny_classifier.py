"""A classifier of novels, manuals and programs: a head on the first layer of the tiny model, fitted by least squares."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from edgellama import data
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.text.labelled import LabelledText, LabelledTexts
from tests.helpers.tiny_models import write_hf

LABELS = ("novel", "manual", "program")
CONTEXT = 96
# Marks of a program in an indented block, which may also be a note or a definition.
CODE = re.compile(r">>>|^\s*(def|class|import|from|for|while|with|if) |print\(|\w = |^\s*\$ ", re.MULTILINE)
RIDGE = 1.0  # of the mean square of a feature


def labelled(
    novel: str, manual: str, count: int, name: str, lengths: tuple[int, int] = (40, 80)
) -> LabelledTexts:
    """`count` texts of each label from two of the shipped texts, in groups by their length in characters."""
    prose = [p for p in data.read_text(novel).split("\n\n") if len(p) > 100]
    parts = [p for p in data.read_text(manual).split("\n\n") if len(p) > 40]
    code = [p for p in parts if re.match(r"\s{3}", p) and CODE.search(p)]
    text = [p for p in parts if not re.match(r"\s{3}|\.\.", p)]
    rows = []
    for label, pieces in zip(LABELS, (prose, text, code), strict=True):
        for number in range(count):
            piece = pieces[number % len(pieces)].strip()
            rows.append(LabelledText(piece[: lengths[number % 2]], label, ("short", "long")[number % 2]))
    return LabelledTexts(name, tuple(dict.fromkeys(rows)))


def training_texts() -> LabelledTexts:
    return labelled("calibration_emma.txt", "calibration_python_tutorial.rst", 60, "train")


def evaluation_texts() -> LabelledTexts:
    return labelled("evaluation_persuasion.txt", "evaluation_python_tutorial.rst", 40, "evaluation")


def halves(texts: LabelledTexts) -> tuple[LabelledTexts, LabelledTexts]:
    """Every other pair of texts, so that both halves have both groups."""
    parts = ([row for n, row in enumerate(texts.rows) if n // 2 % 2 == half] for half in (0, 1))
    one, other = (replace(texts, rows=tuple(part)) for part in parts)
    return one, other


def jsonl(texts: LabelledTexts, path: Path) -> Path:
    path.write_text(
        "".join(json.dumps({"text": r.text, "label": r.label, "group": r.group}) + "\n" for r in texts.rows)
    )
    return path


def write_classifier(tiny: Checkpoint, directory: Path) -> Path:
    """Writes the classifier as a LlamaForSequenceClassification directory, and returns its path."""
    cut = tiny.first_layers(1)
    write_hf(cut, directory)
    full, texts = StreamedLlama(cut), training_texts()
    sequences = [tiny.tokenizer.encode(row.text) for row in texts.rows]
    full.read_ahead(sequences)
    features = torch.stack([full._states[tuple(tokens)][-1] for tokens in sequences])
    wanted = 4.0 * torch.nn.functional.one_hot(torch.tensor(texts.truth(LABELS)), len(LABELS)).float()
    penalty = RIDGE * features.square().mean() * len(features) * torch.eye(features.shape[1])
    head = torch.linalg.solve(features.T @ features + penalty, features.T @ (wanted - wanted.mean(0))).T
    weights = load_file(directory / "model.safetensors")
    save_file({**weights, "score.weight": head.contiguous()}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {str(n): name for n, name in enumerate(LABELS)},
        "label2id": {name: n for n, name in enumerate(LABELS)},
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def open_classifier(tiny: Checkpoint, directory: Path) -> Checkpoint:
    return open_checkpoint(write_classifier(tiny, directory))
