"""Tests of `delta` and `apply`: the new bundle comes out whole, or nothing changes."""

from __future__ import annotations

import errno
import json
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backports
import backports.zstd
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.cli.dispatch import main
from edgellama.commands.delta import apply, delta
from edgellama.commands.sign import sign, verify
from edgellama.errors import (
    BundleError,
    EdgellamaError,
    InputError,
    MissingDependencyError,
    ResourceError,
    SignatureError,
)
from edgellama.release import delta_pieces
from tests.helpers.keys import write_pair
from tests.helpers.paths import VECTORS

SIZE = 300_000  # bytes of the artifact


def content(bundle: Path) -> dict[str, bytes]:
    return {f.relative_to(bundle).as_posix(): f.read_bytes() for f in bundle.rglob("*") if f.is_file()}


def rewritten(bundle: Path, **changes: Any) -> Path:
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("schema", "files")} | changes)
    return bundle


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The bundle of the vectors with an artifact of random bytes."""
    path = Path(shutil.copytree(VECTORS / "bundle", tmp_path / "old.edgellama"))
    (path / "xnnpack/model.pte").write_bytes(random.Random(1).randbytes(SIZE))
    (path / "same.bin").write_bytes(random.Random(2).randbytes(SIZE))
    (path / "short.txt").write_text("old")  # shorter than any prefix of zstd
    return rewritten(path)


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """Another release: every seventh byte of the artifact differs, a file moved, came or went."""
    path = Path(shutil.copytree(old, tmp_path / "new.edgellama"))
    artifact = bytearray((path / "xnnpack/model.pte").read_bytes())
    artifact[::7] = bytes((b + 1) % 256 for b in artifact[::7])
    (path / "xnnpack/model.pte").write_bytes(artifact)
    (path / "same.bin").rename(path / "moved.bin")
    (path / "short.txt").write_text("new and longer")
    (path / "extra").mkdir()
    (path / "extra/empty.bin").write_bytes(b"")
    (path / "extra/new.txt").write_text("new")
    return rewritten(path, name="new")


def test_only_changes_are_in_it_and_the_new_bundle_comes_out(old: Path, new: Path, tmp_path: Path) -> None:
    file, again = tmp_path / "update.delta", tmp_path / "again.delta"
    summary = delta(old, new, file)
    delta(old, new, again)
    assert file.read_bytes() == again.read_bytes(), "the same bytes every time"
    rows = {row["path"]: row for row in summary["files"]}
    assert rows.keys() == {
        *("manifest.json", "xnnpack/model.pte", "extra/empty.bin", "extra/new.txt", "short.txt"),
    }
    assert rows["xnnpack/model.pte"]["methods"] == ["difference"]
    assert rows["xnnpack/model.pte"]["data"] < SIZE / 20
    assert summary["bytes"] == file.stat().st_size < SIZE / 10
    apply(old, file, tmp_path / "made.edgellama")
    assert content(tmp_path / "made.edgellama") == content(new)
    before = content(old)
    apply(old, file, old, force=True)
    assert content(old) == content(new) != before, "in place"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("again.delta", "made.edgellama", "new.edgellama", "old.edgellama", "update.delta"),
    ]


@pytest.mark.parametrize(
    ("change", "method"),
    [
        (lambda data: data[:1000] + b"inserted" * 10 + data[1000:], "patch"),
        (lambda data: random.Random(3).randbytes(SIZE // 100) + data, "difference-end"),
        (lambda data: data[:50_000] + data[60_000:], "patch"),
        (lambda _: bytes(SIZE), "whole"),
        (lambda data: b"head" + bytes((b + i % 2) % 256 for i, b in enumerate(data)), "difference-end"),
    ],
    ids=["insertion", "another head", "shorter", "nothing in common", "a longer head and other values"],
)
def test_each_kind_of_change_has_its_method(
    change: Callable[[bytes], bytes], method: str, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Path(shutil.copytree(old, tmp_path / "new.edgellama"))
    (new / "xnnpack/model.pte").write_bytes(change((old / "xnnpack/model.pte").read_bytes()))
    rewritten(new)
    for piece in (delta_pieces.PIECE, 1 << 17):  # one piece, and several that see a part of the old file
        monkeypatch.setattr(delta_pieces, "PIECE", piece)
        monkeypatch.setattr(delta_pieces, "PREFIX", 3 * piece)
        file, made = tmp_path / f"{piece}.delta", tmp_path / f"{piece}.edgellama"
        rows = {row["path"]: row for row in delta(old, new, file)["files"]}
        assert method in rows["xnnpack/model.pte"]["methods"]
        assert file.stat().st_size < SIZE / 6
        apply(old, file, made)
        assert content(made) == content(new)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    header, rest = header_of(data)
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "no delta": lambda d: b"PK\x03\x04" + d,
    "truncated": lambda d: d[:-5],
    "cut header": lambda d: d[:100],
    "longer": lambda d: d + b"x",
    "a flipped bit at the end": lambda d: flipped(d, len(d) - 3),
    "a flipped bit in the middle": lambda d: flipped(d, len(d) - 900),
    "another schema": lambda d: with_header(d, lambda h: h.update(schema="edgellama.delta/2")),
    "a file outside": lambda d: with_header(d, lambda h: h["files"][1].update(path="../outside")),
    "a file twice": lambda d: with_header(d, lambda h: h["files"].append(h["files"][1])),
    "an old file outside": lambda d: with_header(d, lambda h: h["files"][-1].update({"from": "../../x"})),
    "no manifest": lambda d: with_header(d, lambda h: h["files"].pop(0)),
    "a missing file": lambda d: with_header(d, lambda h: h["files"].pop()),
    "another place": lambda d: with_header(d, lambda h: h["files"][-1]["pieces"][0].update(start=10**9)),
    "a longer piece": lambda d: with_header(d, lambda h: h["files"][-1]["pieces"][0].update(bytes=1 << 25)),
    "a short prefix": lambda d: with_header(
        d, lambda h: h["files"][0]["pieces"][0].update(method="patch", start=0, length=3)
    ),
    "no old file": lambda d: with_header(d, lambda h: h["files"][0].update({"from": None})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_delta_changes_nothing(name: str, old: Path, new: Path, tmp_path: Path) -> None:
    file = tmp_path / "update.delta"
    delta(old, new, file)
    file.write_bytes(DAMAGES[name](file.read_bytes()))
    before = content(old)
    for output in (tmp_path / "made.edgellama", old):
        with pytest.raises(EdgellamaError) as caught:
            apply(old, file, output, force=True)
        assert caught.value.exit_code == 2 and caught.value.remedy
    assert content(old) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.edgellama", "old.edgellama", "update.delta"]


def test_a_wrong_or_damaged_base_is_refused(old: Path, new: Path, tmp_path: Path) -> None:
    file = tmp_path / "update.delta"
    delta(old, new, file)
    with pytest.raises(InputError, match="made for another bundle, named 'vectors'"):
        apply(new, file, tmp_path / "made.edgellama")
    (old / "same.bin").write_bytes(bytes(SIZE))
    with pytest.raises(BundleError, match="is not the file that was exported"):
        apply(old, file, tmp_path / "made.edgellama")
    with pytest.raises(BundleError, match="is not the file that was exported"):
        delta(old, new, tmp_path / "other.delta")
    assert not (tmp_path / "other.delta").exists() and not (tmp_path / "made.edgellama").exists()


def test_a_full_disk_changes_nothing(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "update.delta"
    delta(old, new, file)
    before = content(old)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ResourceError, match="MB of the disk are free"):
            apply(old, file, old, force=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            apply(old, file, old, force=True)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            delta(old, new, tmp_path / "other.delta")
    assert content(old) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.edgellama", "old.edgellama", "update.delta"]


def test_signatures_travel_and_are_asked_for(old: Path, new: Path, tmp_path: Path) -> None:
    private, public = write_pair(tmp_path, "ours", ed25519.Ed25519PrivateKey.generate())
    _, other = write_pair(tmp_path, "theirs", ed25519.Ed25519PrivateKey.generate())
    sign(old, keys=[private], version=1)
    file, made = tmp_path / "update.delta", tmp_path / "made.edgellama"
    delta(old, new, file)
    with pytest.raises(SignatureError, match="not signed"):
        apply(old, file, made, key=public)
    sign(new, keys=[private], version=2)
    delta(old, new, file, force=True)
    with pytest.raises(SignatureError, match="it was signed with the key"):
        apply(old, file, made, key=other)
    assert not made.exists()
    apply(old, file, made, key=public)
    assert [s.version for s in verify(made, keys=[public])] == [2]


def test_the_command_line(
    old: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made = str(tmp_path / "update.delta"), str(tmp_path / "made.edgellama")
    assert main(["delta", str(old), str(new), "-o", file, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["files"] and "of the new bundle" in captured.err
    assert main(["delta", str(old), str(new), "-o", file]) == 2
    assert main(["delta", str(old), str(new), "-o", str(old / "x.delta")]) == 2
    assert main(["apply", str(old), file, "-o", made]) == 0
    assert main(["apply", str(old), file, "-o", made]) == 2
    assert main(["apply", str(old), str(tmp_path / "none.delta"), "-o", made, "--force"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.delattr(backports, "zstd")
    with pytest.raises(MissingDependencyError) as caught:
        delta(old, new, tmp_path / "other.delta")
    assert caught.value.remedy == "pip install 'edgellama[delta]'"
