"""Verb `verify` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgellama.cli.arguments import json_option, version_number, write_json
from edgellama.errors import UsageError


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument(
        "--key",
        metavar="PUB",
        type=Path,
        action="append",
        default=[],
        help="public key as PEM, which must have signed; may be repeated",
    )
    p.add_argument("--min-version", metavar="N", type=version_number, help="smallest version of the release")
    p.add_argument(
        "--chain",
        metavar="CERT",
        type=Path,
        action="append",
        default=[],
        help="trusted certificate as PEM, for a signature with a certificate; may be repeated",
    )
    p.add_argument(
        "--identity", metavar="NAME", help="identity of sigstore that must have signed; uses the network"
    )
    p.add_argument("--issuer", metavar="URL", help="issuer of that identity")
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Verifies a bundle's signatures and the hash of every file. Returns 0, or 1 for any other bundle."""
    from edgellama.commands.sign import signatures_data, verify

    if (args.identity is None) != (args.issuer is None):
        raise UsageError("an identity belongs to an issuer", remedy="Give --identity and --issuer together.")
    signatures = verify(
        args.bundle,
        keys=args.key,
        min_version=args.min_version,
        chain=args.chain,
        identity=None if args.identity is None else (args.identity, args.issuer),
    )
    for signature in signatures:
        print(signature.describe(), file=sys.stderr)
    write_json(args.json, signatures_data(signatures))
    return 0
