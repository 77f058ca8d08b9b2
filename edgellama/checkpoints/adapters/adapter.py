"""Adapter: changes of a checkpoint's weights, whatever program wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

_LARGEST = 1e18  # its products with weights stay finite in float32


def is_factor(value: Any) -> TypeGuard[float]:
    """True for a number of a training's config that changes can be multiplied by."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


@dataclass(frozen=True)
class LowRank:
    """Change of one weight [rows, columns]: `scale * up @ down`, and with DoRA a length of each row.

    LoRA is Hu et al. 2021, DoRA Liu et al. 2024.

    Attributes:
        down: float32 [rank, columns], `lora_A` of PEFT.
        up: float32 [rows, rank], `lora_B` of PEFT.
        scale: factor of the product: alpha / rank, with rsLoRA alpha / sqrt(rank).
        magnitude: norm of each merged row, float32 [rows]; None without DoRA.

    >>> import torch
    >>> change = LowRank(torch.ones(1, 2), torch.ones(3, 1), scale=0.5)
    >>> change.applied(torch.zeros(3, 2)).tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight."""
        return len(self.up), self.down.shape[1]

    @property
    def rank(self) -> int:
        return len(self.down)

    def applied(self, weight: Tensor, factor: float = 1.0) -> Tensor:
        """The changed weight. factor: of the whole change, for an adapter with a weight."""
        changed = torch.addmm(weight, self.up, self.down, alpha=factor * self.scale)
        if self.magnitude is None:
            return changed
        stretched: Tensor = changed * (self.magnitude / torch.linalg.vector_norm(changed, dim=1))[:, None]
        return stretched


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from its directory.

    Attributes:
        path: the directory.
        layout: `peft` or `mlx`.
        base: name of the model that it was trained on, as the training recorded it; None without one.
        changes: changes by the name of the weight.
        saved: tensors that were trained whole, by name. They replace the base's.
        tables: embedding and head as they were before the training, for a vocabulary that was resized.
        keeps_tie: True if the training kept a tied head equal to its embedding.
        adapts: (name of a module, number of the base's layers) -> True if its config says that it was adapted.
    """

    path: Path
    layout: str
    base: str | None
    changes: Mapping[str, LowRank] = field(repr=False)
    saved: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    tables: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    keeps_tie: bool = False
    adapts: Callable[[str, int], bool] = field(default=lambda module, layers: False, repr=False)

    @property
    def trained(self) -> set[str]:
        """Names of the tensors that the training changed."""
        return {*self.changes, *self.saved}

    @property
    def parameters(self) -> int:
        """Number of values in the adapter's file that count."""
        low_rank = sum(change.down.numel() + change.up.numel() for change in self.changes.values())
        whole = sum(tensor.numel() for tensor in (*self.saved.values(), *self.tables.values()))
        return low_rank + whole
