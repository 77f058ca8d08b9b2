"""Verb `sbom` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgellama.cli.arguments import json_destination


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=json_destination,
        default="-",
        help="the bill of materials (default: standard output)",
    )


def main(args: argparse.Namespace) -> int:
    """Writes the bill of materials. Returns 0."""
    from edgellama.commands.sbom import sbom

    text = sbom(args.bundle)
    if args.output == "-":
        sys.stdout.write(text)
    else:
        Path(args.output).write_text(text, encoding="utf-8")
    return 0
