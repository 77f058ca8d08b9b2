"""Engine `coreml`: Core ML itself, through coremltools' `predict`. Requires macOS 15 or later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgellama.errors import BundleError, MissingDependencyError
from edgellama.report import Check


class AppleEngine:
    """Computes a package's functions in Core ML. units: name of a coremltools `ComputeUnit`."""

    name = "coreml"

    def __init__(self, package: Path, units: str = "CPU_AND_GPU") -> None:
        if sys.platform != "darwin":
            raise MissingDependencyError(
                "Core ML runs on macOS only",
                remedy="Elsewhere `edgellama.load` takes the reference interpreter, which needs nothing else.",
            )
        import coremltools as ct

        self._package: Path = package
        self._load: Callable[[str | None], Any] = lambda name: ct.models.MLModel(
            str(package), compute_units=ct.ComputeUnit[units], function_name=name
        )
        self._functions: dict[str, Any] = {}
        self._state: Any = None

    def make_state(self) -> Any:
        """Returns None. Core ML makes a state from a loaded function, so the first `predict` makes it."""
        return None

    def predict(self, inputs: Mapping[str, Tensor], function: str, state: Any) -> dict[str, Tensor]:
        """Returns the outputs by name. Raises BundleError if Core ML cannot run the package."""
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        try:
            if function not in self._functions:
                # Core ML loads the only function of a package without a name.
                self._functions[function] = self._load(None if function == "main" else function)
            model = self._functions[function]
            if self._state is None:
                self._state = model.make_state()
            outputs = model.predict(arrays, state=self._state)
        except RuntimeError as error:
            raise BundleError(
                f"{self._package}: Core ML cannot run it ({error})",
                remedy="Export again, or try other compute units; `edgellama inspect` shows the package's requirements.",
            ) from error
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    def checks(self) -> list[Check]:
        return []
