"""Forecast of an export before it starts: bytes and memory of each artifact, and needs of the export itself.

Bytes are those of the weights and tables under the recipe. Memory on the device is modelled on the behaviour
of the runtimes. The constants come from SmolLM2-135M (see docs/benchmarks.md). Tests compare them with measurements.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import is_kept, is_viewed
from edgellama.errors import ResourceError
from edgellama.export.forecast_time import stages
from edgellama.export.plan import Plan
from edgellama.export.quantization.given import given_summary
from edgellama.export.quantization.rotation import rotated_config
from edgellama.host.machine_speed import machine_speed
from edgellama.host.memory import available_memory
from edgellama.host.threads import available
from edgellama.model.config import LlamaConfig
from edgellama.model.layer_pass import GROUP_TOKENS
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import GIVEN, Recipe
from edgellama.targets import Target
from edgellama.targets.sizes import planned_bytes

SCHEMA = "edgellama.plan/1"
BASE_MEMORY = 700_000_000  # of an export: Python, torch and the exporters' libraries
_LOGIT_ROWS = 6 * 256  # logits of a window: both models, with noise, and copies in float64
TOLERANCE = 0.8  # error of a forecast: less memory than this share of it is surely too little
SPARE_DISK = 64_000_000  # beside the artifacts: tokenizer, golden vectors, reports


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the full context. weights: in the file. activations: without the KV cache."""

    weights: int
    kv_cache: int
    activations: int
    peak_estimate: int


@dataclass(frozen=True)
class Forecast:
    """Forecast of one artifact."""

    target: str
    bytes: int
    memory: Memory


@dataclass(frozen=True)
class ExportForecast:
    """Needs of an export on the machine that runs it."""

    peak_memory_bytes: int
    disk_bytes: int


def forecast_artifact(config: LlamaConfig, recipe: Recipe, target: Target, context_length: int) -> Forecast:
    """Bytes and memory of the artifact for `target`, without reading a weight."""
    size = planned_bytes(config, recipe, target.storage, context_length)
    kv = config.num_key_value_heads * config.head_dim
    width = target.compute_bytes
    # int8 has a float32 scale and an int8 zero point per head and token.
    token_bytes = kv * width if recipe.kv_cache == "float" else kv + 5 * config.num_key_value_heads
    cache = 2 * token_bytes * config.num_hidden_layers * context_length
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
    """Memory and disk of the export. Memory is within some 20 %."""
    config = rotated_config(checkpoint.config, recipe.rotation)
    artifacts = [planned_bytes(config, recipe, t.storage, context_length) for t in targets]
    model = model_bytes(config, recipe)
    lowering = model + max(t.copies * size for t, size in zip(targets, artifacts, strict=True))
    # Both references pass through the layers for the golden vectors, with or without the gate.
    kept = 4 * config.parameters if is_kept(checkpoint) else 0
    references = model + kept + _layer_bytes(config) + _LOGIT_ROWS * 4 * config.output_size
    # The runtime holds its own copy of the weights, reads the tables from the mapped file, and fills its context.
    runtimes = [forecast_artifact(config, recipe, target, context_length).memory for target in targets]
    gate = references + max(memory.peak_estimate for memory in runtimes) if validate else 0
    # Calibrated layers stay on disk until the bundle is written.
    layer_cache = config.parameters * 5 // 4 if recipe.calibration_tokens else 0
    return ExportForecast(
        BASE_MEMORY + int(max(lowering, references, gate)),
        sum(artifacts) + layer_cache + SPARE_DISK,
    )


def forecast_time(plan: Plan, *, validate: bool = True) -> dict[str, Any]:
    """Wall time on this machine's cores when they are idle, and the processor time of each stage, in seconds."""
    found = stages(
        plan.config,
        plan.recipe,
        plan.targets,
        plan.context_length,
        machine_speed(),
        validate=validate,
        dequantized=not is_viewed(plan.checkpoint),
    )
    cores = available()
    return {
        "seconds": round(sum(stage.seconds(cores) for stage in found)),
        "processor_seconds": round(sum(stage.processor_seconds for stage in found)),
        "cores": cores,
        "stages": {stage.name: round(stage.processor_seconds, 1) for stage in found},
    }


