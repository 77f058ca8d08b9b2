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

from edgellama.host.threads import side_by_side
from edgellama.model.quantized import SMALLEST_SCALE, Codes
from edgellama.recipe import Scheme

_VALUES = 1 << 18  # of a weight that a work item rounds: they stay in the processor's cache


def round_to_grid(weight: Tensor, scheme: Scheme) -> Codes:
    """Codes of a weight [rows, columns] in any float dtype. columns must be a multiple of the group size.

    Rows are rounded piece by piece. A whole copy of an embedding takes a gigabyte, and its pages cost more time
    than the arithmetic.
    """
    rows, columns = weight.shape
    group = scheme.group_size or columns
    low, high = scheme.code_range
    pieces, scales = row_pieces(weight), torch.empty(rows, columns // group)
    values = torch.empty(rows, columns, dtype=torch.int8)

    def measure(piece: slice) -> None:
        groups = weight[piece].float().reshape(-1, columns // group, group)
        scales[piece] = torch.maximum(groups.amin(-1) / low, groups.amax(-1) / high)

    def choose(piece: slice) -> None:
        groups = weight[piece].float().reshape(-1, columns // group, group)
        rounded = (groups / scales[piece, :, None]).round_().clamp_(low, high)
        values[piece] = rounded.reshape(-1, columns).to(torch.int8)

    side_by_side(measure, pieces)
    scales = scales.to(torch.bfloat16).float()
    if float(scales.max()) >= 16 * SMALLEST_SCALE:
        scales = torch.where(scales > 0, scales.clamp_min(SMALLEST_SCALE), scales)
    # A group of zeros fits any scale.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    side_by_side(choose, pieces)
    return Codes(values, scales, scheme)


def row_pieces(weight: Tensor) -> list[slice]:
    """Pieces of a matrix's rows that have about a quarter of a million values each."""
    count = max(1, _VALUES // weight.shape[1])
    return [slice(start, min(start + count, len(weight))) for start in range(0, len(weight), count)]
