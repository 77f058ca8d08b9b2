"""File of the keys and values of a prompt's fixed beginning: `prefix/TARGET.safetensors` in a bundle.

It names the tokens and the artifact that it was computed with, because a beginning of another policy would change
every answer without a trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgellama.errors import BundleError
from edgellama.files import digest

DIRECTORY = "prefix"
Arrays = dict[str, npt.NDArray[np.float32]]


def write_prefix(file: Path, tokens: Sequence[int], artifact_sha256: str, arrays: Mapping[str, Any]) -> None:
    """Writes keys and values of `tokens`, by the names of the artifact's inputs."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(save(dict(arrays), metadata=_metadata(tokens, artifact_sha256)))


def read_prefix(file: Path, tokens: Sequence[int], artifact_sha256: str) -> Arrays:
    """Keys and values of `tokens`: float32 by name. Raises BundleError for those of other tokens or another artifact."""
    try:
        with safe_open(file, framework="numpy") as opened:
            recorded = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise BundleError(f"{file}: not readable ({error})", remedy="Export the bundle again.") from error
    for key, expected in _metadata(tokens, artifact_sha256).items():
        if recorded.get(key) != expected:
            what = "another policy or prompt" if key == "tokens_sha256" else "another artifact"
            raise BundleError(
                f"{file}: holds the beginning of {what} ({key} {str(recorded.get(key))[:12]}…, expected {expected[:12]}…)",
                remedy="Take all files from one bundle, or export again.",
            )
    return arrays


def _metadata(tokens: Sequence[int], artifact_sha256: str) -> dict[str, str]:
    return {"tokens_sha256": digest(list(tokens)), "artifact_sha256": artifact_sha256}