def model_bytes(config: LlamaConfig, recipe: Recipe) -> int:
    """Bytes of the quantized model in memory: a byte for each code, and float32 for all other weights.

    A group has a float32 scale and an int8 zero point. Tied tables are one if their schemes are.
    """
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    schemes = check_recipe(recipe, shapes)
    forms = {name: scheme and (scheme.bits, scheme.group_size) for name, scheme in schemes.items()}
    total = 0
    for name, scheme in schemes.items():
        if name == "lm_head" and config.tie_word_embeddings and forms[name] == forms["model.embed_tokens"]:
            continue
        count = math.prod(shapes[name])
        total += 4 * count if scheme is None else count + 5 * count // (scheme.group_size or shapes[name][-1])
    return total


def _layer_bytes(config: LlamaConfig) -> int:
    """Bytes of one layer in float32, and of the values between its linears for a group of tokens."""
    layers = [math.prod(shape) for name, shape in config.tensor_shapes().items() if ".layers.0." in name]
    values = 3 * config.intermediate_size + 4 * config.hidden_size
    return 4 * (sum(layers) + GROUP_TOKENS * values)


def describe(plan: Plan, *, validate: bool = True) -> dict[str, Any]:
    """The forecast as JSON, schema edgellama.plan/1.

    With recipe `auto`, the command adds the `points` to choose from.
    """
    config, recipe, length = plan.config, plan.recipe, plan.context_length
    export_forecast = forecast_export(plan.checkpoint, recipe, plan.targets, length, validate=validate)
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "context_length": length,
        "parameters": plan.checkpoint.config.parameters,
        **({"codes": given_summary(plan.checkpoint, recipe)} if recipe.algorithm == GIVEN else {}),
        "artifacts": [asdict(forecast_artifact(config, recipe, target, length)) for target in plan.targets],
        "export": asdict(export_forecast) | forecast_time(plan, validate=validate),
    }


def _fitting_option(plan: Plan, memory: int, *, validate: bool) -> str | None:
    """Remedy whose forecast fits into `memory`; None if there is none."""

    def need(targets: Sequence[Target], *, gate: bool) -> int:
        return forecast_export(
            plan.checkpoint, plan.recipe, targets, plan.context_length, validate=gate
        ).peak_memory_bytes

    alone = max(need([target], gate=validate) for target in plan.targets)
    if len(plan.targets) > 1 and TOLERANCE * alone <= memory:
        return f"Export one target at a time: that takes {alone / 1e9:.1f} GB."
    ungated = need(plan.targets, gate=False)
    if validate and TOLERANCE * ungated <= memory:
        return (
            f"Leave the gate to `edgellama validate` on a larger machine (--no-validate): the export alone takes "
            f"{ungated / 1e9:.1f} GB."
        )
    return None


def check_resources(plan: Plan, destination: Path, *, validate: bool) -> None:
    """Raises ResourceError, before the slow part, if memory or disk surely do not suffice."""
    need = forecast_export(plan.checkpoint, plan.recipe, plan.targets, plan.context_length, validate=validate)
    memory = available_memory()
    if memory is not None and memory < TOLERANCE * need.peak_memory_bytes:
        raise ResourceError(
            f"the export would take about {need.peak_memory_bytes / 1e9:.1f} GB of memory, and "
            f"{memory / 1e9:.1f} GB are free",
            remedy=_fitting_option(plan, memory, validate=validate)
            or "Close other programs, raise the container's limit, or export on a larger machine.",
        )
    folder = destination.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < need.disk_bytes:
        raise ResourceError(
            f"the bundle and its temporary files take about {need.disk_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB "
            f"are free on the disk of {folder}",
            remedy="Free some space, or choose another place with -o.",
        )
