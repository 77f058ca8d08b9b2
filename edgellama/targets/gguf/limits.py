"""Limits of GGUF's blocks, checked before anything slow starts."""

from __future__ import annotations

from edgellama.errors import RecipeError
from edgellama.formats.gguf_blocks import BLOCK
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe


def check_blocks(config: LlamaConfig, recipe: Recipe) -> None:
    """Raises RecipeError if a quantized row cannot be cut into blocks of 32. Groups always can."""
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    schemes = check_recipe(recipe, shapes)
    odd = [name for name, scheme in schemes.items() if scheme is not None and shapes[name][1] % BLOCK]
    if odd:
        raise RecipeError(
            f"recipe {recipe.name!r}: GGUF stores weights in blocks of {BLOCK}, and {', '.join(odd[:3])}"
            f"{' …' if len(odd) > 3 else ''} {'have' if len(odd) > 1 else 'has'} rows of {shapes[odd[0]][1]}",
            remedy="Keep these modules in float (a rule with scheme null), or leave out target gguf.",
        )
