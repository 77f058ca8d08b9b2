"""Checkpoint -> artifacts, in named stages: load, quantize, then one lowering for each target.

One model is loaded and quantized once; every target lowers that same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgellama.checkpoint import Checkpoint, load_llama
from edgellama.errors import UsageError
from edgellama.export.quantize import TensorRow, check_recipe, module_shapes, quantize
from edgellama.identity import Identity
from edgellama.llama import Llama
from edgellama.progress import Progress
from edgellama.recipe import Recipe
from edgellama.targets import Target

DEFAULT_CONTEXT = 2048
MIN_CONTEXT = (
    8  # torch.export takes a length that can only be 2 for a constant, and nothing is said in 7 tokens
)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first slow step."""

    checkpoint: Checkpoint
    recipe: Recipe
    targets: tuple[Target, ...]
    context_length: int


def make_plan(checkpoint: Checkpoint, recipe: Recipe, targets: Sequence[Target], context: int | None) -> Plan:
    """The plan, proven applicable. `context` None: the model's own, at most 2048 tokens.

    Raises UsageError for a context that the model does not have, RecipeError for a recipe that does not fit.
    """
    config = checkpoint.config
    limit = config.max_position_embeddings
    length = min(limit, DEFAULT_CONTEXT) if context is None else context
    if not MIN_CONTEXT <= length <= limit:
        raise UsageError(
            f"a context of {length} tokens was asked for; this model can have {MIN_CONTEXT} to {limit}",
            remedy="Choose --context within these bounds; beyond them RoPE was never trained.",
        )
    check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    plan = Plan(checkpoint, recipe, tuple(targets), length)
    for target in targets:
        if target.check is not None:
            target.load("check")(checkpoint.config, recipe, length)
    return plan


def quantized_llama(
    checkpoint: Checkpoint, recipe: Recipe, context_length: int, progress: Progress | None = None
) -> tuple[Llama, list[TensorRow]]:
    """The quantized torch model that the artifacts are lowered from, and a row for every tensor in it."""
    progress = progress or Progress()
    with progress.stage("load"):
        model = load_llama(checkpoint, context_length)
    with progress.stage("quantize"), torch.no_grad():
        rows = quantize(model, recipe)
    return model, rows


def run(
    plan: Plan, directory: Path, identity: Identity, *, progress: Progress
) -> tuple[list[dict[str, Any]], list[TensorRow]]:
    """Write every target's artifact under `directory`: the manifest's artifact entries, and the tensor rows."""
    model, rows = quantized_llama(plan.checkpoint, plan.recipe, plan.context_length, progress)
    entries = []
    for target in plan.targets:
        path = target.artifact_in(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        target.load("lower")(model, path, identity, progress=progress)
        if target.client_files is not None:
            target.load("client_files")(plan.checkpoint, model, path, identity)
        entries.append(
            target.load("describe")(path, model) | {"target": target.name, "path": target.artifact}
        )
    return entries, rows
