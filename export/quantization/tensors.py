"""Recipe -> quantized model: the one quantized torch model that every target lowers.

Algorithms only supply `Codes`; `apply_codes` is the single way in, so whatever chose the codes, the quantized
model computes on exactly the integers and scales that the artifacts store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.errors import LoweringError, RecipeError
from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.host.threads import one_thread
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.model.quantized import INT4, Codes, check_codes
from edgellama.recipe import PerChannel, PerGroup, Recipe, Scheme
from edgellama.targets.base import Storage

_ROWS = 4096  # measured at a time


class QuantizedEmbedding(nn.Module):
    """An embedding table of int8 rows with one scale each, dequantized on look-up."""

    values: Tensor
    scales: Tensor

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.register_buffer("values", codes.values)
        self.register_buffer("scales", codes.scales.squeeze(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> float32 [B, T, hidden_size]."""
        return self.values[tokens].float() * self.scales[tokens][..., None]


@dataclass(frozen=True)
class TensorRow:
    """What was done to one tensor. bytes: as stored; sqnr_db: signal to quantization noise, dB (inf if exact), when its
    codes were chosen, before any recovery."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    bits: int
    group_size: int | None
    bytes: int
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        row = asdict(self)
        row["shape"] = list(self.shape)
        row["sqnr_db"] = None if math.isinf(self.sqnr_db) else round(self.sqnr_db, 3)
        return row

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorRow:
        """The inverse of `to_dict`."""
        sqnr = math.inf if data["sqnr_db"] is None else data["sqnr_db"]
        return cls(**{**data, "shape": tuple(data["shape"]), "sqnr_db": sqnr})


def check_recipe(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Scheme | None]:
    """The scheme of every module whose weight shape is given, proven applicable before anything slow starts.

    A group as long as a row is what it is in every format: one scale for the row.

    Raises RecipeError when a group size does not divide a row, naming layers and sizes that would.
    """
    schemes = recipe.assign(shapes)
    bad: dict[int, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None and scheme.group_size and shapes[name][1] % scheme.group_size:
            bad.setdefault(shapes[name][1], []).append(name)
    if bad:
        found = "; ".join(
            f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} have rows of {columns}"
            for columns, names in bad.items()
        )
        fits = [g for g in (128, 64, 32) if not any(columns % g for columns in bad)]
        raise RecipeError(
            f"recipe {recipe.name!r}: its groups do not divide every row: {found}",
            remedy=(
                f"Group sizes that divide them: {', '.join(map(str, fits))}. "
                if fits
                else "No group size divides them. "
            )
            + "Or add a rule above that gives these modules int8 per channel (group_size null, bits 8).",
        )
    embedding = schemes["model.embed_tokens"]
    if embedding is not None and (embedding.bits != 8 or embedding.group_size or embedding.int8_activations):
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
    """Weight shape of every quantizable module, from a config's `tensor_shapes`; a tied lm_head is a module."""
    shapes: dict[str, tuple[int, ...]] = {
        n.removesuffix(".weight"): s for n, s in model_shapes.items() if n.endswith(".weight") and len(s) == 2
    }
    if tied:
        shapes["lm_head"] = shapes["model.embed_tokens"]
    return shapes


def planned_bytes(config: LlamaConfig, recipe: Recipe, storage: Storage, context_length: int) -> int:
    """Bytes of all weights and RoPE tables under `recipe` in a format that stores them as `storage` says."""
    shapes = module_shapes(config.tensor_shapes(), config.tie_word_embeddings)
    schemes = check_recipe(recipe, shapes)
    floats = int(2 * context_length * config.head_dim * storage.rope_width) + sum(
        math.prod(s)
        for name, s in config.tensor_shapes().items()
        if name.removesuffix(".weight") not in shapes
    )
    total = floats * storage.float_bytes
    for name, scheme in schemes.items():
        if storage.tied_once and name == "lm_head" and config.tie_word_embeddings:
            table = schemes["model.embed_tokens"]
            if (table and (table.bits, table.group_size)) == (scheme and (scheme.bits, scheme.group_size)):
                continue
        total += storage.weight_bytes(shapes[name], scheme)
    return total


