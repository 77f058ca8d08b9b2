"""Keys of signatures, in PEM files: Ed25519 for the manifest's signature, NIST curves for OpenSSF's format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgellama.errors import InputError, UsageError
from edgellama.release.extras import extra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
    PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those of OpenSSF Model Signing
LONGEST = 1 << 16  # bytes of a key's file
_MAKE = "Make one with: openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_PUBLIC = "Take it from the private key with: openssl pkey -in key.pem -pubout -out key.pub.pem"


def read_private_key(path: Path, passphrase: Callable[[Path], str] | None = None) -> PrivateKey:
    """The private key in a PEM file: Ed25519, or an elliptic curve of CURVES.

    passphrase: asked for the passphrase of an encrypted key, with its path. Raises InputError and UsageError.
    """
    with extra("sign", purpose="a signature"):
        from cryptography.hazmat.primitives import serialization
    data = _read(path)
    if b"PRIVATE KEY-----" not in data:
        raise UsageError(f"{path}: not a private key in PEM form", remedy=_MAKE)
    secret = None
    if b"-----BEGIN ENCRYPTED" in data or b"Proc-Type: 4,ENCRYPTED" in data:
        if passphrase is None:
            raise UsageError(
                f"{path}: the key is encrypted, and nobody can be asked for its passphrase",
                remedy="Run the command in a terminal, or give a key without a passphrase.",
            )
        secret = passphrase(path).encode()
    try:
        key = cast("PrivateKey", serialization.load_pem_private_key(data, secret))
    except Exception as error:
        raise InputError(f"{path}: the private key cannot be read ({error})", remedy=_MAKE) from error
    _check_kind(key.public_key(), path, _MAKE)
    return key


def read_public_key(path: Path) -> PublicKey:
    """The public key in a PEM file. Raises InputError and UsageError."""
    with extra("sign", purpose="a signature"):
        from cryptography.hazmat.primitives import serialization
    data = _read(path)
    if b"-----BEGIN PUBLIC KEY-----" not in data:
        private = " but a private key, which stays with its owner" if b"PRIVATE KEY-----" in data else ""
        raise UsageError(f"{path}: not a public key in PEM form{private}", remedy=_MAKE_PUBLIC)
    try:
        key = cast("PublicKey", serialization.load_pem_public_key(data))
    except Exception as error:
        raise InputError(f"{path}: the public key cannot be read ({error})", remedy=_MAKE_PUBLIC) from error
    _check_kind(key, path, _MAKE_PUBLIC)
    return key


def is_ed25519(key: PrivateKey | PublicKey) -> bool:
    """True for a key of the manifest's signature, False for one of OpenSSF Model Signing."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    return isinstance(key, (Ed25519PrivateKey, Ed25519PublicKey))


def raw_bytes(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key, which an app is built with in hexadecimal."""
    return key.public_bytes_raw()


def fingerprint(raw: bytes) -> str:
    """sha256 of the raw public key, which a signature names as its key."""
    return hashlib.sha256(raw).hexdigest()


def _check_kind(key: object, path: Path, remedy: str) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if isinstance(key, Ed25519PublicKey) or (
        isinstance(key, EllipticCurvePublicKey) and key.curve.name in CURVES
    ):
        return
    raise UsageError(
        f"{path}: neither an Ed25519 key nor one of the curves {', '.join(CURVES)}", remedy=remedy
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LONGEST)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", remedy="Check the path of the key.") from error
