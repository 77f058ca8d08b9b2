"""Plan: decisions made before the slow part of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.adapters.swappable import Swappable
from edgellama.errors import RecipeError, UsageError
from edgellama.export.lower import tokenizer_section
from edgellama.export.quantization.distillation import check_memory
from edgellama.export.quantization.given import resolved_recipe
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
        recipe: the recipe. A budgeted one gets its schemes after its sensitivities are measured, and one for given
            codes has the schemes of the checkpoint.
        targets: the targets, in order.
        context_length: length of the KV cache in tokens.
        calibration: calibration windows; None for a recipe without calibration.
        swappable: adapters that are switched at run time.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    targets: tuple[Target, ...]
    context_length: int
    calibration: Calibration | None = None
    swappable: tuple[Swappable, ...] = ()

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
    recipe = resolved_recipe(checkpoint, recipe, targets)
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
        check_int8_groups(target, recipe, rotated)
        target.check(rotated, recipe, length)
        tokenizer_section(target, checkpoint.tokenizer, checkpoint.config)
    return plan


def check_int8_groups(target: Target, recipe: Recipe, config: LlamaConfig) -> None:
    """Raises RecipeError for int8 weights in groups if the target has only int8 weights with a scale per row."""
    schemes = check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    grouped = [name for name, s in schemes.items() if s is not None and s.bits == 8 and s.group_size]
    if grouped and not target.int8_groups:
        raise RecipeError(
            f"recipe {recipe.name!r}: {', '.join(grouped[:3])}{' …' if len(grouped) > 3 else ''} would be int8 in groups, "
            f"and target {target.name!r} has int8 with one scale a row",
            remedy="Use recipe int8, whose second rounding at 8 bits costs little, or leave this target out.",
        )


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
