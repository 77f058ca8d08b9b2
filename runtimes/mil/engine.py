"""Engine `mil-reference`: the reference interpreter as an engine of the Core ML runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from edgellama.report import Check, below
from edgellama.runtimes.mil.interpreter import FLOAT16_MAX, MilModel


class MilEngine:
    """Computes a package's functions in torch.

    mode: `fp16` rounds like a device; `fp32` does not. kept: names of values to return with the outputs, by
    function.
    """

    name = "mil-reference"

    def __init__(
        self,
        package: Path,
        mode: Literal["fp16", "fp32"] = "fp16",
        kept: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model = MilModel(package, mode=mode, observe=True, kept=kept)

    def make_state(self) -> Any:
        return self.model.make_state()

    def predict(self, inputs: Mapping[str, Tensor], function: str, state: Any) -> dict[str, Tensor]:
        return self.model.predict(inputs, function, state)

    def checks(self) -> list[Check]:
        """Returns `structure.float16_range`: the largest magnitude of all results computed so far."""
        ranges = self.model.ranges
        overflown = [name for name, r in ranges.items() if r.nonfinite]
        name, peak = max(((n, r.largest) for n, r in ranges.items()), key=lambda x: x[1], default=("", 0.0))
        if overflown:
            detail = f"overflow in {', '.join(overflown[:3])}"
            return [below("structure.float16_range", float("inf"), FLOAT16_MAX, detail=detail)]
        return [below("structure.float16_range", peak, FLOAT16_MAX, detail=f"in {name}")]
