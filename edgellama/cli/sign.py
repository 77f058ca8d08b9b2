"""Verb `sign` of the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgellama.cli.arguments import json_option, version_number, write_json


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument(
        "--key",
        metavar="KEY",
        type=Path,
        action="append",
        default=[],
        help="private key as PEM: Ed25519 signs for the apps, NIST curves sign by OpenSSF Model Signing",
    )
    p.add_argument(
        "--version",
        metavar="N",
        type=version_number,
        help="version of the release, which apps need not let fall",
    )
    p.add_argument("--certificate", metavar="CERT", type=Path, help="certificate of the elliptic key, as PEM")
    p.add_argument(
        "--chain",
        metavar="CERT",
        type=Path,
        action="append",
        default=[],
        help="certificate above that one; may be repeated",
    )
    p.add_argument(
        "--sigstore", action="store_true", help="sign as an identity of sigstore, which needs the network"
    )
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Signs a bundle and prints its signatures. Returns 0."""
    from edgellama.commands.sign import sign, signatures_data

    signatures = sign(
        args.bundle,
        keys=args.key,
        version=args.version,
        certificate=args.certificate,
        chain=args.chain,
        sigstore=args.sigstore,
        passphrase=_ask if sys.stdin is not None and sys.stdin.isatty() else None,
    )
    for signature in signatures:
        print(signature.describe(), file=sys.stderr)
        if signature.app_key is not None:
            print(
                f"  An app that is built with the public key {signature.app_key} loads it.", file=sys.stderr
            )
    write_json(args.json, signatures_data(signatures))
    return 0


def _ask(key: Path) -> str:
    import getpass

    return getpass.getpass(f"Passphrase of {key}: ")
