"""Linears with a product of two thin matrices beside their weight: an adapter that is not merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.model.llama import Llama
from edgellama.model.swap import replaced


@dataclass(frozen=True)
class Pair:
    """Change of a linear [rows, columns]: `up @ down` is added to its weight.

    Attributes:
        down: float32 [rank, columns].
        up: float32 [rows, rank]. The factor of the adapter is in it.

    >>> import torch
    >>> Pair(torch.ones(2, 8), torch.ones(4, 2)).rank
    2
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices in float32."""
        return 4 * (self.down.numel() + self.up.numel())


Pairs = Mapping[str, Pair]  # by the name of the linear


class AdaptedLinear(nn.Module):
    """The linear `base`, whatever its arithmetic, plus an adapter in float32."""

    def __init__(self, base: nn.Module, pair: Pair) -> None:
        super().__init__()
        self.base, self.pair = base, pair

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., columns] -> float32 [..., rows]."""
        change = F.linear(F.linear(x, self.pair.down), self.pair.up)
        return self.base(x) + change  # type: ignore[no-any-return]


@contextmanager
def adapted(model: Llama, pairs: Pairs) -> Iterator[None]:
    """Context in which `model` computes with an adapter. Linears inside may be replaced further, as targets do."""
    names = {model.get_submodule(name): name for name in pairs}

    def replacement(module: nn.Module) -> nn.Module | None:
        return AdaptedLinear(module, pairs[names[module]]) if module in names else None

    with replaced(model, replacement):
        yield
