"""Verbs `sign` and `verify`: signatures of a bundle, of its manifest and by OpenSSF Model Signing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, MANIFEST_SIGNATURE, MODEL_SIGNATURE
from edgellama.bundle.publish import claimed, sync, work_directory
from edgellama.errors import BundleError, UsageError
from edgellama.release.keys import fingerprint, is_ed25519, raw_bytes, read_private_key, read_public_key
from edgellama.release.model_signature import ModelSigner, ModelVerifier
from edgellama.release.signature import ManifestSignature, verify_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SCHEMA = "edgellama.signatures/1"
_ONE = "Give one Ed25519 key, one key of an elliptic curve, or one of each."


@dataclass(frozen=True)
class Signature:
    """A signature that was written or verified.

    Attributes:
        file: its file in the bundle.
        signer: what signed it, in words.
        version: version of the release under the manifest's signature.
        app_key: public key that an app is built with, 64 hexadecimal digits; None for OpenSSF's format.
    """

    file: str
    signer: str
    version: int | None = None
    app_key: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "signer": self.signer,
            "version": self.version,
            "app_key": self.app_key,
        }

    def describe(self) -> str:
        """One line: the file, its signer and the version.

        >>> Signature("signature.json", "an Ed25519 key", 3).describe()
        'signature.json: signed with an Ed25519 key, version 3'
        """
        version = "" if self.version is None else f", version {self.version}"
        return f"{self.file}: signed with {self.signer}{version}"


def signatures_data(signatures: Sequence[Signature]) -> dict[str, Any]:
    """The signatures as JSON data (schema `SCHEMA`)."""
    return {"schema": SCHEMA, "signatures": [signature.to_dict() for signature in signatures]}


def sign(
    path: str | Path,
    *,
    keys: Sequence[Path],
    version: int | None = None,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
    sigstore: bool = False,
    passphrase: Callable[[Path], str] | None = None,
) -> list[Signature]:
    """Signs the bundle at `path`, and returns the signatures.

    An Ed25519 key signs the manifest (`signature.json`, for the apps). A key of an elliptic curve signs by
    OpenSSF Model Signing (`model.sig`). A signature replaces an older one of its kind.

    Args:
        keys: PEM files of private keys.
        version: version of the release, under the manifest's signature.
        certificate, chain: PEM files of the certificate of the elliptic key, and of those above it. The format
            needs at least one above.
        sigstore: sign `model.sig` as an identity of sigstore, which needs the network.
        passphrase: asked for the passphrase of an encrypted key.

    Raises BundleError for a bundle that is damaged, and InputError or UsageError for keys.
    """
    secrets: dict[Path, str] = {}

    def asked(file: Path) -> str:
        assert passphrase is not None
        return secrets.setdefault(file, passphrase(file))

    private = {key: read_private_key(key, asked if passphrase else None) for key in keys}
    manifest_keys, model_keys = _by_kind(private)
    if len(manifest_keys) > 1 or len(model_keys) + sigstore > 1:
        raise UsageError("several keys for one signature", remedy=_ONE)
    if not private and not sigstore:
        raise UsageError("no key to sign with", remedy="Give one with --key.")
    if version is not None and not manifest_keys:
        raise UsageError("a version needs the manifest's signature", remedy="Give an Ed25519 key too.")
    if certificate is not None and not model_keys:
        raise UsageError("a certificate needs its private key", remedy="Give it with --key.")
    if (certificate is None) == bool(chain):
        raise UsageError(
            "a certificate and the ones above it belong together", remedy="Give --certificate and --chain."
        )
    if certificate is not None and model_keys[0] in secrets:
        raise UsageError(
            f"{model_keys[0]}: the key of a certificate cannot be encrypted here",
            remedy="Give it without a passphrase, or sign with the key alone.",
        )
    bundle = _sound(path)
    written = []
    if manifest_keys:
        key = cast("Ed25519PrivateKey", private[manifest_keys[0]])
        signature = ManifestSignature.of((bundle.path / MANIFEST).read_bytes(), key, version)
        _write(bundle, MANIFEST_SIGNATURE, lambda f: _write_text(f, signature.to_json()))
        written.append(_manifest_signature(key.public_key(), version))
    if model_keys or sigstore:
        model_key = model_keys[0] if model_keys else None
        secret = None if model_key is None else secrets.get(model_key)
        signer = ModelSigner(model_key, secret, certificate, tuple(chain))
        _write(bundle, MODEL_SIGNATURE, lambda file: signer.write(bundle, file))
        written.append(Signature(MODEL_SIGNATURE, f"{certificate or model_key or 'an identity of sigstore'}"))
    return written


def verify(
    path: str | Path,
    *,
    keys: Sequence[Path] = (),
    min_version: int | None = None,
    chain: Sequence[Path] = (),
    identity: tuple[str, str] | None = None,
) -> list[Signature]:
    """Verifies signatures of the bundle at `path` and the hash of every file, and returns them.

    Args:
        keys: PEM files of public keys; each must have signed.
        min_version: smallest version of the release, for an Ed25519 key.
        chain: PEM files of certificates that are trusted, for `model.sig`.
        identity: identity and issuer of sigstore, for `model.sig`. It needs the network.

    Raises SignatureError for a bundle that was not signed so, BundleError if there is none, and InputError
    or UsageError for keys.
    """
    public = {key: read_public_key(key) for key in keys}
    manifest_keys, model_keys = _by_kind(public)
    if not keys and not chain and identity is None:
        raise UsageError("nothing to verify the bundle with", remedy="Give a public key with --key.")
    if min_version is not None and not manifest_keys:
        raise UsageError(
            "only the manifest's signature has a version", remedy="Give its Ed25519 key with --key."
        )
    directory, found = Path(path), []
    for file in manifest_keys:
        key = cast("Ed25519PublicKey", public[file])
        _, version = verify_manifest(directory, key, min_version=min_version)
        found.append(_manifest_signature(key, version))
    verifiers = [(ModelVerifier(key=key), str(key)) for key in model_keys]
    if chain:
        verifiers.append(
            (ModelVerifier(chain=tuple(chain)), f"a certificate below {', '.join(map(str, chain))}")
        )
    if identity is not None:
        verifiers.append((ModelVerifier(identity=identity), f"{identity[0]} of {identity[1]}"))
    for verifier, signer in verifiers:
        verifier.verify(Bundle.open(directory))
        found.append(Signature(MODEL_SIGNATURE, signer))
    return found


def _by_kind(keys: dict[Path, Any]) -> tuple[list[Path], list[Path]]:
    """Files of Ed25519 keys, and of keys of elliptic curves."""
    ed25519 = [file for file, key in keys.items() if is_ed25519(key)]
    return ed25519, [file for file in keys if file not in ed25519]


def _manifest_signature(key: Ed25519PublicKey, version: int | None) -> Signature:
    raw = raw_bytes(key)
    signer = f"the Ed25519 key {fingerprint(raw)[:16]}…"
    return Signature(MANIFEST_SIGNATURE, signer, version, raw.hex())


def _sound(path: str | Path) -> Bundle:
    """The bundle at `path`, with its links resolved. Raises BundleError if a file is missing or altered."""
    bundle = Bundle.open(Path(path).resolve())
    if problems := bundle.problems():
        raise BundleError(
            f"{bundle.path}: {'; '.join(problems[:3])}",
            remedy="Export it again. Only a whole bundle is signed.",
        )
    return bundle


def _write(bundle: Bundle, name: str, write: Callable[[Path], None]) -> None:
    """Puts a file into a bundle in one step. An export that writes to the bundle is waited for by the user."""
    with claimed(bundle.path, force=True):
        temporary = work_directory(bundle.path) / "tmp" / name
        write(temporary)
        sync(temporary.parent)
        os.replace(temporary, bundle.path / name)
        sync(bundle.path)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
