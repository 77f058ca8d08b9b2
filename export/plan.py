"""Plan: the decisions made before the slow part of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellama.checkpoints import Checkpoint
from edgellama.errors import RecipeError, UsageError
from edgellama.export.quantization.distillation import check_memory
from edgellama.export.quantization.rotation import rotated_config
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import BUDGETED, Recipe
from edgellama.targets import Target
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
        target.check(turned, recipe, length)
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
