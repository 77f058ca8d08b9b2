"""Faults for bundles: a copy is altered, and its hashes are made to fit again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.record import FILE as RECORD
from edgellama.files import to_json


def copied(bundle: Path, to: Path) -> Path:
    """A copy of a bundle that may be altered."""
    return Path(shutil.copytree(bundle, to))


def edit_json(file: Path, *keys: str | int, value: Any) -> None:
    """Sets the value at `keys` in a JSON file."""
    data = json.loads(file.read_text(encoding="utf-8"))
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(to_json(data), encoding="utf-8")


def flip_bit(file: Path, at: float = 0.5) -> None:
    """Flips a bit of the byte at a share `at` of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 1
    file.write_bytes(content)


def refreshed(bundle: Path, *, record: bool = False) -> Bundle:
    """Makes the manifest's hashes fit the files again, and with `record` those in build.json too."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    manifest.pop("files")
    opened = write_manifest(bundle, manifest)
    if record:
        hashes = {n: entry["sha256"] for n, entry in opened.manifest["files"].items() if n != RECORD}
        edit_json(bundle / RECORD, "files", value=hashes)
        opened = write_manifest(bundle, manifest)
    return opened
