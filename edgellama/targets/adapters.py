"""Content of an adapter's file in any format: named float32 arrays, and the base that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class StoredAdapter:
    """Content of one file.

    Attributes:
        arrays: by the format's own names.
        base: text that stands for the base's manifest. A format without room for text keeps a number of it.
        settings: further keys of the file.
    """

    arrays: Mapping[str, np.ndarray] = field(repr=False)
    base: str
    settings: Mapping[str, str | float] = field(default_factory=dict)

    def differences(self, actual: StoredAdapter) -> list[str]:
        """Words about everything in which `actual` differs from this content."""
        problems = [] if self.base == actual.base else ["it belongs to another base"]
        for key in sorted({*self.settings, *actual.settings}):
            if self.settings.get(key) != actual.settings.get(key):
                problems.append(f"{key} is {actual.settings.get(key)}, expected {self.settings.get(key)}")
        for name in sorted({*self.arrays, *actual.arrays}):
            own, other = self.arrays.get(name), actual.arrays.get(name)
            if own is None or other is None:
                problems.append(f"{name} is {'missing' if other is None else 'not expected'}")
            elif own.shape != other.shape:
                problems.append(f"{name} is {list(other.shape)}, expected {list(own.shape)}")
            elif own.tobytes() != other.tobytes():
                problems.append(f"{name} has other values")
        return problems
