"""Given codes (algorithm `given`): the codes of a quantized checkpoint go into the model as they are.

Nothing is folded, rotated, calibrated or rounded again. Tables that the checkpoint left in float, or in a form
that a target cannot hold, follow the recipe's own rules and are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.given import Given
from edgellama.errors import RecipeError
from edgellama.export.quantization.tensors import (
    Schemes,
    TensorRow,
    apply_recorded,
    quantized_by_parts,
    round_modules,
)
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, is_plain
from edgellama.model.schemes import module_shapes
from edgellama.recipe import GIVEN, Recipe, Rule, Scheme
from edgellama.targets import Target

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LAYERS = "model.layers."
_FLOATS = ("F32", "F16", "BF16")


def resolved_recipe(checkpoint: Checkpoint, recipe: Recipe, targets: Sequence[Target]) -> Recipe:
    """The recipe with the schemes of the checkpoint's own codes, and any other recipe unchanged.

    Raises RecipeError if the recipe and the checkpoint do not belong together: codes that another recipe would
    round again, or linears whose weights are no codes.
    """
    given = checkpoint.given
    if recipe.algorithm != GIVEN:
        if given is not None and given.requires_as_is:
            raise RecipeError(
                f"{checkpoint.path}: its weights are codes already ({given.describe()}), and recipe {recipe.name!r} would "
                "round them a second time",
                remedy="Use `-r as-is`, which takes these codes as they are, or give the full-precision checkpoint.",
            )
        return recipe
    config = checkpoint.config
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    schemes = recipe.assign(shapes)
    _check_source(checkpoint, recipe)
    assert given is not None
    own = {name: scheme for name, scheme in given.schemes.items() if name in shapes}
    for name in own:
        if schemes[name] is None:
            continue  # kept in float, which changes no value
        if name.startswith(LAYERS) or _every_target_holds(name, own, targets):
            schemes[name] = _stored_scheme(given, name)
    return replace(recipe, rules=tuple(_rules(schemes)))


def _check_source(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises RecipeError unless every linear of the layers has codes, or is a float weight of a few."""
    given = checkpoint.given
    if given is None:
        merged = "its adapters are merged into the weights" if checkpoint.adapters else "it is not quantized"
        raise RecipeError(
            f"recipe {recipe.name!r} takes codes of a quantized checkpoint, and {checkpoint.path} has none: {merged}",
            remedy="Use another recipe, such as int4"
            + (", or leave out --adapter." if checkpoint.adapters else "."),
        )
    linears = [
        name.removesuffix(".weight")
        for name, shape in checkpoint.config.tensor_shapes().items()
        if name.startswith(LAYERS) and len(shape) == 2
    ]
    others = {n: checkpoint.infos[f"{n}.weight"].dtype for n in linears if n not in given.schemes}
    odd = [f"{name} ({dtype})" for name, dtype in others.items() if dtype not in _FLOATS]
    if odd:
        raise RecipeError(
            f"recipe {recipe.name!r}: {len(odd)} linears are quantized in a form that is not taken as codes: "
            f"{', '.join(odd[:3])}{' …' if len(odd) > 3 else ''}",
            remedy="Q4_0 and Q8_0 are taken from GGUF files. Take such a file, or round this one again with another "
            "recipe, such as int4.",
        )


def _every_target_holds(name: str, own: Mapping[str, Scheme], targets: Sequence[Target]) -> bool:
    """Returns True if all targets hold the codes of a table. A tied pair is held together or not at all."""
    grouped = own[name].bits == 8 and own[name].group_size is not None
    return not grouped or all(target.int8_groups for target in targets)


def _stored_scheme(given: Given, name: str) -> Scheme:
    codes = given.codes(name)
    return replace(codes.scheme, paired_scales=not is_plain(codes.scales))


