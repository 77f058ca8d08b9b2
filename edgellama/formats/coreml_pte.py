"""Reader of the Core ML packages inside a .pte, as ExecuTorch 1.4.0 stores them.

Each package is a directory in one blob: the bytes of all files, then a JSON table of them, written back to
front. `unpack` replaces executorchcoreml.unflatten_directory_contents, which follows a name such as `../x`
out of its target directory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgellama.errors import BundleError
from edgellama.formats.pte import delegate_data

BACKEND = "CoreMLBackend"
REFERENCE = b"CMJR"  # prefix of JSON with the key of named data that several methods share
_LONGEST_TABLE = 2**20  # bytes
_DIRECTORY = 1  # `kind` of an entry
_DEEPEST = 16  # levels of directories; a package has four
_REMEDY = "The file is damaged or of another version of ExecuTorch; export it again."


@contextmanager
def extracted_package(path: Path) -> Iterator[Path]:
    """Yields the .mlpackage in the .pte at `path`, in a temporary directory.

    Raises BundleError unless there is exactly one.
    """
    with extracted_packages(path) as packages:
        if len(packages) != 1:
            raise BundleError(
                f"{path}: {len(packages)} Core ML packages in it, expected one for all methods",
                remedy="Give a .pte whose whole graph is one Core ML delegate, as edgellama's are.",
            )
        yield packages[0]


@contextmanager
def extracted_packages(path: Path) -> Iterator[list[Path]]:
    """Yields every .mlpackage in the .pte at `path`, in order of the delegates, in a temporary directory.

    A package that several delegates share appears once. Raises BundleError for a delegate without a package,
    such as a compiled model.
    """
    blobs, named = delegate_data(path, BACKEND)
    try:
        contents = dict.fromkeys(_content(blob, named) for blob in blobs)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path}: a method refers to a package that is not in the file ({error!r:.80})",
            remedy=_REMEDY,
        ) from error
    with tempfile.TemporaryDirectory() as directory:
        packages = []
        for number, content in enumerate(contents):
            folder = Path(directory) / str(number)
            try:
                unpack(content, folder)
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"{path}: a Core ML delegate is damaged ({error!s:.80})", remedy=_REMEDY
                ) from error
            extracted = sorted(folder.rglob("*.mlpackage"))
            if len(extracted) != 1:
                names = ", ".join(sorted(p.name for p in folder.iterdir()))
                raise BundleError(
                    f"{path}: a Core ML delegate holds {len(extracted)} packages ({names:.80}), expected one",
                    remedy="Lower without compiling the model for one device (model_type MODEL).",
                )
            packages += extracted
        yield packages


def _content(blob: bytes, named: Mapping[str, bytes]) -> bytes:
    return named[json.loads(blob[len(REFERENCE) :])["key"]] if blob.startswith(REFERENCE) else blob


def unpack(blob: bytes, directory: Path) -> None:
    """Writes the files of a blob into a new directory. Raises ValueError for a malformed blob."""
    table = blob[-_LONGEST_TABLE:][::-1].decode("utf-8", errors="replace")
    try:
        nodes = json.JSONDecoder().raw_decode(table)[0]["nodes"]
        _write(nodes, len(nodes) - 1, blob, directory, _DEEPEST)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its table of files is none: {error!r}") from error


def _write(nodes: Sequence[Any], index: int, blob: bytes, path: Path, depth: int) -> None:
    """Writes entry `index` to `path`. Directories follow their children, so the last entry is the root."""
    node = nodes[index]
    if node["kind"] != _DIRECTORY:
        start, size = node["dataRegion"]["offset"], node["dataRegion"]["size"]
        if not 0 <= start <= start + size <= len(blob):
            raise ValueError(f"{path.name} ends after the data")
        path.write_bytes(blob[start : start + size])
        return
    if not depth:
        raise ValueError("directories without end")
    path.mkdir()
    for name, child in node["children"].items():
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise ValueError(f"a file is named {name!r}")
        if not 0 <= child < index:
            raise ValueError("directories in circles")
        _write(nodes, child, blob, path / name, depth - 1)
