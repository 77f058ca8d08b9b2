"""Lowering of a quantized model to the artifact of a target: one case a target, imported when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgellama.checkpoints import Checkpoint
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.targets import Target
from edgellama.targets.provenance import Provenance


class Lowering(Protocol):
    """Writes the quantized `model` as an artifact at `path`. Raises LoweringError for a model that the format cannot hold."""

    def __call__(self, model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None: ...


def lowering_for(target: Target) -> Lowering:
    """The lowering of `target`. Raises MissingDependencyError where its packages are not installed."""
    with target.needs_extra():
        match target.name:
            case "xnnpack":
                from edgellama.export.xnnpack.lower import lower_to_xnnpack

                return lower_to_xnnpack
            case "coreml":
                from edgellama.export.coreml.lower import lower_to_coreml

                return lower_to_coreml
            case "coreml-pte":
                from edgellama.export.coreml.lower_pte import lower_to_coreml_pte

                return lower_to_coreml_pte
            case "onnx":
                from edgellama.export.onnx.lower import lower_to_onnx

                return lower_to_onnx
    raise LookupError(f"no lowering for target {target.name!r}")


def write_client_files(
    target: Target, checkpoint: Checkpoint, model: Llama, path: Path, provenance: Provenance
) -> None:
    """Write the files that the target's clients read beside the artifact at `path`, if there are any."""
    if target.name == "onnx":
        from edgellama.export.onnx.genai import write_client_files

        write_client_files(checkpoint, model, path, provenance)
