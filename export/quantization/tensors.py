"""Recipe -> quantized model: the one quantized torch model that every target lowers, and its statistics.

Algorithms only supply `Codes`, and only `apply_codes` puts them into a model. With any algorithm, the
quantized model therefore computes on exactly the integers and scales that artifacts store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import OUTSIDE, layer_prefixes, load_weights
from edgellama.export.quantization.round_to_nearest import round_to_grid, row_pieces
from edgellama.host.threads import side_by_side
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, apply_codes, check_codes, codes_of
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import Recipe, Scheme

Schemes = Mapping[str, Scheme | None]


@dataclass(frozen=True)
class TensorRow:
    """Quantization of one tensor.

    bytes: stored size.
    sqnr_db: signal-to-quantization-noise ratio in dB, inf if exact. Measured when the codes were chosen,
    before any recovery.
    given: True for codes of the checkpoint itself, which were not rounded here.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    bits: int
    group_size: int | None
    bytes: int
    sqnr_db: float
    given: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON form. An infinite sqnr_db becomes None. `given` is there if it is True."""
        data = asdict(self)
        if not self.given:
            del data["given"]
        data["shape"] = list(self.shape)
        data["sqnr_db"] = None if math.isinf(self.sqnr_db) else round(self.sqnr_db, 3)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorRow:
        """Inverse of `to_dict`."""
        sqnr = math.inf if data["sqnr_db"] is None else data["sqnr_db"]
        return cls(**{**data, "shape": tuple(data["shape"]), "sqnr_db": sqnr})


@torch.no_grad()
def quantized_by_parts(
    checkpoint: Checkpoint,
    recipe: Recipe,
    context_length: int,
    quantize: Callable[[Llama, Schemes], list[TensorRow]],
) -> tuple[Llama, list[TensorRow]]:
    """Reads each layer and quantizes it before the next, so that the whole float model is never in memory.

    quantize: gives the named modules their codes in place, and returns their rows. Their weights have the dtype of
        the checkpoint.
    """
    config = checkpoint.config
    schemes = check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    with torch.device("meta"):
        model = Llama(config, context_length)
    rows: list[TensorRow] = []
    for part in (OUTSIDE, *((prefix,) for prefix in layer_prefixes(checkpoint))):
        chosen = {name: scheme for name, scheme in schemes.items() if f"{name}.".startswith(part)}
        coded = {f"{name}.weight" for name, scheme in chosen.items() if scheme is not None}
        # A tied table is one weight, and float32 if either module keeps it.
        if checkpoint.config.tie_word_embeddings and part == OUTSIDE and len(coded) < 2:
            coded = set()
        load_weights(model, checkpoint, part, stored=coded)
        rows += quantize(model, chosen)
    return model.eval(), in_order(model, schemes, rows)


def round_modules(model: Llama, schemes: Schemes) -> list[TensorRow]:
    """Quantizes the modules named in `schemes` by RTN, in place, and returns their rows.

    A tied lm_head and embedding get the same codes. Each has a row with its own stored size.
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


def in_order(model: Llama, schemes: Schemes, rows: Iterable[TensorRow]) -> list[TensorRow]:
    """Rows of a model that was quantized in parts, in one order: norms, then modules as in `schemes`."""
    rows_by_name = {row.name: row for row in rows}
    ordered = [
        rows_by_name[f"{n}.{part}"]
        for n in schemes
        for part in ("bias", "weight")
        if f"{n}.{part}" in rows_by_name
    ]
    return [*norm_rows(model), *ordered]


def rows_without_errors(model: Llama) -> list[TensorRow]:
    """Rows of a quantized model in the order of `in_order`. No row has its SQNR, which needs the weights before."""
    rows = norm_rows(model)
    names = [name for name, _ in model.named_modules()]
    ordered = module_shapes(model.config.tensor_shapes(), model.config.tie_word_embeddings)
    for name in (n for n in ordered if n in names):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and module.bias is not None:
            rows.append(_float_row(f"{name}.bias", module.bias))
        codes = codes_of(module)
        if codes is None:
            rows.append(_float_row(f"{name}.weight", module.get_parameter("weight")))
        else:
            rows.append(_coded_row(f"{name}.weight", codes, math.inf))
    return rows


def norm_rows(model: Llama) -> list[TensorRow]:
    """Rows of all norms."""
    return [
        _float_row(name, weight)
        for name, weight in model.named_parameters()
        if weight.dim() == 1 and name.endswith(".weight")
    ]


def apply_recorded(
    model: Llama, name: str, weight: Tensor, codes: Codes | None, *, given: bool = False
) -> list[TensorRow]:
    """Gives module `name` the codes of `weight`, and returns its rows. None leaves the weight in float32.

    given: the codes are the checkpoint's own, and any scale is right.
    """
    module = model.get_submodule(name)
    rows = []
    if isinstance(module, nn.Linear) and module.bias is not None:
        rows.append(_float_row(f"{name}.bias", module.bias))
    if codes is None:
        return [*rows, _float_row(f"{name}.weight", weight)]
    if not given:
        check_codes(name, codes)
    apply_codes(model, name, codes)
    return [*rows, replace(_row(f"{name}.weight", weight, codes), given=given)]


def _float_row(name: str, weight: Tensor) -> TensorRow:
    return TensorRow(name, tuple(weight.shape), "float32", 32, None, weight.numel() * 4, math.inf)


def _row(name: str, weight: Tensor, codes: Codes) -> TensorRow:

    def power(rows: slice) -> tuple[float, float]:
        piece, exact = Codes(codes.values[rows], codes.scales[rows], codes.scheme), weight[rows].float()
        error = (exact - piece.dequantize()).double().square().sum()
        return float(error), float(exact.double().square().sum())

    # In pieces: float64 copies of an embedding would take gigabytes.
    noise, signal = map(sum, zip(*side_by_side(power, row_pieces(weight)), strict=True))
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else 0.0
    return _coded_row(name, codes, sqnr)


def _coded_row(name: str, codes: Codes, sqnr_db: float) -> TensorRow:
    scheme, shape = codes.scheme, tuple(codes.values.shape)
    return TensorRow(name, shape, scheme.describe(), scheme.bits, scheme.group_size, codes.nbytes, sqnr_db)
