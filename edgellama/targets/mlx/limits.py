"""Known limits of MLX's formats, checked before anything slow starts."""

from __future__ import annotations

from edgellama.errors import RecipeError
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe
from edgellama.targets.mlx.interface import GROUP_SIZES, group_size
from edgellama.targets.mlx.rope import rope_scaling


def check_model(config: LlamaConfig, recipe: Recipe) -> None:
    """Raises RecipeError for groups that MLX has not, rows that they do not divide, and unknown RoPE factors."""
    rope_scaling(config)
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    for name, scheme in check_recipe(recipe, shapes).items():
        if scheme is None:
            continue
        columns = shapes[name][1]
        size = group_size(scheme, columns)
        if size not in GROUP_SIZES or columns % size:
            problem = (
                f"groups of {size}" if size not in GROUP_SIZES else f"rows of {columns}, no multiple of 32"
            )
            raise RecipeError(
                f"recipe {recipe.name!r}: {name} would have {problem}, and MLX has groups of "
                f"{', '.join(map(str, GROUP_SIZES[:-1]))} and {GROUP_SIZES[-1]}",
                remedy="Use groups of 32, 64 or 128, or keep these modules in float (a rule with scheme null).",
            )
