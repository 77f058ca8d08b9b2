"""Known limits of the hardware of a Core ML profile, checked before anything slow starts."""

from __future__ import annotations

from edgellama.errors import RecipeError, UsageError
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe
from edgellama.targets.coreml.interface import PREFILL_TOKENS

STATE_MULTIPLE = 32  # of the last two dimensions of a state on the Neural Engine (apple/coremltools #2631)


def check_profile(config: LlamaConfig, recipe: Recipe, context_length: int) -> None:
    """Raises RecipeError or UsageError if the recipe's `coreml_profile` rules out the model.

    Profile `ane` rules out weights in groups, which the Neural Engine does not multiply (apple/coremltools
    #2510). It also rules out states whose positions or head_dim are not multiples of 32. Both profiles rule
    out a context shorter than a prefill call.
    """
    if context_length < PREFILL_TOKENS:
        raise UsageError(
            f"a Core ML package needs a context of at least {PREFILL_TOKENS} tokens, got {context_length}",
            remedy="Choose a larger --context.",
        )
    if recipe.coreml_profile != "ane":
        return
    schemes = check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    grouped = [name for name, scheme in schemes.items() if scheme is not None and scheme.group_size]
    if grouped:
        more = " …" if len(grouped) > 3 else ""
        raise RecipeError(
            f"recipe {recipe.name!r}: coreml_profile 'ane' with weights in groups ({', '.join(grouped[:3])}{more}), "
            "which the Neural Engine does not multiply",
            remedy="Give these modules one scale a row (group_size null; recipe int8-ane), or use coreml_profile 'gpu'.",
        )
    for dimension, size in (("context", context_length), ("head_dim", config.head_dim)):
        if size % STATE_MULTIPLE:
            raise UsageError(
                f"the Neural Engine fails on states whose dimensions are no multiples of {STATE_MULTIPLE}: the {dimension} "
                f"is {size}",
                remedy="Use coreml_profile 'gpu'."
                if dimension == "head_dim"
                else f"Choose --context {size // STATE_MULTIPLE * STATE_MULTIPLE}, or coreml_profile 'gpu'.",
            )
