"""Verbs `delta` and `apply`: updates of a bundle that carry only what changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from edgellama.bundle import Bundle
from edgellama.errors import UsageError
from edgellama.release.apply import apply_delta
from edgellama.release.delta import write_delta
from edgellama.release.keys import is_ed25519, read_public_key
from edgellama.release.signature import verify_manifest

SCHEMA = "edgellama.delta-summary/1"


def delta(old: str | Path, new: str | Path, output: Path, *, force: bool = False) -> dict[str, Any]:
    """Writes the delta from the bundle `old` to the bundle `new`, and returns its sizes (JSON data).

    force: replace an existing file. Raises BundleError for a damaged bundle, and UsageError.
    """
    bundles = Bundle.open(old), Bundle.open(new)
    if output.is_dir() or (output.exists() and not force):
        raise UsageError(
            f"{output} exists", remedy="Use --force to replace a file, or choose another name with -o."
        )
    if any(output.resolve().is_relative_to(bundle.path.resolve()) for bundle in bundles):
        raise UsageError(f"{output} lies in a bundle", remedy="Choose another place with -o.")
    header = write_delta(*bundles, output)
    return {
        "schema": SCHEMA,
        "bytes": output.stat().st_size,
        "new_bytes": sum(entry["bytes"] for entry in bundles[1].manifest["files"].values()),
        "files": [
            {
                "path": file.path,
                "bytes": file.bytes,
                "data": sum(piece.data for piece in file.pieces),
                "methods": sorted({piece.method for piece in file.pieces}),
            }
            for file in header.files
        ],
    }


def apply(
    old: str | Path, delta_file: Path, output: Path, *, key: Path | None = None, force: bool = False
) -> Bundle:
    """Makes the new bundle of the old one and a delta.

    key: PEM file of an Ed25519 public key that must have signed the new bundle. force: replace a bundle at
    `output`, which may be the old one.

    Raises InputError, BundleError, ResourceError, SignatureError and UsageError, and then changes nothing.
    """
    check = None
    if key is not None:
        public = read_public_key(key)
        if not is_ed25519(public):
            raise UsageError(f"{key}: not an Ed25519 key", remedy="Verify model.sig with `edgellama verify`.")
        check = partial(verify_manifest, key=cast(Any, public))
    return apply_delta(Bundle.open(old), delta_file, output, force=force, check=check)
