"""Load what runs: a bundle's artifact in its runtime, or a checkpoint as the full-precision reference."""

from __future__ import annotations

from pathlib import Path

from edgellama.bundle import Bundle
from edgellama.errors import BundleError
from edgellama.runtimes.base import Runtime
from edgellama.targets import find_target


def load(bundle: Bundle | str | Path, target: str | None = None) -> Runtime:
    """The artifact for `target` (None: the bundle's first), verified and loaded in the runtime that runs it."""
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    if target is None:
        if not bundle.targets:
            raise BundleError(f"{bundle.path}: no artifact in it", remedy="Export the bundle again.")
        target = bundle.targets[0]
    row = find_target(target)
    runtime: Runtime = row.load("runtime")(bundle.artifact(target))
    if (runtime.vocab_size, runtime.context_length) != (bundle.config.vocab_size, bundle.context_length):
        runtime.close()
        raise BundleError(
            f"{bundle.path}: the artifact has a vocabulary of {runtime.vocab_size} and a context of "
            f"{runtime.context_length}, the manifest says {bundle.config.vocab_size} and {bundle.context_length}",
            remedy="Export the bundle again.",
        )
    return runtime


def load_reference(checkpoint: str | Path, context_length: int | None = None) -> Runtime:
    """The full-precision checkpoint, float32 on the CPU, under the same protocol as every artifact.

    context_length: None for the model's own, at most 2048 tokens (the KV cache is allocated whole).
    """
    from edgellama.checkpoints import open_checkpoint
    from edgellama.checkpoints.weights import load_llama
    from edgellama.runtimes.reference import ReferenceRuntime

    opened = open_checkpoint(checkpoint)
    length = context_length or min(opened.config.max_position_embeddings, 2048)
    return ReferenceRuntime(load_llama(opened, length))
