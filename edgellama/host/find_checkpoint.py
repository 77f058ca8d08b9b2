"""Place of a checkpoint: a path, a folder of the Hugging Face cache, or OWNER/NAME on the hub.

Nothing here opens a connection, unless the user asked for a download.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgellama.errors import CheckpointError
from edgellama.host.hub import HubName, cache_folder, is_model_folder, snapshot
from edgellama.host.hub_files import has_no_weights, missing_weights, names_weights, the_gguf

Say = Callable[[str], None]


def find_checkpoint(
    place: str | Path, *, download: bool = False, weights: bool = True, say: Say | None = None
) -> Path:
    """The file or directory of the checkpoint at `place`.

    Args:
        place: a local path, which comes first, or OWNER/NAME with @REVISION and :FILE if wanted.
        download: fetch what lacks in the Hugging Face cache. Without it, no connection is opened.
        weights: False if the files besides the weights are enough.
        say: called with sentences about the choice.

    Raises CheckpointError, and for a download MissingDependencyError or ResourceError.
    """
    say = say or (lambda _: None)
    name, path = HubName.parse(str(place)), Path(place)
    if path.exists():
        if name is not None and name.folder.is_dir():
            say(
                f"{place} is a local path and also a model in the Hugging Face cache; the path is read. "
                f"Write {name.repository}@main for the model"
            )
        return _inside(path, say)
    if name is None:
        raise CheckpointError(
            f"{place}: no such file or directory", remedy="Check the path of the checkpoint."
        )
    if download:
        from edgellama.host.hub_download import download_model

        folder = download_model(name, weights=weights, say=say)
    else:
        folder = _cached(name)
        say(f"{name}: snapshot {folder.name} in the Hugging Face cache")
    lacking = missing_weights(folder) if weights and name.file is None else None
    if lacking is not None:
        raise CheckpointError(
            f"{name}: only a part of it is in the Hugging Face cache: {lacking}",
            remedy=f"Add --download to fetch the rest from {name.address}.",
        )
    return _file_or_directory(name, folder)


def _cached(name: HubName) -> Path:
    if not name.folder.is_dir():
        raise CheckpointError(
            f"{name}: no such file or directory, and no such model in the Hugging Face cache ({cache_folder()})",
            remedy=f"Check the path. If it is the model {name.address} on the hub, add --download.",
        )
    return snapshot(name.folder, name.revision)


def _file_or_directory(name: HubName, folder: Path) -> Path:
    """The named file of a snapshot, its only GGUF model, or the snapshot itself."""
    if name.file is None:
        return _gguf_in(folder, f"Name one of them: {name}:FILE.")
    file = folder / name.file
    if not file.is_file():
        raise CheckpointError(
            f"{name}: no such file in snapshot {folder.name} of the Hugging Face cache",
            remedy=f"Check its name at {name.address}, or add --download.",
        )
    return file


def _inside(path: Path, say: Say) -> Path:
    """The checkpoint at a local path: its snapshot if it is a folder of the cache, its only GGUF model."""
    if not path.is_dir():
        return path
    if is_model_folder(path):
        found = snapshot(path)
        say(f"{path} is a model's folder in a Hugging Face cache; its snapshot {found.name} is read")
        path = found
    return _gguf_in(path, "Give the path of one of these files.")


def _gguf_in(directory: Path, remedy: str) -> Path:
    """The only GGUF model of a directory without other weights, else the directory."""
    try:
        names = [f.name for f in directory.iterdir()]
    except OSError as error:
        raise CheckpointError(
            f"{directory}: {error.strerror}", remedy="Check that the directory can be read."
        ) from error
    parts = [] if names_weights(names) else the_gguf(names, str(directory), remedy)
    return directory / parts[0] if parts else directory


def without_weights(path: Path) -> bool:
    """True for a directory that describes a model without holding its weights."""
    return path.is_dir() and has_no_weights(path)
