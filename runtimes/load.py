"""Loading of runtimes: a bundle's artifact, or a checkpoint as the full-precision reference."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgellama.bundle import Bundle
from edgellama.errors import BundleError
from edgellama.host.torch_defaults import check_torch_defaults
from edgellama.model.config import LlamaConfig
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.classify import TextClassifier
from edgellama.runtimes.parts import PartsRuntime
from edgellama.targets import Target, find_target


def load(bundle: Bundle | str | Path, target: str | None = None) -> Runtime:
    """Returns the artifact for `target`, verified and loaded in its runtime.

    target: None for the bundle's first. Raises BundleError for a bundle without artifacts, or for an artifact
    whose vocabulary or context differs from the manifest.

    >>> import edgellama
    >>> with edgellama.load(bundle, target="xnnpack") as runtime:
    ...     logits = runtime.forward([1, 2, 3])
    >>> runtime.name, logits.shape == (runtime.vocab_size,)
    ('executorch-xnnpack', True)
    """
    check_torch_defaults()
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    if target is None:
        if not bundle.targets:
            raise BundleError(f"{bundle.path}: no artifact in it", remedy="Export the bundle again.")
        target = bundle.targets[0]
    resolved_target = find_target(target)
    runtime = open_runtime(resolved_target, bundle.artifact(target))
    expected = bundle.config.vocab_size, bundle.config.output_size, bundle.context_length
    if (runtime.vocab_size, runtime.output_size, runtime.context_length) != expected:
        runtime.close()
        raise BundleError(
            f"{bundle.path}: the artifact has a vocabulary of {runtime.vocab_size}, {runtime.output_size} logits and a "
            f"context of {runtime.context_length}, the manifest says {', '.join(map(str, expected))}",
            remedy="Export the bundle again.",
        )
    runtime.adapters = bundle.adapter_files(target)
    runtime.text_classifier = TextClassifier.of(bundle, target)
    return runtime


class Opener(Protocol):
    """Opens the artifact at a path. threads: None for the runtime's own number.

    Raises UsageError for a number of threads if the runtime chooses its number itself.
    """

    def __call__(self, path: Path, *, threads: int | None = None) -> Runtime: ...


def opener_for(target: Target) -> Opener:
    """Returns the opener of `target`'s artifacts.

    Raises MissingDependencyError if the runtime's packages are not installed.
    """
    with target.needs_extra():
        match target.name:
            case "xnnpack":
                from edgellama.runtimes.xnnpack import PteRuntime

                return PteRuntime
            case "coreml":
                from edgellama.runtimes.coreml import open_coreml

                return open_coreml
            case "coreml-pte":
                from edgellama.runtimes.coreml import open_coreml_pte

                return open_coreml_pte
            case "onnx":
                from edgellama.runtimes.onnx import OrtRuntime

                return OrtRuntime
            case "mlx":
                from edgellama.runtimes.mlx import MlxRuntime

                return MlxRuntime
            case "gguf":
                from edgellama.runtimes.gguf import GgufRuntime
                from edgellama.runtimes.llama_cpp import library

                library()
                return GgufRuntime
    raise LookupError(f"no runtime for target {target.name!r}")


def open_parts(target: Target, path: Path, config: LlamaConfig) -> PartsRuntime:
    """Opens the artifact of `target` at `path`. Raises BundleError if its layers cannot be told apart."""
    with target.needs_extra():
        match target.name:
            case "xnnpack":
                from edgellama.runtimes.xnnpack import PteParts

                return PteParts.of(path, config.num_hidden_layers)
            case "coreml" | "coreml-pte":
                from edgellama.runtimes.coreml import open_coreml_parts

                return open_coreml_parts(
                    path, config.num_hidden_layers, inside_pte=target.name == "coreml-pte"
                )
            case "onnx":
                from edgellama.runtimes.onnx import OrtParts

                return OrtParts(path, config.num_hidden_layers)
            case "mlx":
                from edgellama.runtimes.mlx import MlxParts

                return MlxParts(path)
            case "gguf":
                from edgellama.runtimes.gguf import GgufParts

                return GgufParts(path, config.num_hidden_layers)
    raise LookupError(f"no runtime for target {target.name!r}")


def open_runtime(target: Target, path: Path, *, threads: int | None = None) -> Runtime:
    """Returns the artifact of `target` at `path`, loaded in its runtime."""
    return opener_for(target)(path, threads=threads)


def open_in_own_dtype(target: Target, path: Path) -> Runtime | None:
    """Returns the artifact in a runtime that computes in the dtype of the file.

    None for a target whose runtime always does.
    """
    if target.name != "mlx":
        return None
    with target.needs_extra():
        from edgellama.runtimes.mlx import MlxRuntime

    return MlxRuntime(path, own_dtype=True)


def open_device_form(target: Target, path: Path, *, threads: int | None = None) -> Runtime | None:
    """The artifact in the form that apps run, for a target whose `open_runtime` has another; None for others."""
    if target.name != "gguf":
        return None
    with target.needs_extra():
        from edgellama.runtimes.gguf import GgufRuntime

        return GgufRuntime(path, threads=threads, repacked=True)


def load_reference(checkpoint: str | Path, context_length: int | None = None) -> Runtime:
    """Returns the full-precision checkpoint as a runtime, float32 on the CPU.

    context_length: None for the model's own, at most 2048 tokens, because the KV cache is allocated whole.

    >>> import edgellama
    >>> with edgellama.load_reference(model, context_length=64) as reference:
    ...     reference.name, reference.context_length
    ('torch-reference', 64)
    """
    from edgellama.checkpoints import open_checkpoint
    from edgellama.checkpoints.weights import load_llama
    from edgellama.runtimes.reference import ReferenceRuntime

    check_torch_defaults()
    opened = open_checkpoint(checkpoint)
    length = context_length or min(opened.config.max_position_embeddings, 2048)
    return ReferenceRuntime(load_llama(opened, length))
