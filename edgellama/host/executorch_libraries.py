"""ExecuTorch's Python bindings with every operator library loaded: the one place that loads them.

A language model's .pte stops with "Missing operator" unless three libraries are loaded, and the order counts: the
bindings first, because the quantized kernels register themselves with a runtime that must exist by then (executorch
1.4.0: 240 operators with the bindings alone, 249 with the quantized kernels loaded too early, 268 in this order).

Imported as they are, the bindings bring all of ExecuTorch's compiler along for one warning class, and the attention
operators torch's inductor: five seconds before a model is run. With the executorch that this was proven with, the
compiler stays out until somebody imports it, and of the attention operators only the library is loaded; what lowers them
imports the rest (`export/xnnpack/modules.py`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import executorch
import torch

__all__ = ["Runtime", "is_installed", "set_threads", "threads"]

PROVEN = "1.4.0"
_COMPILER = "executorch.exir"


def is_installed(proven: str) -> bool:
    """Is the installed executorch the version that something was proven with?"""
    return version("executorch").partition("+")[0] == proven


@contextmanager
def _without_compiler() -> Iterator[None]:
    """A block in which an import of the compiler's `_warnings` does not import the compiler."""
    if _COMPILER in sys.modules or not is_installed(PROVEN):
        yield
        return
    shell = ModuleType(_COMPILER)
    shell.__path__ = [f"{path}/exir" for path in executorch.__path__]
    sys.modules[_COMPILER] = shell
    try:
        yield
    finally:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{_COMPILER}.")]:
            del sys.modules[name]


with _without_compiler():
    from executorch.extension.pybindings import portable_lib  # isort: split
    import executorch.kernels.quantized
    from executorch.runtime import Runtime

for _folder in executorch.__path__:
    for _library in Path(_folder).glob("extension/llm/custom_ops/*custom_ops_aot_lib.*"):
        torch.ops.load_library(_library)


def _blas_with_one_thread() -> None:
    """MKL's number of threads where a thread has none of its own. Nothing to do where torch has no MKL; where torch's
    library has another name (Windows), nothing is done."""
    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not file.is_file():
        return
    library = ctypes.CDLL(str(file))
    library.mkl_serv_set_num_threads(1)  # what MKL's public header calls mkl_set_num_threads; torch 2.13.0
    torch.set_num_threads(torch.get_num_threads())  # ours, which had none of its own until then


_blas_with_one_thread()


def threads() -> int:
    """Number of threads that XNNPACK uses."""
    return int(portable_lib._threadpool_get_thread_count())


def set_threads(count: int) -> None:
    """Resize XNNPACK's thread pool: upstream calls it unsafe, since no method may be running meanwhile."""
    portable_lib._unsafe_reset_threadpool(count)
