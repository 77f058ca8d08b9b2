"""Second moment of the inputs of a linear, over all windows of text.

Only blocks on and above the diagonal are summed, in float32. Each block is one work item of one thread, so
the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from edgellama.host.threads import Workers
from edgellama.model.layer_pass import groups

EDGE = 192  # rows and columns of a block; smaller ones skip more below the diagonal, but take longer each


def second_moment(inputs: Sequence[Tensor], pool: Workers) -> Tensor:
    """E[x x'] over all tokens: float32 [T, columns] for each window -> float32 [columns, columns].

    >>> from edgellama.host.threads import workers
    >>> with workers() as pool:
    ...     second_moment([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])], pool)
    tensor([[5., 1.],
            [1., 2.]])
    """
    width, tokens = inputs[0].shape[1], sum(map(len, inputs))
    total = torch.zeros(width, width)
    parts = [slice(start, start + EDGE) for start in range(0, width, EDGE)]
    corners = list(combinations_with_replacement(parts, 2))
    for group in groups(inputs):
        x = torch.cat(group)  # a few long products are faster than many short ones

        def add(corner: tuple[slice, slice], x: Tensor = x) -> None:
            rows, columns = corner
            total[rows, columns].addmm_(x[:, rows].t(), x[:, columns])

        list(pool.map(add, corners))
    for rows, columns in corners:
        if rows != columns:
            total[columns, rows] = total[rows, columns].t()
    return total.div_(tokens)
