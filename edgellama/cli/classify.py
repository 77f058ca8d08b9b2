"""Verb `classify`: labels of texts from a bundle that was exported with --task classify."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.cli.arguments import json_option, write_json
from edgellama.errors import readable

if TYPE_CHECKING:
    from edgellama.runtimes.classify import Classification


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument("-t", "--target", metavar="TARGET", help="default: the bundle's first")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--text", metavar="TEXT", help="the text to classify")
    source.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="JSON lines with a text each; a label is compared if it is there",
    )
    source.add_argument(
        "--chat",
        metavar="FILE",
        type=Path,
        help="JSON list of messages with role and content; a guard judges the last",
    )
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Prints a line for each text: label, its probability, and the beginning of the text. Returns 0."""
    from edgellama.commands.classify import classify, read_chat, read_rows
    from edgellama.host.progress import Progress

    if args.chat is not None:
        messages = read_chat(args.chat)
        rows: list[dict[str, Any]] = [{"chat": messages, "text": messages[-1]["content"] if messages else ""}]
    else:
        rows = [{"text": args.text}] if args.data is None else read_rows(args.data)
    texts = [row["chat"] if args.chat is not None else row["text"] for row in rows]
    result = classify(args.bundle, texts, target=args.target, progress=Progress(sys.stderr))
    out = sys.stderr if args.json == "-" else sys.stdout
    for row, answer in zip(rows, result, strict=True):
        print(_line(row["text"], answer), file=out)
    compared = [
        row["label"] == answer.label for row, answer in zip(rows, result, strict=True) if "label" in row
    ]
    if compared:
        share = sum(compared) / len(compared)
        print(
            f"{sum(compared)} of {len(compared)} answers are the given label ({share:.1%})", file=sys.stderr
        )
    answers: list[dict[str, Any]] = [
        {**row, "answer": answer.to_dict()} for row, answer in zip(rows, result, strict=True)
    ]
    write_json(args.json, {"bundle": str(args.bundle), "answers": answers})
    return 0


def _line(text: str, answer: Classification) -> str:
    flag = "" if answer.flagged is None else ("  flagged" if answer.flagged else "  not flagged")
    probability = answer.probabilities[answer.label]
    categories = f"  {','.join(answer.categories)}" if answer.categories else ""
    return f"{readable(answer.label)}  {probability:.4f}{flag}{categories}  {readable(text[:60])}"
