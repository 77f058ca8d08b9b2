"""What ONNX Runtime's kernels are known not to multiply, refused before anything slow starts."""

from __future__ import annotations

from edgellama.errors import RecipeError
from edgellama.model.config import LlamaConfig
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe
from edgellama.targets.onnx.interface import LARGEST_BLOCK, SMALLEST_BLOCK, block_size


def check_blocks(config: LlamaConfig, recipe: Recipe, context_length: int) -> None:
    """Raises RecipeError for groups and rows that cannot be cut into blocks of 16, 32, 64, 128 or 256."""
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    bad: dict[str, list[str]] = {}
    for name, scheme in check_recipe(recipe, shapes).items():
        if scheme is None:
            continue
        block = block_size(scheme, shapes[name][1])
        if block & (block - 1) or block > LARGEST_BLOCK:
            bad.setdefault(f"groups of {block}, which is no power of two up to {LARGEST_BLOCK}", []).append(
                name
            )
        elif block < SMALLEST_BLOCK:
            what = f"rows of {shapes[name][1]}, which is no multiple of {SMALLEST_BLOCK}"
            bad.setdefault(what, []).append(name)
    if bad:
        found = "; ".join(
            f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} would have {what}"
            for what, names in bad.items()
        )
        raise RecipeError(
            f"recipe {recipe.name!r}: ONNX Runtime multiplies in blocks: {found}",
            remedy="Use groups of 32, 64 or 128, or keep these modules in float (a rule with scheme null).",
        )
