"""Pipeline from checkpoint to artifacts: load, quantize, then one lowering for each target.

The model is loaded and quantized once, and every target lowers this model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.checkpoints.adapters.swappable import FOLDER
from edgellama.export.lower import lowering_for, write_adapter, write_client_files
from edgellama.export.plan import Plan
from edgellama.export.quantization.adapter_basis import AdapterBasis
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.tensors import TensorRow
from edgellama.host.memory import return_freed_memory
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.targets import Target
from edgellama.targets.provenance import Provenance


def run(
    plan: Plan,
    directory: Path,
    manifest: Mapping[str, Any],
    *,
    progress: Progress,
    store: LayerStore | None = None,
) -> tuple[list[dict[str, Any]], list[TensorRow], Llama]:
    """Writes every target's artifact and adapters under `directory`.

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
        write_adapters(plan, model, target, directory, provenance)
        entries.append(target.describe(path, model) | {"target": target.name, "path": target.artifact})
        return_freed_memory()
    return entries, rows, model


def write_adapters(plan: Plan, model: Llama, target: Target, directory: Path, provenance: Provenance) -> None:
    """Writes the adapters that the runtime of `target` switches, in the basis of the quantized `model`."""
    if not plan.swappable:
        return
    basis = AdapterBasis(plan.checkpoint, plan.recipe.rotation, model)
    (directory / FOLDER).mkdir(exist_ok=True)
    for swappable in plan.swappable:
        planned = target.planned_adapter(basis.moved(swappable.pairs()), model.config, provenance)
        write_adapter(target, planned, directory / FOLDER / f"{swappable.name}{target.adapter_ending}")
