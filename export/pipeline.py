"""Pipeline from checkpoint to artifacts: load, quantize, then one lowering for each target.

The model is loaded and quantized once, and every target lowers this model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.export.lower import lowering_for, write_client_files
from edgellama.export.plan import Plan
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.tensors import TensorRow
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama


def run(
    plan: Plan,
    directory: Path,
    manifest: Mapping[str, Any],
    *,
    progress: Progress,
    store: LayerStore | None = None,
) -> tuple[list[dict[str, Any]], list[TensorRow], Llama]:
    """Writes every target's artifact under `directory`.

    Returns the manifest's artifact entries, a row for each tensor, and the quantized model.

    manifest: the sections known before lowering; artifacts embed them as metadata.
    store: cache of calibrated layers; None for no cache.
    """
    model, rows = quantized_llama(
        plan.checkpoint,
        plan.recipe,
        plan.context_length,
        progress,
        calibrated_on=plan.calibration,
        store=store,
    )
    entries = []
    for target in plan.targets:
        path, provenance = target.artifact_in(directory), target.provenance(manifest)
        path.parent.mkdir(parents=True, exist_ok=True)
        lowering_for(target, plan.checkpoint.tokenizer)(model, path, provenance, progress=progress)
        write_client_files(target, plan.checkpoint, model, path, provenance)
        entries.append(target.describe(path, model) | {"target": target.name, "path": target.artifact})
    return entries, rows, model
