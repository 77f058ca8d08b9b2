"""The Core ML package inside a .pte, as ExecuTorch 1.4.0 stores it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellama.errors import BundleError
from edgellama.pte_file import delegate_data

BACKEND = "CoreMLBackend"
REFERENCE = b"CMJR"  # what follows is JSON with the key of named data, shared by several methods


@contextmanager
def extracted_package(path: Path) -> Iterator[Path]:
    """The .mlpackage in the .pte at `path`, in a directory of its own for the duration.

    Raises BundleError when there is none, or more than one.
    """
    from executorch.backends.apple.coreml import executorchcoreml

    blobs, named = delegate_data(path, BACKEND)
    try:
        contents = {
            named[json.loads(blob[len(REFERENCE) :])["key"]] if blob.startswith(REFERENCE) else blob
            for blob in blobs
        }
    except (KeyError, ValueError, TypeError) as error:
        raise BundleError(
            f"{path}: a method refers to a Core ML package that is not in the file ({error!r:.80})",
            remedy="Export it again.",
        ) from error
    if len(contents) != 1:
        raise BundleError(
            f"{path}: {len(contents)} Core ML packages in it, expected one for all methods",
            remedy="Give a .pte whose whole graph is one Core ML delegate, as edgellama's are.",
        )
    with tempfile.TemporaryDirectory() as directory:
        unpacked = executorchcoreml.unflatten_directory_contents(contents.pop(), directory)
        packages = list(Path(directory).rglob("model.mlpackage"))
        if not unpacked or len(packages) != 1:
            raise BundleError(
                f"{path}: its Core ML delegate holds no model.mlpackage", remedy="Export it again."
            )
        yield packages[0]
