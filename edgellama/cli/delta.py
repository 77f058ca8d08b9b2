"""Verb `delta` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgellama.cli.arguments import json_option, output_file, write_json


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("old", metavar="OLD", type=Path, help="the bundle that devices have")
    p.add_argument("new", metavar="NEW", type=Path, help="the bundle that they shall have")
    p.add_argument("-o", "--output", metavar="FILE", type=output_file, required=True, help="the delta")
    p.add_argument("--force", action="store_true", help="replace an existing file")
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Writes a delta and prints its size. Returns 0."""
    from edgellama.commands.delta import delta

    summary = delta(args.old, args.new, args.output, force=args.force)
    for file in summary["files"]:
        methods = ", ".join(file["methods"])
        print(f"  {file['path']}: {file['data']:,} of {file['bytes']:,} bytes ({methods})", file=sys.stderr)
    share = summary["bytes"] / max(1, summary["new_bytes"])
    print(f"{args.output}: {summary['bytes']:,} bytes, {share:.1%} of the new bundle", file=sys.stderr)
    write_json(args.json, summary)
    return 0
