"""Verb `inspect` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgellama.cli.arguments import checkpoint_path, download_option, json_option, write_json
from edgellama.errors import UsageError


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        nargs="?",
        help="a bundle, a checkpoint or OWNER/NAME[@REVISION], a .pte, an .mlpackage, an .onnx",
    )
    p.add_argument(
        "--adapter", metavar="DIR", type=Path, help="a LoRA adapter of PEFT or MLX, in place of PATH"
    )
    download_option(p)
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Prints the contents. Returns 1 if a bundle has problems, else 0."""
    from edgellama.commands.inspect import inspect
    from edgellama.commands.inspect_adapter import inspect_adapter
    from edgellama.report.tables import to_text

    if (args.path is None) == (args.adapter is None):
        raise UsageError("give one thing to inspect", remedy="Give a PATH, or --adapter DIR.")
    if args.adapter is not None:
        data = inspect_adapter(args.adapter)
    else:
        data = inspect(checkpoint_path(args.path, args, weights=False))
    view = {key: value for key, value in data.items() if key != "schema"}
    print(to_text(view), file=sys.stderr if args.json == "-" else sys.stdout)
    write_json(args.json, data)
    return 1 if data.get("problems") else 0
