"""Tests of `sign` and `verify`: what is accepted, what is refused, and what a signature leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.cli.dispatch import main
from edgellama.commands.sign import sign, verify
from edgellama.errors import (
    BundleError,
    EdgellamaError,
    InputError,
    MissingDependencyError,
    SignatureError,
    UsageError,
)
from edgellama.release.signature import ManifestSignature
from tests.helpers.keys import certificate, write_pair
from tests.helpers.paths import VECTORS


@dataclass(frozen=True)
class Keys:
    """Files of an Ed25519 key, a key of a curve, another Ed25519 key, and certificates."""

    ed25519: tuple[Path, Path]
    curve: tuple[Path, Path]
    other: tuple[Path, Path]
    certificate: Path
    root: Path
    other_root: Path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    curve, root, other_root = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    files = {
        "cert": certificate("signer", curve, ("root", root)),
        "root": certificate("root", root),
        "other": certificate("root", other_root),
    }
    for name, content in files.items():
        (folder / f"{name}.crt").write_bytes(content)
    return Keys(
        write_pair(folder, "ours", ed25519.Ed25519PrivateKey.generate()),
        write_pair(folder, "curve", curve),
        write_pair(folder, "theirs", ed25519.Ed25519PrivateKey.generate()),
        *(folder / f"{name}.crt" for name in files),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VECTORS / "bundle", tmp_path / "app.edgellama"))


@pytest.fixture
def signed(bundle: Path, keys: Keys) -> Path:
    sign(bundle, keys=[keys.ed25519[0], keys.curve[0]], version=3)
    return bundle


def test_both_kinds_verify_and_the_bundle_stays_as_it_was(bundle: Path, keys: Keys) -> None:
    before = {f: f.read_bytes() for f in bundle.rglob("*") if f.is_file()}
    private = [keys.ed25519[0], keys.curve[0]]
    assert [s.file for s in sign(bundle, keys=private, version=3)] == ["signature.json", "model.sig"]
    first = (bundle / "signature.json").read_bytes()
    sign(bundle, keys=private, version=3)
    assert (bundle / "signature.json").read_bytes() == first, "the same bytes every time"
    found = verify(bundle, keys=[keys.ed25519[1], keys.curve[1]], min_version=3)
    assert [s.version for s in found] == [3, None]
    assert {f: f.read_bytes() for f in before} == before
    assert Bundle.open(bundle).problems() == []
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name], "no temporary files"
    assert str(bundle.parent).encode() not in (bundle / "model.sig").read_bytes(), "no paths of this machine"
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("schema", "files")})
    assert (bundle / "manifest.json").read_bytes() == before[bundle / "manifest.json"], (
        "no signature is listed"
    )


def test_the_packages_own_command_accepts_the_signature(signed: Path, keys: Keys) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "model_signing", "verify", "key", str(signed)]
    options = ["--signature", str(signed / "model.sig"), "--public_key", str(keys.curve[1])]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def alter_file(bundle: Path) -> None:
    data = bytearray((bundle / "xnnpack/model.pte").read_bytes())
    data[3] ^= 1
    (bundle / "xnnpack/model.pte").write_bytes(data)


def alter_manifest(bundle: Path) -> None:
    """An altered file with its hash in the manifest, so that the bundle is consistent."""
    alter_file(bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("schema", "files")})
    assert Bundle.open(bundle).problems() == []


def add_file(bundle: Path) -> None:
    (bundle / "extra.txt").write_text("more")


def sign_by_another(bundle: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    own = ManifestSignature.read(bundle)
    made = ManifestSignature.of((bundle / "manifest.json").read_bytes(), key, own.version)
    (bundle / "signature.json").write_text(made.to_json())


def raise_version(bundle: Path) -> None:
    data = json.loads((bundle / "signature.json").read_text())
    (bundle / "signature.json").write_text(json.dumps(data | {"version": 9}))


def drop_version(bundle: Path) -> None:
    data = json.loads((bundle / "signature.json").read_text())
    (bundle / "signature.json").write_text(json.dumps(data | {"version": None}))


def remove_signatures(bundle: Path) -> None:
    (bundle / "signature.json").unlink()
    (bundle / "model.sig").unlink()


@pytest.mark.parametrize(
    ("alter", "manifest_words", "model_words"),
    [
        (alter_file, "is not the file that was exported", "Hash mismatch"),
        (alter_manifest, "its manifest was altered", "Hash mismatch"),
        (add_file, "not named in the manifest", "Extra files"),
        (sign_by_another, "it was signed with the key", None),
        (raise_version, "its manifest was altered", None),
        (drop_version, "its manifest was altered", None),
        (remove_signatures, "not signed", "not signed"),
    ],
)
def test_an_altered_bundle_is_refused(
    alter: Callable[[Path], None], manifest_words: str, model_words: str | None, signed: Path, keys: Keys
) -> None:
    alter(signed)
    with pytest.raises(SignatureError, match=manifest_words):
        verify(signed, keys=[keys.ed25519[1]])
    if model_words is None:
        verify(signed, keys=[keys.curve[1]])
    else:
        with pytest.raises(SignatureError, match=model_words):
            verify(signed, keys=[keys.curve[1]])


def test_another_key_and_an_older_version_are_refused(signed: Path, keys: Keys) -> None:
    with pytest.raises(SignatureError, match="it was signed with the key"):
        verify(signed, keys=[keys.other[1]])
    with pytest.raises(SignatureError, match="it has version 3, and version 4 or later"):
        verify(signed, keys=[keys.ed25519[1]], min_version=4)
    sign(signed, keys=[keys.ed25519[0]])
    with pytest.raises(SignatureError, match="no version"):
        verify(signed, keys=[keys.ed25519[1]], min_version=0)


def test_certificates(bundle: Path, keys: Keys) -> None:
    sign(bundle, keys=[keys.curve[0]], certificate=keys.certificate, chain=[keys.root])
    verify(bundle, chain=[keys.root])
    with pytest.raises(SignatureError):
        verify(bundle, chain=[keys.other_root])
    with pytest.raises(InputError, match="does not match"):
        other, _ = write_pair(bundle.parent, "other", ec.generate_private_key(ec.SECP256R1()))
        sign(bundle, keys=[other], certificate=keys.certificate, chain=[keys.root])
    verify(bundle, chain=[keys.root])  # a failure leaves the older signature


def test_an_encrypted_key_asks_once(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())):
        private, public = write_pair(tmp_path, "secret", key, b"open sesame")
        asked: list[Path] = []

        def ask(file: Path, asked: list[Path] = asked) -> str:
            asked.append(file)
            return "open sesame"

        sign(bundle, keys=[private], passphrase=ask)
        verify(bundle, keys=[public])
        assert asked == [private]
        with pytest.raises(InputError, match="cannot be read"):
            sign(bundle, keys=[private], passphrase=lambda _: "wrong")
        with pytest.raises(UsageError, match="nobody can be asked"):
            sign(bundle, keys=[private])


def test_keys_and_options_that_do_not_fit_are_refused(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    koblitz = write_pair(tmp_path, "koblitz", ec.generate_private_key(ec.SECP256K1()))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: sign(bundle, keys=[keys.ed25519[1]]), "not a private key"),
        (lambda: sign(bundle, keys=[tmp_path / "none.pem"]), "No such file"),
        (lambda: sign(bundle, keys=[koblitz[0]]), "neither an Ed25519 key"),
        (lambda: sign(bundle, keys=[keys.ed25519[0], keys.other[0]]), "several keys"),
        (lambda: sign(bundle, keys=[keys.curve[0]], sigstore=True), "several keys"),
        (lambda: sign(bundle, keys=[]), "no key to sign with"),
        (lambda: sign(bundle, keys=[keys.curve[0]], version=1), "a version needs"),
        (lambda: sign(bundle, keys=[keys.ed25519[0]], certificate=keys.certificate), "needs its private key"),
        (lambda: sign(bundle, keys=[keys.curve[0]], certificate=keys.certificate), "belong together"),
        (lambda: verify(bundle, keys=[keys.ed25519[0]]), "stays with its owner"),
        (lambda: verify(bundle, keys=[junk]), "cannot be read"),
        (lambda: verify(bundle), "nothing to verify"),
        (lambda: verify(bundle, keys=[keys.curve[1]], min_version=1), "only the manifest's signature"),
    ]
    for action, words in refused:
        with pytest.raises(EdgellamaError, match=words) as caught:
            action()
        assert caught.value.exit_code == 2 and caught.value.remedy
    alter_file(bundle)
    with pytest.raises(BundleError, match="is not the file"):
        sign(bundle, keys=[keys.ed25519[0]])
    assert not (bundle / "signature.json").exists()


def test_only_small_plain_files_count_as_signatures(signed: Path) -> None:
    os.truncate(signed / "model.sig", 2 << 20)
    (signed / "signature.json").unlink()
    (signed / "signature.json").symlink_to("manifest.json")
    (signed / "golden/model.sig").write_text("elsewhere")
    assert set(Bundle.open(signed).problems_by_file()) == {"model.sig", "signature.json", "golden/model.sig"}


def test_the_command_line(
    bundle: Path, keys: Keys, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--key", str(keys.ed25519[0]), "--version", "7", "--json", "-"]
    assert main(["sign", str(bundle), *options]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["signatures"]
    assert row["version"] == 7 and row["app_key"] in err
    public = ["--key", str(keys.ed25519[1])]
    assert main(["verify", str(bundle), *public, "--min-version", "7"]) == 0
    assert main(["verify", str(bundle), *public, "--min-version", "8"]) == 1
    assert main(["verify", str(bundle), "--key", str(keys.other[1])]) == 1
    assert main(["verify", str(bundle), *public, "--identity", "me"]) == 2
    assert main(["sign", str(bundle), "--key", str(keys.ed25519[0]), "--version", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_package_names_its_extra(bundle: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, key in (
        ("cryptography.hazmat.primitives", keys.ed25519[0]),
        ("model_signing", keys.curve[0]),
    ):
        with monkeypatch.context() as patch, pytest.raises(MissingDependencyError) as caught:
            patch.setitem(sys.modules, module, None)
            sign(bundle, keys=[key])
        assert caught.value.remedy == "pip install 'edgellama[sign]'"
