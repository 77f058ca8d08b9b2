"""Verb `doctor` of the command line."""

from __future__ import annotations

import argparse
import sys

from edgellama.cli.arguments import json_option, write_json


def options(p: argparse.ArgumentParser) -> None:
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Prints the examination. Returns 1 if there are problems, else 0."""
    from edgellama.commands.doctor import doctor
    from edgellama.host.proven_versions import constraints_file
    from edgellama.report.tables import to_text

    data = doctor()
    view = {key: value for key, value in data.items() if key not in ("schema", "problems")}
    print(to_text(view), file=sys.stderr if args.json == "-" else sys.stdout)
    if data["differences"]:
        print(
            f"\n{len(data['differences'])} packages differ from the versions that edgellama was proven with. To install"
            f" those:\n  pip install -c {constraints_file()} edgellama",
            file=sys.stderr,
        )
    for problem in data["problems"]:
        print(f"\nproblem: {problem['what']}\n  {problem['remedy']}", file=sys.stderr)
    write_json(args.json, data)
    return 1 if data["problems"] else 0
