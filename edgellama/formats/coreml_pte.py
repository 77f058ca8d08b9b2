"""The Core ML packages inside a .pte, as ExecuTorch 1.4.0 stores them.

Each is a directory in one blob: the bytes of all files, then a table of them as JSON, back to front. It is unpacked
here and not by executorchcoreml.unflatten_directory_contents, which follows a name such as `../x` out of the directory
that it is given.
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
REFERENCE = b"CMJR"  # what follows is JSON with the key of named data, shared by several methods
_LONGEST_TABLE = 2**20  # bytes
_DIRECTORY = 1  # `kind` of an entry
_DEEPEST = 16  # directories in each other; a package has four
_REMEDY = "The file is damaged or not of ExecuTorch 1.4; export it again."


@contextmanager
def extracted_package(path: Path) -> Iterator[Path]:
    """The .mlpackage in the .pte at `path`, in a directory of its own for the duration.

    Raises BundleError when there is none, or more than one.
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
    """Every .mlpackage in the .pte at `path`, in order of their delegates; what several share is there once.

    Raises BundleError for delegates that hold no package, compiled models among them.
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
            found = sorted(folder.rglob("*.mlpackage"))
            if len(found) != 1:
                names = ", ".join(sorted(p.name for p in folder.iterdir()))
                raise BundleError(
                    f"{path}: a Core ML delegate holds {len(found)} packages ({names:.80}), expected one",
                    remedy="Lower without compiling the model for one device (model_type MODEL).",
                )
            packages += found
        yield packages


def _content(blob: bytes, named: Mapping[str, bytes]) -> bytes:
    return named[json.loads(blob[len(REFERENCE) :])["key"]] if blob.startswith(REFERENCE) else blob


def unpack(blob: bytes, directory: Path) -> None:
    """The files of a blob, into a new directory. Raises ValueError for what is not such a blob."""
    table = blob[-_LONGEST_TABLE:][::-1].decode("utf-8", errors="replace")
    try:
        nodes = json.JSONDecoder().raw_decode(table)[0]["nodes"]
        _write(nodes, len(nodes) - 1, blob, directory, _DEEPEST)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its table of files is none: {error!r}") from error


def _write(nodes: Sequence[Any], index: int, blob: bytes, path: Path, depth: int) -> None:
    """An entry, after which come those that hold it: the last one is the whole directory."""
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
