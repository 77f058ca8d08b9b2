"""Families of processors by the rounding of MatMulNBits, which its kernels decide."""

from __future__ import annotations

from edgellama.recipe import Recipe
from edgellama.targets.families import ARM, ARM_DOTPROD, X86, Family

PER_BLOCK, PER_ROW, FLOAT = "per-block", "per-row", "float"
KLEIDIAI_BLOCK = 32  # KleidiAI takes blocks of int4 weights in multiples of this


def families(recipe: Recipe) -> tuple[Family, ...]:
    """Families that an artifact of `recipe` meets; () if no kernel rounds an input.

    >>> from edgellama.recipe import RECIPES
    >>> [family.name for family in families(RECIPES["int4"])]
    ['per-block', 'per-row', 'float']
    >>> [family.name for family in families(RECIPES["int8"])]
    ['per-block', 'float']
    """
    bits = {rule.scheme.bits for rule in recipe.rules if rule.scheme and rule.modules != "model.embed_tokens"}
    if recipe.onnx_form != "ort" or not bits:
        return ()
    floats = Family(FLOAT, (ARM,))
    if 4 not in bits or recipe.onnx_rounding == "per-block":
        return Family(PER_BLOCK, (X86, ARM_DOTPROD)), floats
    return Family(PER_BLOCK, (X86,)), Family(PER_ROW, (ARM_DOTPROD,)), floats
