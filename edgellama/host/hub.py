"""Hugging Face hub, as far as it lies on this machine: names of models, and the cache folder, without network.

A model's folder in the cache is `models--OWNER--NAME`. It holds `blobs` (files by their hash), `snapshots/COMMIT`
(links to them by name) and `refs` (commit of every branch or tag that was asked for).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgellama.errors import CheckpointError
from edgellama.host.cache import user_caches

DEFAULT_REVISION = "main"
_FOLDER = re.compile(r"models--(?:(?P<owner>[A-Za-z0-9][\w.-]*?)--)?(?P<name>[A-Za-z0-9_][\w.-]*)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{6,64}")
_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})"
    r"(?:@(?P<revision>\w[\w./+-]{0,199}))?"
    r"(?::(?P<file>\w[\w.()+/ -]{0,199}\.gguf))?",
    re.ASCII,
)
# Endings of local files. No model's name is taken to end so.
_ENDINGS = (
    ".gguf",
    ".json",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".pte",
    ".onnx",
    ".mlpackage",
    ".edgellama",
)


@dataclass(frozen=True)
class HubName:
    """Name of a model on the hub: OWNER/NAME, with @REVISION and :FILE if given.

    Attributes:
        repository: OWNER/NAME.
        revision: a branch, a tag or a commit; None for the branch `main`.
        file: a .gguf file of the repository; None for the whole model.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """The name in a text, None if it cannot be one.

        >>> HubName.parse("meta-llama/Llama-3.2-1B@v1").revision
        'v1'
        """
        match = _NAME.fullmatch(text)
        if match is None or ".." in text or "--" in match["repository"]:
            return None
        if match["repository"].lower().endswith(_ENDINGS):
            return None
        return cls(match["repository"], match["revision"], match["file"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f":{self.file}" if self.file else "")

    @property
    def address(self) -> str:
        """Address of the model's page."""
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{self.repository}"

    @property
    def folder(self) -> Path:
        """Place of its folder in the cache."""
        return cache_folder() / f"models--{self.repository.replace('/', '--')}"


@dataclass(frozen=True)
class HubOrigin:
    """Repository and commit that a file of the cache belongs to."""

    repository: str
    revision: str

    def to_dict(self) -> dict[str, str]:
        return {"repository": self.repository, "revision": self.revision}


def cache_folder() -> Path:
    """Folder of the Hugging Face cache, by the same environment variables as in huggingface_hub."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return user_caches() / "huggingface" / "hub"


def is_model_folder(path: Path) -> bool:
    """True for a folder of the cache, `models--OWNER--NAME`, or a copy of one."""
    return _FOLDER.fullmatch(path.absolute().name) is not None and (path / "snapshots").is_dir()


def origin_of(path: Path) -> HubOrigin | None:
    """Origin of a snapshot or of a file in one; None for any other path. It follows from the path alone."""
    parts = path.absolute().parts
    for at in range(len(parts) - 3, -1, -1):
        folder = _FOLDER.fullmatch(parts[at])
        if folder and parts[at + 1] == "snapshots" and _COMMIT.fullmatch(parts[at + 2]):
            owner = f"{folder['owner']}/" if folder["owner"] else ""
            return HubOrigin(f"{owner}{folder['name']}", parts[at + 2])
    return None


def snapshot(folder: Path, revision: str | None = None) -> Path:
    """The snapshot of a model's folder in the cache.

    revision: a branch, a tag or a commit; None for `main`, or for the only snapshot. Raises CheckpointError,
    naming those that are there.
    """
    snapshots = folder / "snapshots"
    try:
        commits = sorted(f.name for f in snapshots.iterdir() if f.is_dir())
    except OSError:
        commits = []
    wanted = revision or DEFAULT_REVISION
    commit = _commit(folder, wanted) or (wanted if wanted in commits else None)
    if commit is None and revision is None and len(commits) == 1:
        commit = commits[0]
    if commit in commits:
        return snapshots / commit
    listing = ", ".join([*_references(folder), *commits]) or "none"
    raise CheckpointError(
        f"{folder}: no snapshot of revision {wanted} in this folder of the Hugging Face cache (there: {listing})",
        remedy="Name one that is there as OWNER/NAME@REVISION, or add --download to fetch the one that is missing.",
    )


def _commit(folder: Path, revision: str) -> str | None:
    """Commit of a branch or tag, as the cache knows it."""
    try:
        text = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[\w-]{1,64}", text, re.ASCII) else None


def _references(folder: Path) -> list[str]:
    root = folder / "refs"
    return sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
