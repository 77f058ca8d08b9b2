"""Given codes of a Hugging Face directory: the modules whose packed tensors stand in place of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from edgellama.checkpoints.checkpoint import TensorInfo
from edgellama.checkpoints.given.layouts import from_awq, from_gptq, from_packed
from edgellama.checkpoints.given.settings import AWQ, BITS, FLOAT, GPTQ, PACKED, Settings
from edgellama.checkpoints.given.weights import Given
from edgellama.checkpoints.hf_weights import Stored
from edgellama.errors import CheckpointError
from edgellama.model.quantized import Codes
from edgellama.recipe import PerChannel, PerGroup, Scheme

# Parts of a module in each layout: those that must be there, and those that may be.
_GROUPED = ("qweight", "qzeros", "scales")
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    GPTQ: (_GROUPED, ("g_idx",)),
    AWQ: (_GROUPED, ()),
    PACKED: (("weight_packed", "weight_scale", "weight_shape"), ("weight_g_idx", "weight_zero_point")),
}
_SCALES = {GPTQ: "scales", AWQ: "scales", PACKED: "weight_scale"}
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4}
_NEVER = {
    "weight_g_idx": "its groups are no runs of columns (actorder group)",
    "weight_zero_point": "it has zero points, and no target keeps them",
}


@dataclass(frozen=True)
class Quantized:
    """Quantized modules of a directory, and its other tensors.

    Attributes:
        given: the codes.
        stored: one entry for each weight of the plain model, quantized ones among them.
        notes: sentences about what was left out.
    """

    given: Given
    stored: Mapping[str, Stored]
    notes: tuple[str, ...] = field(default=())


def quantized_modules(
    path: Path,
    settings: Settings,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
) -> Quantized:
    """Finds the modules with codes among the tensors of a directory.

    Args:
        path: the directory, for messages.
        settings: of its quantization_config.
        shapes: shape of every weight of the plain model.
        stored: every tensor of the files.

    Raises CheckpointError for a module with missing parts or with shapes that contradict the settings.
    """
    required, optional = PARTS[settings.layout]
    modules: dict[str, dict[str, Stored]] = {}
    plain: dict[str, Stored] = {}
    for name, entry in stored.items():
        module, _, part = name.rpartition(".")
        if part in (*required, *optional):
            modules.setdefault(module, {})[part] = entry
        else:
            plain[name] = entry
    if not modules:
        raise CheckpointError(
            f"{path}: quantization_config names {settings.origin.method}, and no tensor ends in {required[0]}",
            remedy=FLOAT,
        )
    schemes = {}
    for module, parts in modules.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None or module == "model.embed_tokens" or f"{module}.weight" in plain:
            raise CheckpointError(
                f"{path}: {module} has codes, and the config leads to expect "
                + ("no such module" if shape is None else "a float weight"),
                remedy="If lm_head is tied, its codes would differ from the embedding's. " + FLOAT,
            )
        schemes[module] = _scheme(path, module, parts, shape, settings)
        weight = f"{module}.weight"
        plain[weight] = _entry(module, parts, shape, schemes[module], settings)
    notes = _without_empty_biases(plain, shapes)

    def raw(module: str) -> Mapping[str, Tensor]:
        return {part: entry.read() for part, entry in modules[module].items()}

    def unpack(module: str) -> Codes:
        scheme, parts = schemes[module], raw(module)
        if settings.layout == GPTQ:
            middle = (1 << (scheme.bits - 1)) - int(settings.zero_is_one_less)
            values, scales = from_gptq(module, parts, scheme.bits, middle)
        elif settings.layout == AWQ:
            values, scales = from_awq(module, parts)
        else:
            values, scales = from_packed(module, parts, scheme.bits, shapes[f"{module}.weight"])
        return Codes(values, scales, scheme)

    given = Given(settings.origin, schemes, unpack, raw, requires_as_is=True)
    plain = {
        name: Stored(entry.file, entry.info, lambda name=name: _dequantized(given, name))  # type: ignore[misc]
        if name.removesuffix(".weight") in schemes
        else entry
        for name, entry in plain.items()
    }
    return Quantized(given, plain, notes)


def _dequantized(given: Given, name: str) -> Tensor:
    weight = given.weight(name)
    assert weight is not None
    return weight


def _scheme(
    path: Path, module: str, parts: Mapping[str, Stored], shape: tuple[int, ...], settings: Settings
) -> Scheme:
    """Scheme of a module by the shapes of its parts."""
    for part, why in _NEVER.items():
        if part in parts:
            raise CheckpointError(f"{path}: {module} has a {part}: {why}", remedy=FLOAT)
    required = PARTS[settings.layout][0]
    if missing := [part for part in required if part not in parts]:
        raise CheckpointError(
            f"{path}: {module} has no {missing[0]}", remedy="Download all weight files again."
        )
    rows, columns = shape
    sizes = {part: entry.info.shape for part, entry in parts.items()}
    scales = parts[_SCALES[settings.layout]].info
    if scales.dtype not in _FLOATS:
        raise CheckpointError(
            f"{path}: {module} has scales of dtype {scales.dtype}, expected {', '.join(_FLOATS)}",
            remedy=FLOAT,
        )
    for bits in (settings.bits, *(b for b in BITS if settings.mixed and b != settings.bits)):
        groups = scales.shape[1 if settings.layout == PACKED else 0] if len(scales.shape) == 2 else 0
        expected = _expected_shapes(settings.layout, rows, columns, groups, bits)
        per_group = columns // groups if groups and columns % groups == 0 else 0
        fits = settings.mixed or groups == 1 or per_group == settings.group_size
        whole = groups == 1 or (per_group > 0 and per_group % 32 == 0)
        if fits and per_group and whole and all(sizes[part] == expected[part] for part in sizes):
            return Scheme(bits, PerChannel() if groups == 1 else PerGroup(per_group))
    listed = ", ".join(f"{part} {list(size)}" for part, size in sizes.items())
    raise CheckpointError(
        f"{path}: {module} [{rows}, {columns}] has {listed}, which is not {settings.bits} bits in groups of "
        f"{settings.group_size or 'a row'}",
        remedy="quantization_config and the weights are not of one model. " + FLOAT,
    )


def _expected_shapes(
    layout: str, rows: int, columns: int, groups: int, bits: int
) -> dict[str, tuple[int, ...]]:
    """Shape of every part of a module."""
    words = 32 // bits
    if layout == GPTQ:
        return {
            "qweight": (columns // words, rows),
            "qzeros": (groups, -(-rows // words)),
            "scales": (groups, rows),
            "g_idx": (columns,),
        }
    if layout == AWQ:
        return {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}
    return {
        "weight_packed": (rows, -(-columns // words)),
        "weight_scale": (rows, groups),
        "weight_shape": (2,),
    }


def _entry(
    module: str, parts: Mapping[str, Stored], shape: tuple[int, ...], scheme: Scheme, settings: Settings
) -> Stored:
    """Entry of the plain model's weight: its shape, and the bytes of its parts."""
    scales = parts[_SCALES[settings.layout]].info
    nbytes = math.prod(shape) * scheme.bits // 8 + math.prod(scales.shape) * _FLOATS[scales.dtype]
    form = scheme.describe().removesuffix(" a8")
    first = next(iter(parts.values()))
    return Stored(first.file, TensorInfo(f"{form} {scales.dtype}", shape, nbytes), first.read)


def _without_empty_biases(plain: dict[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Drops biases of zeros, which AutoGPTQ stores for modules that have none. Returns a note about them."""
    empty = [
        name
        for name, entry in plain.items()
        if name.endswith(".bias") and name not in shapes and not bool(entry.read().any())
    ]
    for name in empty:
        del plain[name]
    return (f"{len(empty)} biases of zeros are left out: the config has no biases",) if empty else ()
