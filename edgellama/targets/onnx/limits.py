"""Known limits of ONNX Runtime's kernels, checked before anything slow starts."""

from __future__ import annotations

from edgellama.errors import RecipeError
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe
from edgellama.targets.onnx.interface import LARGEST_BLOCK, SMALLEST_BLOCK, block_size

HEAD_STEP = 16  # GroupQueryAttention with rotary embeddings refuses any other size of a head


def check_heads(config: LlamaConfig, recipe: Recipe) -> None:
    """Raises RecipeError for form `ort` unless head_dim is a multiple of 16.

    ONNX Runtime 1.32 loads such a model and fails in its first call, for 4, 8, 12, 20, 24, 40 and 56 alike.
    """
    if recipe.onnx_form == "ort" and config.head_dim % HEAD_STEP:
        raise RecipeError(
            f"recipe {recipe.name!r}: head_dim is {config.head_dim}, and ONNX Runtime's own attention needs a multiple "
            f"of {HEAD_STEP}",
            remedy='Use a recipe with "onnx_form": "portable", or leave out target onnx.',
        )


def check_blocks(config: LlamaConfig, recipe: Recipe, context_length: int) -> None:
    """Raises RecipeError if groups or rows cannot be cut into blocks of 16, 32, 64, 128 or 256."""
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    names_by_problem: dict[str, list[str]] = {}
    for name, scheme in check_recipe(recipe, shapes).items():
        if scheme is None:
            continue
        block = block_size(scheme, shapes[name][1])
        if block & (block - 1) or block > LARGEST_BLOCK:
            names_by_problem.setdefault(
                f"groups of {block}, which is no power of two up to {LARGEST_BLOCK}", []
            ).append(name)
        elif block < SMALLEST_BLOCK:
            problem = f"rows of {shapes[name][1]}, which is no multiple of {SMALLEST_BLOCK}"
            names_by_problem.setdefault(problem, []).append(name)
    if names_by_problem:
        summary = "; ".join(
            f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} would have {problem}"
            for problem, names in names_by_problem.items()
        )
        raise RecipeError(
            f"recipe {recipe.name!r}: ONNX Runtime multiplies in blocks: {summary}",
            remedy="Use groups of 32, 64 or 128, or keep these modules in float (a rule with scheme null).",
        )
