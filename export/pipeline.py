"""Checkpoint -> artifacts, in named stages: load, quantize, then one lowering for each target.

One model is loaded and quantized once; every target lowers that same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgellama.checkpoints.checkpoint import OUTSIDE, Checkpoint, layer_prefixes, load_weights
from edgellama.errors import RecipeError, UsageError
from edgellama.export.quantization.calibrate import calibrated_llama
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.distillation import check_memory, recover
from edgellama.export.quantization.rotation import rotated, rotated_config
from edgellama.export.quantization.tensors import (
    TensorRow,
    check_recipe,
    in_order,
    module_shapes,
    round_modules,
)
from edgellama.host.progress import Progress
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.recipe import BUDGETED, Recipe
from edgellama.targets.base import Target
from edgellama.targets.identity import Identity
from edgellama.text.calibration import Calibration, calibrate_on, calibration_texts
from edgellama.text.windows import Text

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
    calibration: Calibration | None = None

    @property
    def config(self) -> LlamaConfig:
        """Of the model that is quantized."""
        return rotated_config(self.checkpoint.config, self.recipe.rotation)


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    context: int | None,
    texts: Sequence[Text] | None = None,
) -> Plan:
    """The plan, proven applicable. `context` None: the model's own, at most 2048 tokens.

    texts: what a calibrated recipe reads; None for the calibration texts that ship with edgellama.

    Raises UsageError for a context that the model does not have, RecipeError for a recipe that does not fit,
    TextError for text that cannot be used.
    """
    config = checkpoint.config
    limit = config.max_position_embeddings
    length = min(limit, DEFAULT_CONTEXT) if context is None else context
    if not MIN_CONTEXT <= length <= limit:
        raise UsageError(
            f"a context of {length} tokens was asked for; this model can have {MIN_CONTEXT} to {limit}",
            remedy="Choose --context within these bounds; beyond them RoPE was never trained.",
        )
    turned = rotated_config(config, recipe.rotation)
    check_recipe(recipe, module_shapes(turned.tensor_shapes(), turned.tie_word_embeddings))
    if texts and not recipe.calibration_tokens:
        raise UsageError(
            f"calibration text was given, and recipe {recipe.name!r} reads none",
            remedy="Leave it out, or use a calibrated recipe (int4).",
        )
    if BUDGETED.get(recipe.algorithm, recipe.algorithm) == "recover":
        check_memory(config)
    plan = Plan(checkpoint, recipe, tuple(targets), length, calibration(checkpoint, recipe, length, texts))
    for target in targets:
        if recipe.kv_cache not in target.kv_caches:
            raise RecipeError(
                f"recipe {recipe.name!r}: target {target.name!r} has no kv_cache {recipe.kv_cache!r}",
                remedy=f"Use {' or '.join(target.kv_caches)}, or leave this target out.",
            )
        if target.check is not None:
            target.load("check")(turned, recipe, length)
    return plan


def calibration(
    checkpoint: Checkpoint, recipe: Recipe, context_length: int, texts: Sequence[Text] | None = None
) -> Calibration | None:
    """The windows that a calibrated recipe reads, of `texts` or of those that ship with edgellama; None for others."""
    if not recipe.calibration_tokens:
        return None
    return calibrate_on(
        texts or calibration_texts(), checkpoint.tokenizer, recipe.calibration_tokens, context_length
    )


def quantized_llama(
    checkpoint: Checkpoint,
    recipe: Recipe,
    context_length: int,
    progress: Progress | None = None,
    *,
    calibrated_on: Calibration | None = None,
    store: LayerStore | None = None,
) -> tuple[Llama, list[TensorRow]]:
    """The quantized torch model that the artifacts are lowered from, and a row for every tensor in it.

    calibrated_on: what a calibrated recipe reads; None for the texts that ship with edgellama. store: where its
    finished layers are kept; None for nowhere.
    """
    progress = progress or Progress()
    checkpoint = rotated(checkpoint, recipe.rotation)
    if recipe.calibration_tokens:
        read = calibrated_on or calibration(checkpoint, recipe, context_length)
        assert read is not None
        store = store or LayerStore()
        with progress.stage("calibrate"):
            model, rows = calibrated_llama(
                checkpoint, recipe, context_length, read, store=store, progress=progress
            )
        if recipe.algorithm == "recover":
            with progress.stage("recover"):
                recover(model, checkpoint, read, store=store, progress=progress)
        return model, rows
    with progress.stage("quantize"):
        return rounded_llama(checkpoint, recipe, context_length)


@torch.no_grad()
def rounded_llama(
    checkpoint: Checkpoint, recipe: Recipe, context_length: int
) -> tuple[Llama, list[TensorRow]]:
    """The model quantized by rounding, as the checkpoint is. A layer is read and rounded before the next, so that the float model is never in
    memory whole."""
    config = checkpoint.config
    schemes = check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    with torch.device("meta"):
        model = Llama(config, context_length)
    rows: list[TensorRow] = []
    for part in (OUTSIDE, *((prefix,) for prefix in layer_prefixes(checkpoint))):
        load_weights(model, checkpoint, part)
        rows += round_modules(model, {n: s for n, s in schemes.items() if f"{n}.".startswith(part)})
    return model.eval(), in_order(model, schemes, rows)


def run(
    plan: Plan,
    directory: Path,
    manifest: Mapping[str, Any],
    *,
    progress: Progress,
    store: LayerStore | None = None,
) -> tuple[list[dict[str, Any]], list[TensorRow], Llama]:
    """Write every target's artifact under `directory`: the manifest's artifact entries, the tensor rows, and the
    quantized model. `manifest`: what of it is known by now, for what artifacts say about themselves."""
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
        path, identity = target.artifact_in(directory), Identity.of(manifest, target)
        path.parent.mkdir(parents=True, exist_ok=True)
        target.load("lower")(model, path, identity, progress=progress)
        if target.client_files is not None:
            target.load("client_files")(plan.checkpoint, model, path, identity)
        entries.append(
            target.load("describe")(path, model) | {"target": target.name, "path": target.artifact}
        )
    return entries, rows, model
