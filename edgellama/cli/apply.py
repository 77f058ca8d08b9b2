"""Verb `apply` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("old", metavar="OLD", type=Path, help="the bundle that the delta was made from")
    p.add_argument("delta", metavar="FILE", type=Path, help="what `edgellama delta` wrote")
    p.add_argument("-o", "--output", metavar="NEW", type=Path, required=True, help="the new bundle")
    p.add_argument("--key", metavar="PUB", type=Path, help="Ed25519 key that must have signed the new bundle")
    p.add_argument("--force", action="store_true", help="replace a bundle, which may be OLD itself")


def main(args: argparse.Namespace) -> int:
    """Makes the new bundle. Returns 0."""
    from edgellama.commands.delta import apply

    bundle = apply(args.old, args.delta, args.output, key=args.key, force=args.force)
    print(f"{bundle.path}: {', '.join(bundle.targets)}, every file verified", file=sys.stderr)
    return 0
