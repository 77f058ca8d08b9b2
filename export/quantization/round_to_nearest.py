"""RTN (algorithm `round`): rounds every weight to the nearest code. No data is needed.

The scale is the smallest at which the asymmetric code range clips no weight: max(-min / 8, max / 7) for int4.
This is torchao's SYMMETRIC_NO_CLIPPING_ERR. The scale is rounded to bfloat16 *before* the codes are chosen.
Backends store bfloat16 scales, and codes chosen for a float32 scale would belong to another grid.

A group far smaller than the rest of its weight gets SMALLEST_SCALE, more than it needs, so that float16
formats can hold the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellama.model.quantized import SMALLEST_SCALE, Codes
from edgellama.recipe import Scheme


def round_to_grid(weight: Tensor, scheme: Scheme) -> Codes:
    """Codes of a float32 weight [rows, columns]. columns must be a multiple of the group size."""
    rows, columns = weight.shape
    group = scheme.group_size or columns
    low, high = scheme.code_range
    groups = weight.reshape(rows, columns // group, group)
    scales = torch.maximum(groups.amin(-1) / low, groups.amax(-1) / high)
    scales = scales.to(torch.bfloat16).float()
    if float(scales.max()) >= 16 * SMALLEST_SCALE:
        scales = torch.where(scales > 0, scales.clamp_min(SMALLEST_SCALE), scales)
    # A group of zeros fits any scale.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    # In place: an embedding can take a gigabyte, so only one copy is made.
    values = (groups / scales[..., None]).round_().clamp_(low, high).to(torch.int8)
    return Codes(values.reshape(rows, columns), scales, scheme)
