"""Argument types and options shared by several verbs, exit codes of verdicts, and JSON output."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def report_options(p: argparse.ArgumentParser) -> None:
    """Adds the options that write the gate's report to files (edgellama.cli.report_files)."""
    p.add_argument(
        "--html", metavar="FILE", type=output_file, help="write the gate's report as a page with plots"
    )
    p.add_argument(
        "--markdown",
        metavar="FILE",
        type=output_file,
        help="write a summary in Markdown, for the page of a CI job",
    )
    p.add_argument("--junit", metavar="FILE", type=output_file, help="write the checks as JUnit XML")


def download_option(p: argparse.ArgumentParser) -> None:
    """Adds `--download`."""
    p.add_argument(
        "--download",
        action="store_true",
        help="fetch a checkpoint named OWNER/NAME from the Hugging Face hub; nothing else uses the network",
    )


def checkpoint_path(place: str | Path, args: argparse.Namespace, *, weights: bool = True) -> Path:
    """Path of the checkpoint at a path, or of the model OWNER/NAME. Sentences about it go to standard error.

    weights: False if the files besides the weights are enough.
    """
    from edgellama.host.find_checkpoint import find_checkpoint

    def say(line: str) -> None:
        print(f"note: {line}", file=sys.stderr, flush=True)

    return find_checkpoint(place, download=args.download, weights=weights, say=say)


def adapter_option(p: argparse.ArgumentParser, *, purpose: str) -> None:
    """Adds `--adapter DIR[:WEIGHT]`. purpose: completes the help text."""
    p.add_argument(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        action="append",
        help=f"LoRA adapter of PEFT or MLX, {purpose}; may be repeated",
    )


def swappable_option(p: argparse.ArgumentParser, *, purpose: str) -> None:
    """Adds `--adapters NAME=DIR`. purpose: completes the help text."""
    p.add_argument(
        "--adapters",
        metavar="NAME=DIR",
        action="append",
        help=f"LoRA adapter {purpose}; may be repeated",
    )


def json_option(p: argparse.ArgumentParser) -> None:
    """Adds `--json FILE`."""
    p.add_argument(
        "--json",
        metavar="FILE",
        type=json_destination,
        help="write the result as JSON to FILE, or to standard output for -",
    )


def count(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def version_number(text: str) -> int:
    """Argument type: the version of a release, a whole number that every JSON reader holds exactly."""
    if not (text.isascii() and text.isdecimal()) or int(text) >= 2**53:
        raise argparse.ArgumentTypeError(f"must be a whole number below 2^53, got {text!r}")
    return int(text)


def json_destination(text: str) -> str:
    """Argument type: a file that can be written, or `-`. Checked here, before an export of minutes."""
    if text != "-" and Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: it is a directory")
    if text != "-" and not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: its directory does not exist")
    return text


def output_file(text: str) -> Path:
    """Argument type: a file that can be written."""
    if text == "-":
        raise argparse.ArgumentTypeError("needs the name of a file; standard output is for --json")
    return Path(json_destination(text))


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_or_zero(text: str) -> int:
    """Argument type: a size in bytes, as `size` reads it, or 0."""
    return 0 if text == "0" else size(text)


def size(text: str) -> int:
    """Argument type: a size in bytes, at least 1, with an optional unit such as MB or MiB."""
    number = text.rstrip("BbKkMmGgIi ")
    unit = text[len(number) :].strip().upper()
    try:
        in_bytes = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        in_bytes = 0
    if in_bytes < 1:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; use bytes, or KB, MB, GB, KiB, MiB, GiB")
    return in_bytes


VERDICT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}


def write_json(where: str | None, data: Any) -> None:
    """Writes `data` as JSON to the file `where`, to standard output for `-`, nowhere for None."""
    import json

    from edgellama.files import to_json

    if where is None:
        return
    # The escape \udcXX keeps the JSON valid for a file name that is not Unicode.
    text = to_json(json.loads(json.dumps(data))).encode("utf-8", "backslashreplace").decode("utf-8")
    if where == "-":
        sys.stdout.write(text)
    else:
        Path(where).write_text(text, encoding="utf-8")
