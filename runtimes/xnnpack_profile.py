"""Runtime of a .pte that records the time of every call, by ExecuTorch's event tracer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from edgellama.errors import MissingDependencyError
from edgellama.formats.pte_profile import ProfiledRun, read_profile
from edgellama.host.executorch_versions import (
    EVENT_TRACER,
    PROVEN,
    has_event_tracer,
    installed_executorch,
)
from edgellama.runtimes.xnnpack import PteRuntime


class TracedPte(PteRuntime):
    """A .pte whose runs are traced, which makes them slower.

    Raises MissingDependencyError if the installed ExecuTorch has no tracer.
    """

    load_options: ClassVar[Mapping[str, Any]] = {"enable_etdump": True}

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if not has_event_tracer():
            raise MissingDependencyError(
                f"ExecuTorch {installed_executorch()} has no event tracer; its wheels have it from {EVENT_TRACER} on",
                remedy=f"pip install 'executorch=={PROVEN[-1]}'",
            )
        super().__init__(path, threads=threads)

    def take_profile(self) -> list[ProfiledRun]:
        """Runs since the last call, in order, those of constant methods included. The trace is then empty."""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.etdp"
            self._program.write_etdump_result_to_file(str(file), str(file.with_suffix(".debug")))
            return read_profile(file)
