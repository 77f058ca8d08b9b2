"""Codes: the integers and scales that stand for one weight, whatever algorithm chose them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgellama.errors import RecipeError
from edgellama.recipe import Scheme

# Smallest normal float16: below it scales lose bits, and hardware may take them for zero. What it costs a group of
# weights below 5e-4 is a rounding error of 3e-5 at most.
SMALLEST_SCALE = 2.0**-14

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not know it


@dataclass(frozen=True)
class Codes:
    """Integer weights on the grid of a scheme: weight ≈ values * scales, no zero points.

    values: int8 [rows, columns] in `scheme.code_range`. scales: float32 [rows, groups] holding bfloat16 numbers
    (some converters reject bfloat16 tensors, none rejects float32 ones).
    """

    values: Tensor
    scales: Tensor
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        rows, columns = self.values.shape
        weights = self.values.float().reshape(rows, self.scales.shape[1], -1)
        weights *= self.scales[..., None]  # in place: a head of Llama 3.2 has a gigabyte
        return weights.reshape(rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the bfloat16 scales."""
        return self.values.numel() * self.scheme.bits // 8 + self.scales.numel() * 2


def check_codes(name: str, codes: Codes) -> None:
    """Refuse codes that no artifact could hold: off the grid, or scales that bfloat16 does not represent."""
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
