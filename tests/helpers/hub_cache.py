"""Models in the Hugging Face cache of this process, in the layout of huggingface_hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from edgellama.host.hub import cache_folder

COMMIT, OTHER = "a" * 40, "b" * 40


def cache_model(
    repository: str, files: Mapping[str, bytes], *, commit: str = COMMIT, reference: str | None = "main"
) -> Path:
    """Writes a snapshot of links to blobs, and a reference to it. Returns the snapshot."""
    folder = cache_folder() / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for directory in (folder / "blobs", folder / "refs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob = hashlib.sha256(content).hexdigest()
        (folder / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    if reference is not None:
        (folder / "refs" / reference).write_text(commit)
    return snapshot
