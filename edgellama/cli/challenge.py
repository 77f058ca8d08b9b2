"""Verb `challenge` of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgellama.cli.arguments import count, json_destination, write_json


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=json_destination,
        required=True,
        help="the challenge, or the response with --answer; - for standard output",
    )
    p.add_argument("-t", "--target", metavar="TARGET", help="(default: the bundle's first)")
    p.add_argument(
        "--device", metavar="NAME", help="device that must answer, or part of its name (default: any)"
    )
    p.add_argument(
        "--hours", metavar="N", type=count, default=24, help="time until it expires (default: %(default)s)"
    )
    p.add_argument(
        "--seed", metavar="N", type=int, help="for tests: the same tokens again, which anyone may know"
    )
    p.add_argument(
        "--answer", metavar="CHALLENGE", type=Path, help="answer this challenge on this machine instead"
    )


def main(args: argparse.Namespace) -> int:
    """Writes a challenge, or the answer to one."""
    from edgellama.commands.challenge import answer, make

    if args.answer is not None:
        data = answer(args.bundle, args.answer)
    else:
        data = make(args.bundle, target=args.target, device=args.device, hours=args.hours, seed=args.seed)
    write_json(args.output, data)
    return 0
