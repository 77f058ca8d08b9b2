"""What an export would make and take, before it starts: bytes and memory of each artifact, and of the export itself.

Bytes are those of the weights and tables under the recipe. Memory on the device is modelled on what the runtimes do
with them; the constants were found with SmolLM2-135M (see README) and are compared with measurements in the tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellama.checkpoints import Checkpoint
from edgellama.errors import ResourceError
from edgellama.export.plan import Plan
from edgellama.export.quantization.rotation import rotated_config
from edgellama.host.memory import available_memory
from edgellama.model.config import LlamaConfig
from edgellama.recipe import Recipe
from edgellama.targets import Target
from edgellama.targets.sizes import planned_bytes

SCHEMA = "edgellama.plan/1"
BASE_MEMORY = 800_000_000  # of an export: Python, torch and the exporters' libraries
TOLERANCE = 0.8  # a forecast may be this far off: less memory than this share of it is surely too little
SPARE_DISK = 64_000_000  # beside the artifacts: tokenizer, golden vectors, reports

# Seconds for a million parameters on two x86-64 cores with AVX2: SmolLM2-135M and a random model of 1B's shape.
_LOWER_SECONDS, _CALIBRATE_SECONDS, _GATE_SECONDS = 0.25, 1.7, 0.8


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the full context. weights: in the file. activations: beside the KV cache."""

    weights: int
    kv_cache: int
    activations: int
    peak_estimate: int


@dataclass(frozen=True)
class Forecast:
    """One artifact."""

    target: str
    bytes: int
    memory: Memory


@dataclass(frozen=True)
class ExportForecast:
    """What an export takes on the machine that makes it. seconds: rough, on two x86-64 cores with nothing else to do."""

    peak_memory_bytes: int
    disk_bytes: int
    seconds: int


def forecast_artifact(config: LlamaConfig, recipe: Recipe, target: Target, context_length: int) -> Forecast:
    """Bytes and memory of the artifact for `target`, without reading a weight."""
    size = planned_bytes(config, recipe, target.storage, context_length)
    kv = config.num_key_value_heads * config.head_dim
    width = target.compute_bytes
    # int8 has a float32 scale and an int8 zero point for each head of each token
    row = kv * width if recipe.kv_cache == "float" else kv + 5 * config.num_key_value_heads
    cache = 2 * row * config.num_hidden_layers * context_length
    activations = width * target.activation_floats(config, context_length)
    return Forecast(target.name, size, Memory(size, cache, activations, size + cache + activations))


def forecast_export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    context_length: int,
    *,
    validate: bool = True,
) -> ExportForecast:
    """Memory, disk and time of the export; the memory within some 20 %, the time within a factor of two."""
    config = rotated_config(checkpoint.config, recipe.rotation)
    artifacts = [planned_bytes(config, recipe, t.storage, context_length) for t in targets]
    stored = sum(info.nbytes for info in checkpoint.infos.values())
    # Codes are held as int8 with float32 scales; the artifact being written is there once more; golden vectors take
    # about what the checkpoint does (a 1B shape: 6.4 GB where this says 7.0). The gate has the full-precision model in
    # float32 as well, and logits of whole contexts, up to three sets of them.
    codes = config.parameters * 5 // 4
    lowering = codes + 2 * max(artifacts) + stored
    logits = 3 * 4 * context_length * config.vocab_size
    gate = codes + 4 * config.parameters + max(artifacts) * 2 + logits if validate else 0
    millions = config.parameters / 1e6
    seconds = 20 + millions * (
        len(targets) * (_LOWER_SECONDS + (_GATE_SECONDS if validate else 0))
        + (_CALIBRATE_SECONDS if recipe.calibration_tokens else 0)
    )
    kept = (
        config.parameters * 5 // 4 if recipe.calibration_tokens else 0
    )  # finished layers, until the bundle is written
    return ExportForecast(BASE_MEMORY + max(lowering, gate), sum(artifacts) + kept + SPARE_DISK, int(seconds))


def describe(plan: Plan, *, validate: bool = True) -> dict[str, Any]:
    """The whole forecast as JSON, schema edgellama.plan/1 (recipe `auto` adds the `points` that it can choose)."""
    config, recipe, length = plan.config, plan.recipe, plan.context_length
    whole = forecast_export(plan.checkpoint, recipe, plan.targets, length, validate=validate)
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "context_length": length,
        "parameters": plan.checkpoint.config.parameters,
        "artifacts": [asdict(forecast_artifact(config, recipe, target, length)) for target in plan.targets],
        "export": asdict(whole),
    }


def check_resources(plan: Plan, destination: Path, *, validate: bool) -> None:
    """Refuse, before the slow part, an export for which memory or disk surely do not suffice. Raises ResourceError."""
    need = forecast_export(plan.checkpoint, plan.recipe, plan.targets, plan.context_length, validate=validate)
    memory = available_memory()
    if memory is not None and memory < TOLERANCE * need.peak_memory_bytes:
        raise ResourceError(
            f"the export would take about {need.peak_memory_bytes / 1e9:.1f} GB of memory, and "
            f"{memory / 1e9:.1f} GB are free",
            remedy="Close other programs, raise the container's limit, export one target at a time, or leave the gate "
            "to `edgellama validate` on a larger machine (--no-validate).",
        )
    folder = destination.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < need.disk_bytes:
        raise ResourceError(
            f"the bundle and what is kept on the way take about {need.disk_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
            f"are free on the disk of {folder}",
            remedy="Free some space, or choose another place with -o.",
        )
