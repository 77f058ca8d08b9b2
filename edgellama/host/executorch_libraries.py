"""ExecuTorch's Python bindings with every operator library loaded: the only place that loads them.

A language model's .pte stops with "Missing operator" unless three libraries are loaded in the right order.
The bindings come first, because the quantized kernels register themselves with a runtime that must exist by
then. Operators in executorch 1.4.0: 240 with the bindings alone, 249 with the quantized kernels loaded too
early, 268 in this order.

Plain imports take five seconds before a model is run. The bindings import all of ExecuTorch's compiler for
one warning class, and the attention operators import torch's inductor. With a proven version of executorch,
the compiler stays out until other code imports it. Of the attention operators only the library is loaded. The
code that lowers them imports the rest (`edgellama/export/xnnpack/modules.py`).
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import executorch
import torch

from edgellama.host.executorch_versions import proven

__all__ = ["runtime", "set_threads", "threads"]

_COMPILER = "executorch.exir"


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keeps an import of the compiler's `_warnings` from importing the compiler, in a block."""
    if _COMPILER in sys.modules or not proven():
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


with _without_compiler(), warnings.catch_warnings():
    # The bindings call themselves experimental. Under `python -W error` that would end the import.
    warnings.simplefilter("ignore")
    from executorch.extension.pybindings import portable_lib  # isort: split
    import executorch.kernels.quantized
    from executorch.runtime import Runtime

for _folder in executorch.__path__:
    for _library in Path(_folder).glob("extension/llm/custom_ops/*custom_ops_aot_lib.*"):
        torch.ops.load_library(_library)


def _blas_with_one_thread() -> None:
    """Sets MKL's default number of threads, for threads without a number of their own, to 1.

    Without MKL there is nothing to set. Nothing is done if torch's library has another name (Windows).
    """
    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch.backends.mkl.is_available() or not file.is_file():
        return
    library = ctypes.CDLL(str(file))
    library.mkl_serv_set_num_threads(1)  # mkl_set_num_threads in MKL's public header; torch 2.13.0
    torch.set_num_threads(torch.get_num_threads())  # this thread had no number of its own until now


_blas_with_one_thread()


_first_use = threading.Lock()


def runtime() -> Runtime:
    """ExecuTorch's runtime, with XNNPACK's pool of threads in place.

    ExecuTorch makes the pool under a lock of its own, and logs through Python meanwhile. A second thread that waits
    for that lock, and holds Python's, would never end. So one thread makes the pool, and the others wait here.
    """
    with _first_use:
        threads()
    return Runtime.get()


def threads() -> int:
    """Number of threads that XNNPACK uses."""
    return int(portable_lib._threadpool_get_thread_count())


def set_threads(count: int) -> None:
    """Replaces XNNPACK's pool of threads by one of another size. Does nothing if it has that size.

    Methods that are loaded keep the old pool, which is freed: they hang or crash when they run. The caller sees
    to it that there are none.
    """
    if count != threads():
        portable_lib._unsafe_reset_threadpool(count)
