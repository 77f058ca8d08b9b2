"""Copies of a sound bundle in which one thing is altered and every hash fits again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.golden import FILE as GOLDEN
from edgellama.files import digest, to_json
from edgellama.targets import find_target

Alter = Callable[[Path], None]


def altered(bundle: Bundle, directory: Path, alter: Alter) -> Bundle:
    """A copy of `bundle` after `alter(copy)`, with the hashes of its files and of its manifest as an attacker leaves them.

    Artifacts get the hash of the altered manifest, so that nothing but the altered fact itself is wrong.
    """
    copy = directory / "altered.edgellama"
    shutil.copytree(bundle.path, copy)
    old = {name: find_target(name).provenance(bundle.manifest).manifest_sha256 for name in bundle.targets}
    alter(copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    for name in bundle.targets:
        target = find_target(name)
        new = target.provenance(manifest).manifest_sha256
        _replace(target.artifact_in(copy), {old[name]: new, old[name][:12]: new[:12]})
        entries = json.dumps(manifest["artifacts"]).replace(old[name], new)
        manifest["artifacts"] = json.loads(entries)
    _refresh_hashes(Bundle(copy, manifest))
    del manifest["files"]
    return write_manifest(copy, manifest)


def edit_json(file: Path, edit: Callable[[Any], object]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    edit(data)
    file.write_text(to_json(data), encoding="utf-8")


def edit_manifest(edit: Callable[[Any], object]) -> Alter:
    return lambda bundle: edit_json(bundle / MANIFEST, edit)


def edit_file(name: str, edit: Callable[[Any], object]) -> Alter:
    """Alters a JSON file of the bundle. A record of the build gets its own hash again."""

    def alter(bundle: Path) -> None:
        edit_json(bundle / name, edit)
        if name.endswith("build.json"):
            edit_json(bundle / name, lambda data: data.update(key=digest(data["inputs"])))

    return alter


def write(name: str, content: str | bytes) -> Alter:
    """Writes a file of the bundle."""
    data = content.encode() if isinstance(content, str) else content

    def alter(bundle: Path) -> None:
        (bundle / name).write_bytes(data)

    return alter


def edit_array(name: str, edit: Callable[[np.ndarray], object], dtype: str = "float32") -> Alter:
    """Alters an array of the golden vectors in place, as [positions, columns]."""

    def alter(bundle: Path) -> None:
        entry = json.loads((bundle / GOLDEN).read_text(encoding="utf-8"))["arrays"][name]
        file = bundle / "golden" / entry["file"]
        array = np.frombuffer(file.read_bytes(), dtype).reshape(entry["shape"]).copy()
        edit(array)
        file.write_bytes(array.tobytes())

    return alter


def _replace(artifact: Path, changes: dict[str, str]) -> None:
    for file in [artifact] if artifact.is_file() else artifact.rglob("*"):
        if file.suffix in (".pte", ".onnx", ".mlmodel", ".safetensors"):
            content = file.read_bytes()
            for old, new in changes.items():
                content = content.replace(old.encode(), new.encode())
            file.write_bytes(content)


def _refresh_hashes(bundle: Bundle) -> None:
    """Hashes of arrays and artifacts in golden.json, and of artifacts in their reports."""
    directory = bundle.path / "golden"
    data = json.loads((directory / "golden.json").read_text(encoding="utf-8"))
    before = to_json(data)
    for entry in data["arrays"].values():
        entry["sha256"] = hashlib.sha256((directory / entry["file"]).read_bytes()).hexdigest()
    manifest = {k: v for k, v in bundle.manifest.items() if k != "files"}
    now = write_manifest(bundle.path, manifest)
    for name in now.targets:
        old, new = bundle.artifact_sha256(name), now.artifact_sha256(name)
        if data["artifacts"][name]["sha256"] == old:
            data["artifacts"][name]["sha256"] = new
        report = bundle.path / f"reports/validate-{name}.json"
        if report.is_file() and f'"artifact_sha256": "{old}"' in report.read_text(encoding="utf-8"):
            content = report.read_text(encoding="utf-8")
            report.write_text(content.replace(old, new), encoding="utf-8")
    if to_json(data) != before:
        (directory / "golden.json").write_text(to_json(data), encoding="utf-8")
