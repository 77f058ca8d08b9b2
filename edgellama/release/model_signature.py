"""Signature by the OpenSSF Model Signing format, written and verified by its own package, `model-signing`.

It lies in the bundle as `model.sig`, the name of the format. It lists the sha256 of every file of the bundle
besides the signatures, and `model_signing verify` of the package accepts it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MODEL_SIGNATURE, SIGNATURES
from edgellama.errors import InputError, SignatureError
from edgellama.files import is_left_by_a_file_manager
from edgellama.release.extras import extra
from edgellama.release.signature import check_files


@dataclass(frozen=True)
class ModelSigner:
    """A way to sign: with a private key, with a certificate and its key, or as an identity of sigstore.

    Attributes:
        key: PEM file of the private key; None for sigstore, which needs the network.
        passphrase: of an encrypted key.
        certificate: PEM file of the certificate of that key; None to sign with the key alone.
        chain: PEM files of the certificates between it and its root.
    """

    key: Path | None
    passphrase: str | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()

    def write(self, bundle: Bundle, file: Path) -> None:
        """Signs the files of a bundle. Raises InputError with the reason of the package."""
        with extra("sign", purpose="OpenSSF Model Signing"):
            from model_signing import signing

        def sign() -> None:
            config = signing.Config().set_hashing_config(_hashing(bundle.path))
            if self.key is None:
                config.use_sigstore_signer(use_ambient_credentials=True)
            elif self.certificate is None:
                # The package passes it to cryptography, which takes bytes.
                secret: Any = None if self.passphrase is None else self.passphrase.encode()
                config.use_elliptic_key_signer(private_key=self.key, password=secret)
            else:
                config.use_certificate_signer(
                    private_key=self.key, signing_certificate=self.certificate, certificate_chain=self.chain
                )
            config.sign(bundle.path, file)

        _call(sign, lambda reason: InputError(f"{bundle.path}: cannot be signed: {reason}", remedy=_CHECK))


@dataclass(frozen=True)
class ModelVerifier:
    """A way to verify: with a public key, with the roots of certificates, or as an identity of sigstore.

    Attributes:
        key: PEM file of the public key.
        chain: PEM files of the certificates that are trusted.
        identity: identity and issuer that sigstore must name.
    """

    key: Path | None = None
    chain: tuple[Path, ...] = ()
    identity: tuple[str, str] | None = None

    def verify(self, bundle: Bundle) -> None:
        """Raises SignatureError if model.sig is missing, of somebody else, or of other files."""
        with extra("sign", purpose="OpenSSF Model Signing"):
            from model_signing import verifying
        file = bundle.path / MODEL_SIGNATURE
        if file.is_symlink() or not file.is_file():
            raise SignatureError(
                f"{bundle.path}: not signed by this format (no {MODEL_SIGNATURE})",
                remedy="Sign it with `edgellama sign`, or take it from its owner again.",
            )

        def verify() -> None:
            config = verifying.Config().set_hashing_config(_hashing(bundle.path))
            if self.identity is not None:
                identity, issuer = self.identity
                config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
            elif self.key is not None:
                config.use_elliptic_key_verifier(public_key=self.key)
            else:
                config.use_certificate_verifier(certificate_chain=self.chain)
            config.verify(bundle.path, file)

        _call(verify, lambda reason: SignatureError(f"{bundle.path}: {reason}", remedy=_CHECK))
        check_files(bundle)  # a signature may name paths to leave out


_CHECK = "Check the key or the certificates, or take the bundle from its owner again."


def _hashing(directory: Path) -> Any:
    with extra("sign", purpose="OpenSSF Model Signing"):
        from model_signing import hashing
    # Relative, because the signature records them.
    litter = [f.relative_to(directory) for f in directory.rglob("*") if is_left_by_a_file_manager(f)]
    ignored: Sequence[Path] = [*map(Path, SIGNATURES), *litter]
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _call(action: Callable[[], None], error_of: Callable[[str], Exception]) -> None:
    """Runs the package, which raises exceptions of many libraries, and gives its reason to `error_of`."""
    try:
        action()
    except Exception as error:
        raise error_of(str(error) or f"the signature does not match ({type(error).__name__})") from error
