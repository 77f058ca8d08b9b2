"""Bundle: the directory that an app ships. A manifest names every file with its hash; reading verifies.

How a bundle gets its place, so that whatever goes wrong on the way there is either the old one or the new one, is in
edgellama/bundle/publish.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgellama.bundle.schema import manifest_schema, violations
from edgellama.errors import BundleError, InputError
from edgellama.files import file_sha256, raise_error, read_json, strange_file, to_json
from edgellama.model.config import LlamaConfig
from edgellama.recipe import Recipe
from edgellama.targets import find_target
from edgellama.text.tokenizer import Tokenizer

SCHEMA = "edgellama.bundle/1"
MANIFEST = "manifest.json"
_REMEDY = "Export the bundle again, or copy it again as a whole."


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, opened by `Bundle.open`; `manifest` is what manifest.schema.json says, checked."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """The bundle at `path`, its manifest read and checked. Raises BundleError."""
        path = Path(path)
        file = path / MANIFEST
        try:
            found = file.is_file()
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}", remedy="Check the path.") from error
        if not found:
            raise BundleError(
                f"{path}: not a bundle (no {MANIFEST})",
                remedy="Give a directory that `edgellama export` wrote.",
            )
        if (why := strange_file(file, links=False)) is not None:
            raise BundleError(f"{file}: this is {why}", remedy=_REMEDY)
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
        """Names of the targets in it, in the manifest's order."""
        return [entry["target"] for entry in self.manifest["artifacts"]]

    @cached_property
    def config(self) -> LlamaConfig:
        with self._section("model"):
            return LlamaConfig.from_dict(self.manifest["model"])

    @property
    def context_length(self) -> int:
        return int(self.manifest["model"]["context_length"])

    @cached_property
    def recipe(self) -> Recipe:
        with self._section("recipe"):
            return Recipe.from_dict(self.manifest["recipe"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the bundle, its files verified."""
        self.verify("tokenizer")
        return Tokenizer.from_directory(self.path / "tokenizer")

    def artifact(self, target: str) -> Path:
        """Path of the artifact for `target`, verified. Raises BundleError when there is none."""
        return self.verify(self.artifact_entry(target)["path"])

    def artifact_sha256(self, target: str) -> str:
        """Hash of the artifact for `target`, as the manifest has it.

        Of a directory: the sha256 of a line `HASH  PATH` with a line feed for each file in it, PATH within the
        directory, in the order of the paths (what `sha256sum` prints, hashed).
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
        """The manifest's entry about the artifact for `target`. Raises BundleError when there is none."""
        for entry in self.manifest["artifacts"]:
            if entry["target"] == target:
                return dict(entry)
        raise BundleError(
            f"{self.path}: no artifact for target {target!r} (it has {', '.join(self.targets)})",
            remedy=f"Export it with -t {find_target(target).name}.",
        )

    def problems(self) -> list[str]:
        """What is wrong with the files: missing, altered, or not named in the manifest. Empty when all is well."""
        return list(self.problems_by_file().values())

    def problems_by_file(self, under: str = "") -> dict[str, str]:
        """The same by path in the bundle, of all files or only of the file or directory at `under`."""
        found = {name: problem for name in self._files_of(under) if (problem := self._problem(name))}
        known = {*self.manifest["files"], MANIFEST}
        for file in _below(self.path / under):
            name = file.relative_to(self.path).as_posix()
            if file.is_symlink():
                found[name] = f"{name} is a symbolic link"
            elif name not in known and not file.is_dir():
                found[name] = f"{name} is not named in the manifest"
        return found

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
        """Names of the file at `path`, or of all files below it; of all files for an empty path."""
        return [n for n in self.manifest["files"] if not path or n == path or n.startswith(f"{path}/")]

    def verify(self, path: str) -> Path:
        """Where the file or directory `path` lies, proven to hold what the manifest says and nothing else.

        Raises BundleError.
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
    """Hash every file under `directory` into `manifest` and write it: this makes a directory a bundle.

    hashed: the same directory as an earlier call returned it. A file that was not written to since keeps its hash.
    """
    since = (directory / MANIFEST).stat().st_mtime_ns if hashed is not None else 0
    entries: Mapping[str, Any] = {} if hashed is None else hashed.manifest["files"]
    files = {}
    for file in _below(directory, raise_error):
        if not file.is_file() or file == directory / MANIFEST:
            continue
        name, status = file.relative_to(directory).as_posix(), file.stat()
        entry = entries.get(name)
        if entry is None or status.st_mtime_ns >= since or status.st_size != entry["bytes"]:
            entry = {"bytes": status.st_size, "sha256": file_sha256(file)}
        files[name] = entry
    complete = {**manifest, "schema": SCHEMA, "files": files}
    (directory / MANIFEST).write_text(to_json(complete), encoding="utf-8")
    return Bundle.open(directory)


def _below(directory: Path, onerror: Callable[[OSError], None] | None = None) -> list[Path]:
    """Everything below a directory, in a stable order; links are not followed. Empty for anything else.

    onerror: called where a directory cannot be read; without it that directory is passed over.
    """
    walk = os.walk(directory, onerror=onerror)
    return sorted(Path(at, name) for at, folders, names in walk for name in (*folders, *names))


def is_bundle(path: Path) -> bool:
    """Whether `path` is a bundle of any version: other directories have a manifest.json too."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("schema")).startswith("edgellama.bundle/")
