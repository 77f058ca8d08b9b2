"""Verb `targets` of the command line."""

from __future__ import annotations

import argparse
import sys

from edgellama.cli.arguments import json_option, write_json


def options(p: argparse.ArgumentParser) -> None:
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Lists the targets. Returns 0."""
    from edgellama.targets import TARGETS

    for target in TARGETS.values():
        print(f"{target.name:<12} {target.summary}", file=sys.stderr if args.json == "-" else sys.stdout)
    write_json(
        args.json, [{"name": t.name, "summary": t.summary, "artifact": t.artifact} for t in TARGETS.values()]
    )
    return 0
