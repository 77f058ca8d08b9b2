"""Verb `help`: the documentation that ships with edgellama, in the terminal and offline."""

from __future__ import annotations

import argparse
import sys


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("topic", metavar="TOPIC", nargs="?", help="a topic (default: list them)")


def main(args: argparse.Namespace) -> int:
    """Lists the topics, or prints one. Returns 0."""
    from edgellama.docs import read_topic, topics

    if args.topic is None:
        for name, summary in topics().items():
            print(f"{name:<16} {summary}")
        return 0
    page = read_topic(args.topic)
    if sys.stdout.isatty():
        from pydoc import pager  # its imports would slow every `--help`

        pager(page)
    else:
        sys.stdout.write(page)
    return 0
