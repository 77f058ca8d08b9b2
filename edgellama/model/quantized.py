"""Codes: the integers and scales of one quantized weight, from any algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.errors import LoweringError, RecipeError
from edgellama.model.held import converted
from edgellama.model.llama import Llama
from edgellama.recipe import PerChannel, PerGroup, Scheme

# Smallest normal float16. Scales below it lose bits, and hardware may flush them to zero. This limit costs a
# group of weights below 5e-4 a rounding error of 3e-5 at most.
SMALLEST_SCALE = 2.0**-14

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not know it


@dataclass(frozen=True)
class Codes:
    """Quantized weight on the grid of a scheme, symmetric: weight ≈ values * scales, without zero points.

    values: int8 [rows, columns] in `scheme.code_range`.
    scales: bfloat16 numbers in a float32 tensor [rows, groups]. Some converters reject bfloat16 tensors, none
    rejects float32 ones. Given codes have the scales of their checkpoint, which may be negative.
    """

    values: Tensor
    scales: Tensor
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """Weight as float32 [rows, columns]."""
        rows, columns = self.values.shape
        weights = self.values.float().reshape(rows, self.scales.shape[1], -1)
        weights *= self.scales[..., None]  # in place: the lm_head of Llama 3.2 takes a gigabyte
        return weights.reshape(rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the bfloat16 scales."""
        return self.values.numel() * self.scheme.bits // 8 + self.scales.numel() * 2


def is_plain(scales: Tensor) -> bool:
    """True for scales as edgellama chooses them: positive numbers that bfloat16 holds exactly."""
    return bool((scales > 0).all()) and torch.equal(scales, scales.to(torch.bfloat16).float())


def check_codes(name: str, codes: Codes) -> None:
    """Raises RecipeError for codes that edgellama does not choose.

    Such codes are out of range, or have scales that are not positive, finite and representable in bfloat16.
    """
    low, high = codes.scheme.code_range
    problems = []
    if int(codes.values.min()) < low or int(codes.values.max()) > high:
        problems.append(f"codes outside {low}..{high}")
    if not bool((torch.isfinite(codes.scales) & (codes.scales > 0)).all()):
        problems.append("scales that are not positive and finite")
    if not torch.equal(codes.scales, codes.scales.to(torch.bfloat16).float()):
        problems.append("scales that bfloat16 does not represent")
    if problems:
        raise RecipeError(
            f"{name}: {' and '.join(problems)}",
            remedy="The algorithm that chose them is wrong; please report it.",
        )


class WeightOnlyLinear(nn.Module):
    """Weight-only quantized linear. Each call dequantizes the weight: no float32 copy stays in memory."""

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.codes, self.bias = codes, bias

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        return F.linear(x, converted(self.codes, self.codes.dequantize), self.bias)


class QuantizedEmbedding(nn.Module):
    """Embedding table in int8 with one scale per row or group, dequantized on look-up.

    values: int8 [tokens, hidden_size]. scales: float32 [tokens], or [tokens, groups].
    """

    values: Tensor
    scales: Tensor

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.register_buffer("values", codes.values)
        self.register_buffer(
            "scales", codes.scales.squeeze(1) if codes.scales.shape[1] == 1 else codes.scales
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> float32 [B, T, hidden_size]."""
        rows, scales = self.values[tokens].float(), self.scales[tokens]
        if self.scales.dim() == 1:
            return rows * scales[..., None]
        groups = rows.reshape(*scales.shape, -1) * scales[..., None]
        return groups.reshape(rows.shape)


def apply_codes(model: Llama, name: str, codes: Codes) -> None:
    """Gives module `name` the weights `codes`, in place. No other function quantizes a model.

    A linear keeps its class and gets a torchao weight tensor. An embedding becomes a `QuantizedEmbedding`.
    """
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
    """Codes of a quantized linear or embedding. None for a float module.

    Raises LoweringError for weight zero points: `Codes` has none, and most formats would drop them.
    """
    if isinstance(module, QuantizedEmbedding):
        scales = module.scales[:, None] if module.scales.dim() == 1 else module.scales
        groups = scales.shape[1]
        granularity = PerChannel() if groups == 1 else PerGroup(module.values.shape[1] // groups)
        return Codes(module.values, scales, Scheme(8, granularity, int8_activations=False))
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
