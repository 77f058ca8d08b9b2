"""Bundle: the directory that an app ships. Its manifest has the hash of every file, and reading verifies it.

edgellama/bundle/publish.py puts a bundle in its place, such that every failure leaves the old bundle or the
new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from edgellama.bundle.schema import manifest_schema, violations
from edgellama.errors import BundleError, InputError
from edgellama.files import (
    file_sha256,
    is_left_by_a_file_manager,
    raise_error,
    read_json,
    strange_file,
    to_json,
)
from edgellama.model.config import LlamaConfig
from edgellama.model.labels import Calibrated, Classifier
from edgellama.recipe import Recipe
from edgellama.targets import find_target
from edgellama.text.tokenizer import Tokenizer

SCHEMA = "edgellama.bundle/1"
MANIFEST = "manifest.json"
# Signatures beside the manifest. It cannot name them, because they are made of its bytes.
MANIFEST_SIGNATURE, MODEL_SIGNATURE = "signature.json", "model.sig"
SIGNATURES = (MANIFEST_SIGNATURE, MODEL_SIGNATURE)
MAX_SIGNATURE = 1 << 20  # bytes
_REMEDY = "Export the bundle again, or copy it again as a whole."


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `Bundle.open` checks `manifest` against manifest.schema.json.

    >>> import edgellama
    >>> bundle = edgellama.Bundle.open(bundle.path)
    >>> bundle.targets, bundle.context_length
    (['xnnpack'], 128)
    >>> bundle.artifact("xnnpack").name, bundle.problems()
    ('model.pte', [])
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens the bundle at `path`. Raises BundleError if there is none or its manifest is invalid."""
        path = Path(path)
        file = path / MANIFEST
        try:
            has_manifest = file.is_file()
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}", remedy="Check the path.") from error
        if not has_manifest:
            raise BundleError(
                f"{path}: not a bundle (no {MANIFEST})",
                remedy="Give a directory that `edgellama export` wrote.",
            )
        if (kind := strange_file(file, links=False)) is not None:
            raise BundleError(f"{file}: this is {kind}", remedy=_REMEDY)
        try:
            manifest = read_json(file)
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{file}: not readable as JSON ({error})", remedy=_REMEDY) from error
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            schema = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
            raise BundleError(
                f"{file}: schema is {schema!r:.60}, expected {SCHEMA!r}",
                remedy="Use the version of edgellama that wrote the bundle, or export it again.",
            )
        for violation in violations(manifest, manifest_schema(), manifest_schema(), "manifest"):
            raise BundleError(f"{file}: {violation}", remedy=_REMEDY)
        bundle = cls(path, manifest)
        rows = bundle.classifier.rows if bundle.classifier else None
        if rows != manifest["model"].get("label_rows"):
            raise BundleError(f"{file}: its classifier does not have the rows of its model", remedy=_REMEDY)
        if len(set(bundle.targets)) < len(bundle.targets):
            raise BundleError(f"{file}: several artifacts for one target", remedy=_REMEDY)
        for entry in manifest["artifacts"]:
            if not bundle._files_of(entry["path"]):
                raise BundleError(
                    f"{file}: the artifact {entry['path']!r} is not among its files", remedy=_REMEDY
                )
        return bundle

    @cached_property
    def targets(self) -> list[str]:
        """Names of its targets, in the manifest's order."""
        return [entry["target"] for entry in self.manifest["artifacts"]]

    @cached_property
    def config(self) -> LlamaConfig:
        with self._section("model"):
            return LlamaConfig.from_dict(self.manifest["model"])

    @cached_property
    def classifier(self) -> Classifier | None:
        """Labels and prompt of a bundle that classifies texts; None for one that generates text."""
        data = self.manifest.get("classifier")
        with self._section("classifier"):
            return None if data is None else Classifier.from_dict(data)

    def calibrated(self, target: str) -> Calibrated | None:
        """Temperature and threshold of the classifier's artifact for `target`; None for one without."""
        data = self.manifest.get("classifier", {}).get("calibration", {}).get(target)
        return None if data is None else Calibrated.from_dict(data)

    def prefix_file(self, target: str) -> Path | None:
        """Keys and values of the prompt's fixed beginning for `target`, verified; None for none. Raises BundleError."""
        path = self.manifest.get("classifier", {}).get("prefix_files", {}).get(target)
        if path is not None and path not in self.manifest["files"]:
            raise BundleError(f"{self.path}: the prefix {path!r} is not among its files", remedy=_REMEDY)
        return None if path is None else self.verify(path)

    @property
    def context_length(self) -> int:
        return int(self.manifest["model"]["context_length"])

    @cached_property
    def recipe(self) -> Recipe:
        with self._section("recipe"):
            return Recipe.from_dict(self.manifest["recipe"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, with verified files. Raises BundleError."""
        self.verify("tokenizer")
        return Tokenizer.from_directory(self.path / "tokenizer")

    @property
    def chat_date(self) -> datetime | None:
        """Date that the export fixed for the chat template (`--date`), None without one."""
        date = self.manifest["chat"].get("date")
        return None if date is None else datetime.fromisoformat(date)

    def artifact(self, target: str) -> Path:
        """Path of the artifact for `target`, verified. Raises BundleError if it is missing or altered."""
        return self.verify(self.artifact_entry(target)["path"])

    def artifact_sha256(self, target: str) -> str:
        """sha256 of the artifact for `target`, from the manifest.

        The hash of a directory is the sha256 of the output of `sha256sum`. The output has a line `HASH  PATH`
        with a line feed for each file, in the order of the paths. PATH is relative to the directory.
        """
        path = self.artifact_entry(target)["path"]
        files = self.manifest["files"]
        if path in files:
            return str(files[path]["sha256"])
        lines = [
            f"{files[name]['sha256']}  {name.removeprefix(f'{path}/')}\n"
            for name in sorted(self._files_of(path))
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def artifact_entry(self, target: str) -> Mapping[str, Any]:
        """The manifest's entry of the artifact for `target`. Raises BundleError if there is none."""
        for entry in self.manifest["artifacts"]:
            if entry["target"] == target:
                return dict(entry)
        raise BundleError(
            f"{self.path}: no artifact for target {target!r} (it has {', '.join(self.targets)})",
            remedy=f"Export it with -t {find_target(target).name}.",
        )

    def adapter_files(self, target: str) -> dict[str, Path]:
        """Files of the adapters that the runtime of `target` can switch, by name, verified. Raises BundleError."""
        paths = {entry["name"]: entry["files"].get(target) for entry in self.manifest.get("adapters", ())}
        unlisted = [
            path for path in paths.values() if path is not None and path not in self.manifest["files"]
        ]
        if unlisted:
            raise BundleError(
                f"{self.path}: the adapter {unlisted[0]!r} is not among its files", remedy=_REMEDY
            )
        return {name: self.verify(path) for name, path in paths.items() if path is not None}

    def problems(self) -> list[str]:
        """Faults in words: files that are missing, altered, or not named in the manifest."""
        return list(self.problems_by_file().values())

    def problems_by_file(self, under: str = "") -> dict[str, str]:
        """Faults by path in the bundle, of all files or only of the file or directory at `under`."""
        problems = {name: problem for name in self._files_of(under) if (problem := self._problem(name))}
        listed = {*self.manifest["files"], MANIFEST}
        for file in _below(self.path / under):
            name = file.relative_to(self.path).as_posix()
            if file.is_symlink():
                problems[name] = f"{name} is a symbolic link"
            elif name not in listed and not file.is_dir() and not _is_signature(file, self.path):
                problems[name] = f"{name} is not named in the manifest"
        return problems

    def _problem(self, name: str) -> str | None:
        entry, file = self.manifest["files"][name], self.path / name
        steps = [file, *file.parents][: len(Path(name).parts)]
        try:
            if any(step.is_symlink() for step in steps):
                return f"{name} is a symbolic link"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
            if file_sha256(file) != entry["sha256"]:
                return f"{name} is not the file that was exported (its sha256 differs from the manifest's)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    def _files_of(self, path: str) -> list[str]:
        """Names of the file at `path` or of all files below it. An empty path stands for the bundle."""
        return [n for n in self.manifest["files"] if not path or n == path or n.startswith(f"{path}/")]

    def verify(self, path: str) -> Path:
        """Verifies the file or directory at `path` in the bundle, and returns its location.

        Raises BundleError if a file below it is missing, altered, or not named in the manifest.
        """
        problems = self.problems_by_file(path)
        if problems:
            raise BundleError(f"{self.path}: {'; '.join([*problems.values()][:3])}", remedy=_REMEDY)
        return self.path / path

    @contextmanager
    def _section(self, name: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise BundleError(
                f"{self.path / MANIFEST}: its {name} section: {error.message}", remedy=_REMEDY
            ) from error


def write_manifest(directory: Path, manifest: Mapping[str, Any], *, hashed: Bundle | None = None) -> Bundle:
    """Writes manifest.json with the hash of every file under `directory`, which makes it a bundle.

    hashed: the bundle that an earlier call returned for this directory. Unchanged files keep their hash.
    """
    manifest_time = (directory / MANIFEST).stat().st_mtime_ns if hashed is not None else 0
    old_entries: Mapping[str, Any] = {} if hashed is None else hashed.manifest["files"]
    files = {}
    for file in _below(directory, raise_error):
        if not file.is_file() or file == directory / MANIFEST or _is_signature(file, directory):
            continue
        name, status = file.relative_to(directory).as_posix(), file.stat()
        entry = old_entries.get(name)
        if entry is None or status.st_mtime_ns >= manifest_time or status.st_size != entry["bytes"]:
            entry = {"bytes": status.st_size, "sha256": file_sha256(file)}
        files[name] = entry
    complete = {**manifest, "schema": SCHEMA, "files": files}
    (directory / MANIFEST).write_text(to_json(complete), encoding="utf-8")
    return Bundle.open(directory)


def _is_signature(file: Path, directory: Path) -> bool:
    """True for a file of SIGNATURES in a bundle. A large one is something else."""
    known = file.parent == directory and file.name in SIGNATURES
    return known and file.is_file() and file.stat().st_size <= MAX_SIGNATURE


def _below(directory: Path, onerror: Callable[[OSError], None] | None = None) -> list[Path]:
    """Files and directories below a directory, sorted. Links are not followed.

    Empty if it is not a directory. Files that a file manager left are no part of a bundle.

    onerror: called for a directory that cannot be read; None to skip it.
    """
    walk = os.walk(directory, onerror=onerror)
    paths = (Path(at, name) for at, folders, names in walk for name in (*folders, *names))
    return sorted(path for path in paths if not is_left_by_a_file_manager(path))


def is_bundle(path: Path) -> bool:
    """True if `path` is a bundle of any version. Other directories may have a manifest.json too."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("schema")).startswith("edgellama.bundle/")
