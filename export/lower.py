"""Lowering of a quantized model to a target's artifact: one case per target, imported on demand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edgellama.checkpoints import Checkpoint
from edgellama.host.progress import Progress
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.targets import Target
from edgellama.targets.adapters import StoredAdapter
from edgellama.targets.provenance import Provenance
from edgellama.text.tokenizer import Tokenizer


class Lowering(Protocol):
    """Writes the quantized `model` as an artifact at `path`.

    Raises LoweringError if the format cannot hold the model.
    """

    def __call__(self, model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None: ...


def lowering_for(target: Target, tokenizer: Tokenizer | None = None) -> Lowering:
    """Returns the lowering of `target`. Raises MissingDependencyError if its packages are not installed.

    tokenizer: for formats that hold it in the artifact; None leaves it out.
    """
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
            case "mlx":
                from edgellama.export.mlx.lower import lower_to_mlx

                return lower_to_mlx
            case "gguf":
                from edgellama.export.gguf.lower import lower_to_gguf

                return partial(lower_to_gguf, tokenizer=tokenizer)
    raise LookupError(f"no lowering for target {target.name!r}")


def write_adapter(target: Target, adapter: StoredAdapter, path: Path) -> None:
    """Writes the file of an adapter that the runtime of `target` can switch."""
    with target.needs_extra():
        match target.name:
            case "onnx":
                from edgellama.export.onnx import adapters

                adapters.write_adapter(adapter, path)
            case "gguf":
                from edgellama.export.gguf.adapters import write_adapter

                write_adapter(adapter, path)
            case _:
                raise LookupError(f"no adapters for target {target.name!r}")


def write_client_files(
    target: Target, checkpoint: Checkpoint, model: Llama, path: Path, provenance: Provenance
) -> None:
    """Writes the files, if any, that the target's clients read beside the artifact at `path`."""
    for name, content in client_files(target, checkpoint.tokenizer.files, model, provenance).items():
        (path / name).write_bytes(content)


def client_files(
    target: Target, tokenizer_files: Mapping[str, bytes], model: Llama, provenance: Provenance
) -> dict[str, bytes]:
    """Content, by name, of the files that the target's clients read beside the artifact. Weights are not read."""
    if model.config.is_classifier:
        return {}  # those clients generate text
    if target.name == "onnx":
        from edgellama.export.onnx.genai import client_files

        return client_files(tokenizer_files, model, provenance)
    if target.name == "mlx":
        from edgellama.export.mlx import files

        return files.client_files(tokenizer_files, model, provenance)
    return {}


def tokenizer_section(target: Target, tokenizer: Tokenizer, config: LlamaConfig) -> Mapping[str, Any]:
    """Entries that describe the tokenizer in an artifact of `target`; none for formats without a tokenizer.

    Raises TokenizerError for a tokenizer that the format cannot hold. Weights are not read.
    """
    if target.name == "gguf":
        from edgellama.export.gguf.tokenizer import tokenizer_keys

        return tokenizer_keys(tokenizer, config)
    return {}