def _rules(schemes: Mapping[str, Scheme | None]) -> Iterator[Rule]:
    """Rules that assign exactly these schemes: one pattern for the layers if they are alike, else each by name."""
    layers = {name: scheme for name, scheme in schemes.items() if name.startswith(LAYERS)}
    for name in (name for name in schemes if name not in layers):
        yield Rule(name, schemes[name])
    by_part: dict[str, list[Scheme | None]] = {}
    for name, scheme in layers.items():
        by_part.setdefault(name.split(".", 3)[3], []).append(scheme)
    paired = any(scheme is not None and scheme.paired_scales for scheme in layers.values())

    def marked(scheme: Scheme | None) -> Scheme | None:
        return None if scheme is None else replace(scheme, paired_scales=paired)

    if len(set(layers.values())) == 1:
        yield Rule(f"{LAYERS}*", marked(next(iter(layers.values()))))
    elif all(len(set(part)) == 1 for part in by_part.values()):
        for part, same in by_part.items():
            yield Rule(f"{LAYERS}*.{part}", marked(same[0]))
    else:
        for name, scheme in layers.items():
            yield Rule(name, marked(scheme))


def given_llama(checkpoint: Checkpoint, recipe: Recipe, context_length: int) -> tuple[Llama, list[TensorRow]]:
    """Returns the model with the checkpoint's codes, and a row for every tensor.

    recipe: one that `resolved_recipe` returned. A table whose scheme is not the checkpoint's is rounded to nearest.
    """
    given = checkpoint.given
    _check_source(checkpoint, recipe)
    assert given is not None

    def quantize(model: Llama, schemes: Schemes) -> list[TensorRow]:
        taken = [name for name, scheme in schemes.items() if is_taken(given, name, scheme)]
        rest = {name: scheme for name, scheme in schemes.items() if name not in taken}
        return _take(model, given, taken) + round_modules(model, rest)

    return quantized_by_parts(checkpoint, recipe, context_length, quantize)


def _take(model: Llama, given: Given, names: Sequence[str]) -> list[TensorRow]:
    """Gives modules the checkpoint's codes, in place, and returns their rows. A tied pair shares its codes."""
    rows: list[TensorRow] = []
    codes_by_module: dict[str, Codes] = {}
    tied = model.config.tie_word_embeddings
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight").detach()
        if name == HEAD and tied and EMBEDDING in codes_by_module:
            table = codes_by_module[EMBEDDING]
            codes = Codes(table.values, table.scales, given.schemes[HEAD])
        else:
            codes = codes_by_module[name] = given.codes(name)
        rows += apply_recorded(model, name, weight, codes, given=True)
    return rows


def given_summary(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Origin of the codes, number of modules that have them, and modules that are rounded by the recipe's rules."""
    assert checkpoint.given is not None
    config = checkpoint.config
    schemes = recipe.assign(module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    taken = [name for name, scheme in schemes.items() if is_taken(checkpoint.given, name, scheme)]
    rounded = [name for name, scheme in schemes.items() if name not in taken and scheme is not None]
    return {**asdict(checkpoint.given.origin), "taken": len(taken), "rounded": rounded}


def given_note(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """Sentence about the tensors that are given, and those that are rounded here."""
    assert checkpoint.given is not None
    summary = given_summary(checkpoint, recipe)
    forms = {n: checkpoint.infos.get(f"{n}.weight") for n in summary["rounded"]}
    listed = ", ".join(f"{n} ({i.dtype})" if i else n for n, i in forms.items())
    return (
        f"codes of {summary['taken']} modules are taken as they are ({checkpoint.given.origin.describe()}); "
        + (f"rounded here to int8, one scale a row: {listed}" if listed else "none is rounded here")
    )


def is_taken(given: Given, name: str, scheme: Scheme | None) -> bool:
    """Returns True for a module whose codes are the checkpoint's own."""
    own = given.schemes.get(name)
    return (
        own is not None
        and scheme is not None
        and (own.bits, own.group_size) == (scheme.bits, scheme.group_size)
    )
