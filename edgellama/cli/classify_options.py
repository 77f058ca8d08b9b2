"""Options about classifiers of the verbs `export` and `validate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgellama.errors import UsageError

if TYPE_CHECKING:
    from edgellama.commands.classify_task import ClassifyTask

_OF_TASK = (
    "prune_vocabulary",
    "unknown",
    "prefix",
    "categories",
    "labels",
    "prompt",
    "data",
    "tune",
    "positive",
    "fpr",
    "max_flips",
    "max_fpr_increase",
)


def export_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of `export` that make a classifier."""
    group = p.add_argument_group("classifier")
    group.add_argument(
        "--task",
        choices=("classify", "guard"),
        help="export a classifier of texts, or a guard such as Llama Guard, and no text generator",
    )
    group.add_argument(
        "--categories",
        metavar="FILE",
        type=Path,
        help="policy of a guard, a JSON object of codes and names (default: of the checkpoint's chat template)",
    )
    group.add_argument(
        "--prefix",
        action="store_true",
        help="also ship keys and values of the prompt's fixed beginning, where the KV cache is an input (onnx)",
    )
    group.add_argument(
        "--prune-vocabulary",
        metavar="FILE",
        type=Path,
        help="keep the embedding rows of these texts' tokens alone: a text a line, or JSON lines",
    )
    group.add_argument(
        "--unknown",
        choices=("bytes", "refuse"),
        help="rule for texts with other tokens: accept them in smaller pieces, or refuse them",
    )
    group.add_argument(
        "--labels",
        metavar="FILE",
        type=Path,
        help="JSON list of labels with the texts that the model answers; a trained head has its own labels",
    )
    group.add_argument(
        "--prompt", metavar="TEMPLATE", help="text around {text}, with {labels} if wanted; @FILE reads a file"
    )
    group.add_argument(
        "--tune",
        metavar="FILE",
        type=Path,
        help="labelled texts for temperature and threshold, as for --data",
    )
    group.add_argument("--positive", metavar="LABEL", help="label of the threshold")
    group.add_argument("--fpr", metavar="X", type=float, help="false-positive rate that the threshold keeps")
    _limits(group)


def validate_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of `validate` about labelled texts."""
    group = p.add_argument_group("classifier")
    group.add_argument(
        "--tune",
        metavar="FILE",
        type=Path,
        help="texts of the export's --tune, to compute temperature and threshold again",
    )
    _limits(group)


def _limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="labelled texts to judge a classifier on: JSON lines with text, label and, if wanted, group",
    )
    group.add_argument(
        "--max-flips",
        metavar="X",
        type=float,
        help="share of texts whose answer may change, of all and of the worst group",
    )
    group.add_argument(
        "--max-fpr-increase",
        metavar="X",
        type=float,
        help="increase of a label's false-positive rate, of all texts and of the worst group",
    )


def task_of(args: argparse.Namespace) -> ClassifyTask | None:
    """The task of an export; None without `--task`. Raises UsageError for options of a task without it."""
    if args.task is None:
        given = [name for name in _OF_TASK if getattr(args, name) not in (None, False)]
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is for a classifier",
                remedy="Add --task classify, or --task guard.",
            )
        return None
    from edgellama.commands.classify_task import ClassifyTask

    return ClassifyTask.read(
        guard=args.task == "guard",
        categories=args.categories,
        prefix=args.prefix,
        prune_vocabulary=args.prune_vocabulary,
        unknown=args.unknown,
        labels=args.labels,
        prompt=_prompt(args.prompt),
        data=args.data,
        tune=args.tune,
        positive=args.positive,
        fpr=args.fpr,
        max_flips=args.max_flips,
        max_fpr_increase=args.max_fpr_increase,
    )


def _prompt(template: str | None) -> str | None:
    """The template, or the content of the file that `@FILE` names."""
    if template is None or not template.startswith("@"):
        return template
    path = Path(template[1:])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason})", remedy="Save the prompt as UTF-8.") from error
