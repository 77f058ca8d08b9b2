"""Quantization schemes of a recipe, resolved for the modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgellama.errors import RecipeError
from edgellama.recipe import GIVEN, PerChannel, Recipe, Scheme


def check_recipe(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Scheme | None]:
    """Scheme of every module in `shapes`, checked before any slow step. None: the module stays float.

    A group size equal to the row length becomes per-channel. In every format both mean one scale for the row.

    Raises RecipeError if a group size does not divide a row, and names the layers and the sizes that divide
    it. Raises it also if the embedding is not weight-only int8 per channel, or if a linear is weight-only.
    """
    schemes = recipe.assign(shapes)
    bad: dict[int, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None and scheme.group_size and shapes[name][1] % scheme.group_size:
            bad.setdefault(shapes[name][1], []).append(name)
    if bad:
        misfits = "; ".join(
            f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} have rows of {columns}"
            for columns, names in bad.items()
        )
        fits = [g for g in (128, 64, 32) if not any(columns % g for columns in bad)]
        raise RecipeError(
            f"recipe {recipe.name!r}: its groups do not divide every row: {misfits}",
            remedy=(
                f"Group sizes that divide them: {', '.join(map(str, fits))}. "
                if fits
                else "No group size divides them. "
            )
            + "Or add a rule above that gives these modules int8 per channel (group_size null, bits 8).",
        )
    embedding = schemes["model.embed_tokens"]
    grouped = embedding is not None and embedding.group_size is not None and recipe.algorithm != GIVEN
    if embedding is not None and (embedding.bits != 8 or grouped or embedding.int8_activations):
        raise RecipeError(
            f"recipe {recipe.name!r}: the embedding cannot be {embedding.describe()}",
            remedy="Give model.embed_tokens 8 bits, group_size null and int8_activations false, or null for float32.",
        )
    for name, scheme in schemes.items():
        if name != "model.embed_tokens" and scheme is not None and not scheme.int8_activations:
            raise RecipeError(
                f"recipe {recipe.name!r}: {name} would have integer weights and float activations, which XNNPACK "
                "computes without applying the scales",
                remedy="Set int8_activations to true for linears.",
            )
    return {
        name: replace(scheme, granularity=PerChannel())
        if scheme is not None and scheme.group_size == shapes[name][1]
        else scheme
        for name, scheme in schemes.items()
    }


def module_shapes(model_shapes: dict[str, tuple[int, ...]], tied: bool) -> dict[str, tuple[int, ...]]:
    """Weight shape of every quantizable module, from a config's `tensor_shapes`, with a tied lm_head too."""
    shapes: dict[str, tuple[int, ...]] = {
        n.removesuffix(".weight"): s for n, s in model_shapes.items() if n.endswith(".weight") and len(s) == 2
    }
    if tied:
        shapes["lm_head"] = shapes["model.embed_tokens"]
    return shapes
