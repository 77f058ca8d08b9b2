"""Plan: decisions made before the slow part of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellama.checkpoints import Checkpoint
from edgellama.errors import RecipeError, UsageError
from edgellama.export.lower import tokenizer_section
from edgellama.export.quantization.distillation import check_memory
from edgellama.export.quantization.rotation import rotated_config
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import BUDGETED, Recipe, check_name
from edgellama.targets import Target
from edgellama.text.calibration import Calibration, calibrate_on, calibration_texts
from edgellama.text.windows import Text

DEFAULT_CONTEXT = 2048
# torch.export treats a length that can only be 2 as a constant, and 7 tokens hold no useful text.
MIN_CONTEXT = 8


@dataclass(frozen=True)
class Plan:
    """Decisions that are made before the first slow step.

    Attributes:
        checkpoint: the full-precision checkpoint.
        recipe: the recipe. A budgeted one gets its schemes after its sensitivities are measured.
        targets: the targets, in order.
        context_length: length of the KV cache in tokens.
        calibration: calibration windows; None for a recipe without calibration.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    targets: tuple[Target, ...]
    context_length: int
    calibration: Calibration | None = None

    @property
    def config(self) -> LlamaConfig:
        """Configuration of the model that is quantized, after rotation."""
        return rotated_config(self.checkpoint.config, self.recipe.rotation)


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    context: int | None,
    texts: Sequence[Text] | None = None,
) -> Plan:
    """Makes a plan and checks that it can be applied.

    Args:
        checkpoint: the full-precision checkpoint.
        recipe: the recipe.
        targets: the targets.
        context: length of the KV cache in tokens; None for the model's own, at most 2048.
        texts: texts for a calibrated recipe; None for those that ship with edgellama.

    Raises UsageError for a context that the model does not support, and for texts without a calibrated
    recipe. Raises RecipeError for a recipe that does not fit, TextError for text that cannot be used.
    """
    config = checkpoint.config
    limit = config.max_position_embeddings
    length = min(limit, DEFAULT_CONTEXT) if context is None else context
    if not MIN_CONTEXT <= length <= limit:
        raise UsageError(
            f"a context of {length} tokens was asked for; this model can have {MIN_CONTEXT} to {limit}",
            remedy="Choose --context within these bounds; beyond them RoPE was never trained.",
        )
    check_name(recipe)
    rotated = rotated_config(config, recipe.rotation)
    check_recipe(recipe, module_shapes(rotated.tensor_shapes(), rotated.tie_word_embeddings))
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
        target.check(rotated, recipe, length)
        tokenizer_section(target, checkpoint.tokenizer, checkpoint.config)
    return plan


def calibration(
    checkpoint: Checkpoint, recipe: Recipe, context_length: int, texts: Sequence[Text] | None = None
) -> Calibration | None:
    """Windows of `texts` for a calibrated recipe; None for other recipes.

    texts: None for the calibration texts that ship with edgellama.
    """
    if not recipe.calibration_tokens:
        return None
    return calibrate_on(
        texts or calibration_texts(), checkpoint.tokenizer, recipe.calibration_tokens, context_length
    )