def round_modules(model: Llama, schemes: Mapping[str, Scheme | None]) -> list[TensorRow]:
    """Quantize the modules that have an entry in `schemes` by rounding, in place, and return the rows about them.

    A tied lm_head and embedding get the same codes; each row says what its own module stores.
    """
    rows = []
    shared: dict[tuple[int, int, int | None], Codes] = {}
    for name, scheme in schemes.items():
        weight = model.get_submodule(name).get_parameter("weight").detach()
        if scheme is None:
            rows += apply_recorded(model, name, weight, None)
            continue
        key = (weight.data_ptr(), scheme.bits, scheme.group_size)
        if key in shared:
            codes = Codes(shared[key].values, shared[key].scales, scheme)
        else:
            codes = round_to_grid(weight, scheme)
            if name == "model.embed_tokens":  # the only weight that another module may share
                shared[key] = codes
        rows += apply_recorded(model, name, weight, codes)
    return rows


def in_order(
    model: Llama, schemes: Mapping[str, Scheme | None], rows: Iterable[TensorRow]
) -> list[TensorRow]:
    """The rows of a model that was quantized in parts, in one order: norms, then modules as in `schemes`."""
    by_name = {row.name: row for row in rows}
    ordered = [
        by_name[f"{n}.{part}"] for n in schemes for part in ("bias", "weight") if f"{n}.{part}" in by_name
    ]
    return [*norm_rows(model), *ordered]


def norm_rows(model: Llama) -> list[TensorRow]:
    """A row for every norm."""
    return [
        _float_row(name, weight)
        for name, weight in model.named_parameters()
        if weight.dim() == 1 and name.endswith(".weight")
    ]


def apply_recorded(model: Llama, name: str, weight: Tensor, codes: Codes | None) -> list[TensorRow]:
    """Give module `name` the codes that stand for `weight` (None: nothing), and return the rows about it."""
    module = model.get_submodule(name)
    rows = []
    if isinstance(module, nn.Linear) and module.bias is not None:
        rows.append(_float_row(f"{name}.bias", module.bias))
    if codes is None:
        return [*rows, _float_row(f"{name}.weight", weight)]
    check_codes(name, codes)
    apply_codes(model, name, codes)
    return [*rows, _row(f"{name}.weight", weight, codes)]


def apply_codes(model: Llama, name: str, codes: Codes) -> None:
    """Give module `name` these codes: the only way in which a model becomes quantized."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        model.set_submodule(name, QuantizedEmbedding(codes))
        return
    group = codes.scheme.group_size or codes.values.shape[1]
    tensor = IntxUnpackedToInt8Tensor(
        codes.values,
        codes.scales,
        torch.zeros_like(codes.scales, dtype=torch.int8),
        INT4 if codes.scheme.bits == 4 else torch.int8,
        (1, group),
        torch.float32,
        "int8_asym_per_token" if codes.scheme.int8_activations else None,
    )
    module.weight = nn.Parameter(tensor, requires_grad=False)


def codes_of(module: nn.Module) -> Codes | None:
    """The codes that a linear or an embedding computes on; None for a float one.

    Raises LoweringError for weight zero points: `Codes` has none, and most formats would drop them.
    """
    if isinstance(module, QuantizedEmbedding):
        return Codes(module.values, module.scales[:, None], Scheme(8, PerChannel(), int8_activations=False))
    weight = module.weight
    if not isinstance(weight, IntxUnpackedToInt8Tensor):
        return None
    if bool(weight.zero_point.any()):
        raise LoweringError(
            "a weight has zero points, and no target keeps them",
            remedy="Use a symmetric scheme; edgellama's own recipes are.",
        )
    rows, columns = weight.shape
    group = weight.block_size[1]
    scheme = Scheme(
        4 if weight.target_dtype == INT4 else 8,
        PerChannel() if group == columns else PerGroup(group),
        weight.activation_quantization is not None,
    )
    return Codes(weight.qdata, weight.scale.reshape(rows, -1), scheme)


def _float_row(name: str, weight: Tensor) -> TensorRow:
    return TensorRow(name, tuple(weight.shape), "float32", 32, None, weight.numel() * 4, math.inf)


@one_thread()
def _row(name: str, weight: Tensor, codes: Codes) -> TensorRow:
    noise = signal = 0.0
    for start in range(
        0, weight.shape[0], _ROWS
    ):  # in pieces: float64 copies of an embedding would be gigabytes
        rows = slice(start, start + _ROWS)
        piece = Codes(codes.values[rows], codes.scales[rows], codes.scheme)
        noise += float((weight[rows] - piece.dequantize()).double().square().sum())
        signal += float(weight[rows].double().square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else 0.0
    scheme = codes.scheme
    return TensorRow(
        name, tuple(weight.shape), scheme.describe(), scheme.bits, scheme.group_size, codes.nbytes, sqnr
    )
