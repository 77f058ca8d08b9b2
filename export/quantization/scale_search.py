"""Scale search (algorithm `scales`): chooses each group's scale by the activation-weighted squared error.

The error of each weight is weighted by the mean square of its input activation. For each group, scales around
the smallest one that clips nothing are tried. Each is rounded to bfloat16 before the codes are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.model.quantized import Codes
from edgellama.recipe import Scheme

FACTORS = tuple(0.7 + 0.025 * i for i in range(23))  # of the group's largest |weight| / |lowest code|
FEW_FACTORS = FACTORS[4:17:4]  # coarser, for comparisons only


def weighted_scales(
    weight: Tensor, importance: Tensor, scheme: Scheme, factors: Sequence[float] = FACTORS
) -> Codes:
    """Codes of a float32 weight [rows, columns] with the least weighted error.

    importance: mean square of each input, [columns].
    factors: scales to try, as multiples of the group's largest |weight| / |lowest code|.
    """
    start = round_to_grid(weight, scheme)
    rows, columns = weight.shape
    group = scheme.group_size or columns
    low, high = scheme.code_range
    groups = weight.reshape(rows, -1, group)
    share = importance.float().reshape(1, -1, group)
    share = share / share.mean(-1, keepdim=True).clamp_min(1e-30)

    def error(scales: Tensor) -> Tensor:
        values = (groups / scales[..., None]).round_().clamp_(low, high)
        return values.mul_(scales[..., None]).sub_(groups).square_().mul_(share).sum(-1)

    best, best_error = start.scales, error(start.scales)
    smallest = best.min()  # a lower bound: `round_to_grid` keeps to scales that formats can hold
    absmax = groups.abs().amax(-1) / -low
    for factor in factors:
        scales = (absmax * factor).to(torch.bfloat16).float()
        scales = torch.where(scales >= smallest, scales, best)
        new_error = error(scales)
        better = new_error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, new_error, best_error)
    return codes_at(weight, best, scheme)


def codes_at(weight: Tensor, scales: Tensor, scheme: Scheme) -> Codes:
    """Nearest codes of a weight [rows, columns] on the grid of `scales` [rows, groups]."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, scales.shape[1], -1)
    values = (groups / scales[..., None]).round_().clamp_(*scheme.code_range).to(torch.int8)
    return Codes(values.reshape(rows, columns), scales, scheme)
