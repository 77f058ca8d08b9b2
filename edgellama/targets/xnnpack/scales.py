"""Scales as XNNPACK takes them: positive, and bfloat16 for groups.

Given codes may have negative scales (llama.cpp's Q4_0 and AutoRound give the largest weight of a group the code
-8), or float16 scales, whose bits are more than bfloat16 has. A scale s of this kind is stored as two, a - b = s,
and a linear becomes the difference of two products with the same codes. The file holds the codes once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellama.errors import LoweringError


def pair(scales: Tensor, name: str, *, grouped: bool) -> tuple[Tensor, Tensor] | None:
    """Positive scales (a, b) with a - b equal to `scales`, bit for bit; None if `scales` need no second.

    Args:
        scales: float32 [rows, groups].
        name: of the module, for the message.
        grouped: True if a and b must be bfloat16 numbers.

    Raises LoweringError for a scale with more than float16's bits.

    >>> a, b = pair(torch.tensor([[-3.0, 0.1001]]).half().float(), "q_proj", grouped=True)
    >>> (a - b).tolist()
    [[-3.0, 0.10009765625]]
    """
    size = scales.abs()
    nearest = size.to(torch.bfloat16).float() if grouped else size
    if bool((scales > 0).all()) and torch.equal(nearest, size):
        return None
    # One of the two is the bfloat16 number at or above the size, and the other what is too much.
    above = torch.where(nearest < size, _next_bfloat16(nearest), nearest)
    larger = torch.where(above == size, 2 * size, above)
    smaller = larger - size
    larger, smaller = (torch.where(size == 0, torch.ones_like(size), x) for x in (larger, smaller))
    a, b = torch.where(scales < 0, smaller, larger), torch.where(scales < 0, larger, smaller)
    held = all(not grouped or torch.equal(x, x.to(torch.bfloat16).float()) for x in (a, b))
    normal = bool((torch.minimum(a, b) >= torch.finfo(torch.bfloat16).tiny).all())
    if not (held and normal and torch.equal(a - b, scales)):
        raise LoweringError(
            f"{name}: its scales have more bits than float16, and XNNPACK's groups have bfloat16 scales, of which "
            "two make up one of float16",
            remedy="Take a checkpoint with float16 or bfloat16 scales, or leave out target xnnpack.",
        )
    return a, b


def _next_bfloat16(values: Tensor) -> Tensor:
    """The smallest bfloat16 number above each positive bfloat16 number, as float32."""
    bits = values.view(torch.int32) + (1 << 16)
    return bits.view(torch.float32)
