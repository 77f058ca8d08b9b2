"""Bundle: the directory that an app ships. A manifest names every file with its hash; reading verifies.

Written in a directory beside its destination and renamed when complete, so that whatever happens on the way, the
destination holds either the old bundle or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from edgellama.config import LlamaConfig
from edgellama.errors import BundleError, UsageError
from edgellama.recipe import Recipe
from edgellama.report import to_json
from edgellama.targets import find_target
from edgellama.tokenizer import Tokenizer

SCHEMA = "edgellama.bundle/1"
MANIFEST = "manifest.json"
_SECTIONS = ("name", "tools", "source", "model", "chat", "recipe", "artifacts", "accuracy", "files")
_REMEDY = "Export the bundle again, or copy it again as a whole."


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, opened by `Bundle.open`."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """The bundle at `path`, its manifest read and checked. Raises BundleError."""
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise BundleError(
                f"{path}: not a bundle (no {MANIFEST})",
                remedy="Give a directory that `edgellama export` wrote.",
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{file}: not readable as JSON ({error})", remedy=_REMEDY) from error
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
            raise BundleError(
                f"{file}: schema is {found!r}, expected {SCHEMA!r}",
                remedy="Use the version of edgellama that wrote the bundle, or export it again.",
            )
        missing = [key for key in _SECTIONS if key not in manifest]
        if missing:
            raise BundleError(f"{file}: no {', '.join(missing)} in it", remedy=_REMEDY)
        _check_files_section(file, manifest["files"])
        return cls(path, manifest)

    @cached_property
    def targets(self) -> list[str]:
        """Names of the targets in it, in the manifest's order."""
        return [str(a["target"]) for a in self._artifacts]

    @cached_property
    def config(self) -> LlamaConfig:
        try:
            return LlamaConfig.from_dict(self.manifest["model"])
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(
                f"{self.path}: the manifest's model section is malformed ({error})", remedy=_REMEDY
            ) from error

    @property
    def context_length(self) -> int:
        return int(self.manifest["model"]["context_length"])

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.from_dict(self.manifest["recipe"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the bundle, its files verified."""
        for name in self.manifest["files"]:
            if name.startswith("tokenizer/"):
                self.verified(name)
        return Tokenizer.from_directory(self.path / "tokenizer")

    def artifact(self, target: str) -> Path:
        """Path of the artifact for `target`, verified. Raises BundleError when there is none."""
        for entry in self._artifacts:
            if entry["target"] == target:
                return self.verified(str(entry["path"]))
        raise BundleError(
            f"{self.path}: no artifact for target {target!r} (it has {', '.join(self.targets) or 'none'})",
            remedy=f"Export it with -t {find_target(target).name}.",
        )

    def artifact_entry(self, target: str) -> Mapping[str, Any]:
        """The manifest's entry about the artifact for `target`."""
        return next(entry for entry in self._artifacts if entry["target"] == target)

    def verified(self, name: str) -> Path:
        """Path of the file `name`, proven to be what the manifest says. Raises BundleError."""
        problem = self._problem(name)
        if problem:
            raise BundleError(f"{self.path}: {problem}", remedy=_REMEDY)
        return self.path / name

    def problems(self) -> list[str]:
        """What is wrong with the files: missing, altered, or not named in the manifest. Empty when all is well."""
        found = [problem for name in self.manifest["files"] if (problem := self._problem(name))]
        known = {*self.manifest["files"], MANIFEST}
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if file.is_symlink() or (file.is_file() and name not in known):
                found.append(f"{name} is not named in the manifest")
        return found

    @property
    def _artifacts(self) -> list[Mapping[str, Any]]:
        entries = self.manifest["artifacts"]
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and {"target", "path"} <= e.keys() for e in entries
        ):
            raise BundleError(f"{self.path}: the manifest's artifacts are malformed", remedy=_REMEDY)
        return entries

    def _problem(self, name: str) -> str | None:
        entry = self.manifest["files"].get(name)
        if entry is None:
            return f"{name} is not named in the manifest"
        file = self.path / name
        if any(
            part.is_symlink()
            for part in (file, *file.parents)
            if part != self.path and self.path in part.parents
        ):
            return f"{name} is a symbolic link"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
        if file_sha256(file) != entry["sha256"]:
            return f"{name} is not the file that was exported (its sha256 differs from the manifest's)"
        return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> Bundle:
    """Hash every file under `directory` into `manifest` and write it: what makes a directory a bundle."""
    files = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    complete = {"schema": SCHEMA, **manifest, "files": files}
    (directory / MANIFEST).write_text(to_json(complete), encoding="utf-8")
    return Bundle.open(directory)


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse a destination that exists, before any work; with `force`, only a bundle may be replaced."""
    if not destination.exists() and not destination.is_symlink():
        if not destination.absolute().parent.is_dir():
            raise UsageError(
                f"{destination.parent}: no such directory",
                remedy="Create it, or choose another place with -o.",
            )
        return
    if not force:
        raise UsageError(
            f"{destination} exists", remedy="Use --force to replace it, or choose another name with -o."
        )
    if not (destination / MANIFEST).is_file() or destination.is_symlink():
        raise UsageError(
            f"{destination} exists and is not a bundle; --force replaces bundles only",
            remedy="Choose another name with -o, or remove it yourself.",
        )


@contextmanager
def staged(destination: Path, *, force: bool) -> Iterator[Path]:
    """An empty directory that becomes `destination` when the block ends without an error, and vanishes otherwise."""
    check_destination(destination, force=force)
    parent = destination.absolute().parent
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    try:
        content = work / "new"
        content.mkdir()
        yield content
        check_destination(destination, force=force)
        if destination.exists():
            destination.rename(work / "old")
            try:
                content.rename(destination)
            except OSError:
                (work / "old").rename(destination)
                raise
        else:
            content.rename(destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_files_section(file: Path, files: Any) -> None:
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("bytes"), int) and isinstance(e.get("sha256"), str)
        for e in files.values()
    ):
        raise BundleError(f"{file}: its files section is malformed", remedy=_REMEDY)
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or os.path.isabs(name):
            raise BundleError(
                f"{file}: the path {name!r} leaves the bundle",
                remedy="Do not use this bundle; it was tampered with.",
            )
