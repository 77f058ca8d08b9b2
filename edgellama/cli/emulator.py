"""Verb `emulator` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("action", choices=("install", "show"), help="install it, or show where it is")
    p.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        nargs="?",
        help="its directory (default: $EDGELLAMA_EMULATOR, or edgellama-emulator in the user's cache)",
    )
    p.add_argument("--force", action="store_true", help="install it again")
    p.add_argument(
        "--counter",
        action="store_true",
        help="also build the qemu that `bench --emulate` counts instructions with; it needs a C compiler",
    )


def main(args: argparse.Namespace) -> int:
    """Installs or shows the emulator, and prints its directory and versions. Returns 0."""
    from edgellama.emulator.install import install
    from edgellama.emulator.installed import default_directory, find_emulator
    from edgellama.host.progress import Progress

    directory = (args.directory or default_directory()).absolute()
    if args.action == "install":
        emulator = install(directory, Progress(sys.stderr), force=args.force, counting=args.counter)
    else:
        emulator = find_emulator(directory)
    print(f"{emulator.directory}: {emulator.summary}")
    return 0
