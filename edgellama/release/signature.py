"""Signature of a bundle's manifest by Ed25519, which the apps verify with their platform's own cryptography.

The manifest has the hash of every file, so its signature covers the bundle. The signature lies beside it in
`signature.json`. The signed bytes are those of manifest.json. With a version, the line `edgellama.version N`
and a line feed precede them.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, MANIFEST_SIGNATURE
from edgellama.bundle.schema import conforming
from edgellama.errors import BundleError, SignatureError
from edgellama.files import read_json, strange_file, to_json
from edgellama.release.keys import fingerprint, raw_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SCHEMA = "edgellama.signature/1"
LONGEST = 4096  # bytes of the file
_REMEDY = "Sign the bundle again, or take it from its owner again."


@dataclass(frozen=True)
class ManifestSignature:
    """Content of signature.json.

    Attributes:
        key: sha256 of the raw public key. It only helps messages, because nobody signed it.
        version: version of the release, under the signature; None without one.
        signature: 64 bytes.
    """

    key: str
    version: int | None
    signature: bytes

    @classmethod
    def of(cls, manifest: bytes, key: Ed25519PrivateKey, version: int | None = None) -> ManifestSignature:
        """Signs the bytes of a manifest. Equal inputs give equal signatures."""
        public = raw_bytes(key.public_key())
        return cls(fingerprint(public), version, key.sign(signed_bytes(manifest, version)))

    @classmethod
    def read(cls, directory: Path) -> ManifestSignature:
        """Reads signature.json. Raises SignatureError if there is none, BundleError for a damaged one."""
        file = directory / MANIFEST_SIGNATURE
        if not file.is_file():
            raise SignatureError(
                f"{directory}: not signed (no {MANIFEST_SIGNATURE})",
                remedy="Sign it with `edgellama sign`, or take it from its owner again.",
            )
        if (kind := strange_file(file, links=False)) is not None or file.stat().st_size > LONGEST:
            raise BundleError(f"{file}: this is {kind or 'too long for a signature'}", remedy=_REMEDY)
        try:
            data: Any = read_json(file)
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{file}: not readable as JSON ({error})", remedy=_REMEDY) from error
        data = conforming(data, "signature", label="signature", where=str(file), remedy=_REMEDY)
        try:
            signature = base64.b64decode(data["signature"], validate=True)
        except binascii.Error as error:
            raise BundleError(f"{file}: its signature is not base64 ({error})", remedy=_REMEDY) from error
        return cls(data["key"], data["version"], signature)

    def to_json(self) -> str:
        """Text of signature.json."""
        signature = base64.b64encode(self.signature).decode()
        return to_json({"schema": SCHEMA, "key": self.key, "version": self.version, "signature": signature})


def signed_bytes(manifest: bytes, version: int | None) -> bytes:
    """The bytes that are signed. JSON begins with a brace, so no manifest looks like one with a version.

    >>> signed_bytes(b"{}", None), signed_bytes(b"{}", 3)
    (b'{}', b'edgellama.version 3\\n{}')
    """
    return manifest if version is None else f"edgellama.version {version}\n".encode() + manifest


def verify_manifest(
    directory: Path, key: Ed25519PublicKey, *, min_version: int | None = None
) -> tuple[Bundle, int | None]:
    """The bundle at `directory`, proven to be signed by the owner of `key`, and the version of the release.

    All files are compared with the manifest. Raises SignatureError for another key, an altered manifest or
    file, and a version below `min_version`. Raises BundleError if there is no bundle.
    """
    Bundle.open(directory)  # its refusals say more about a damaged manifest
    manifest = (directory / MANIFEST).read_bytes()
    version = proven_version(directory, manifest, key, min_version)
    bundle = Bundle.open(directory)
    if (directory / MANIFEST).read_bytes() != manifest:
        raise SignatureError(f"{directory}: its manifest changes while it is read", remedy=_REMEDY)
    check_files(bundle)
    return bundle, version


def proven_version(
    directory: Path, manifest: bytes, key: Ed25519PublicKey, min_version: int | None = None
) -> int | None:
    """Version of the release that the owner of `key` signed with these bytes of its manifest; None without one.

    Raises SignatureError, or BundleError for a damaged signature.json.
    """
    from cryptography.exceptions import InvalidSignature

    found = ManifestSignature.read(directory)
    try:
        key.verify(found.signature, signed_bytes(manifest, found.version))
    except InvalidSignature as error:
        own = fingerprint(raw_bytes(key))
        reason = (
            "its manifest was altered after it was signed"
            if found.key == own
            else f"it was signed with the key {found.key[:16]}…, and the one given is {own[:16]}…"
        )
        raise SignatureError(f"{directory}: {reason}", remedy=_REMEDY) from error
    if min_version is not None and (found.version is None or found.version < min_version):
        version = "no version" if found.version is None else f"version {found.version}"
        raise SignatureError(
            f"{directory}: it has {version}, and version {min_version} or later is asked for",
            remedy="Take the current release from its owner.",
        )
    return found.version


def check_files(bundle: Bundle) -> None:
    """Raises SignatureError if a file differs from the manifest, or is not named there."""
    if problems := bundle.problems():
        raise SignatureError(f"{bundle.path}: {'; '.join(problems[:3])}", remedy=_REMEDY)
