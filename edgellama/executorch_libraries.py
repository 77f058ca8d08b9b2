"""ExecuTorch's Python bindings with every operator library loaded: the one place that loads them.

A language model's .pte stops with "Missing operator" unless three libraries are loaded, and the order counts: the
bindings first, because the quantized kernels register themselves with a runtime that must exist by then (executorch
1.4.0: 240 operators with the bindings alone, 249 with the quantized kernels loaded too early, 268 in this order).
"""

from __future__ import annotations

from executorch.extension.pybindings import portable_lib  # isort: skip
import executorch.kernels.quantized  # noqa: F401  isort: skip
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  isort: skip
from executorch.runtime import Runtime

__all__ = ["Runtime", "set_threads", "threads"]


def threads() -> int:
    """Number of threads that XNNPACK uses."""
    return int(portable_lib._threadpool_get_thread_count())


def set_threads(count: int) -> None:
    """Resize XNNPACK's thread pool: upstream calls it unsafe, since no method may be running meanwhile."""
    portable_lib._unsafe_reset_threadpool(count)
