"""Messages of dependencies that users can do nothing about, kept off their terminal. The one place that does so."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

# torchao 0.18 warns about CUDA libraries that a CPU has no use for; torch 2.13 about torchao's own enum
# registration; executorch 1.4.0 logs each step of its passes at warning level; coremltools 9.0 the versions of torch
# and scikit-learn and, away from macOS, its missing libraries.
NOISY_LOGGERS = (
    "torchao",
    "torch.utils._pytree",
    "torch.utils._pytree.python",
    "executorch",
    "root",
    "coremltools",
)


def quiet_loggers() -> None:
    """For the command line: only errors of these loggers are shown."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def ignored_deprecations() -> Iterator[None]:
    """While a dependency's code runs, its deprecation warnings about its own code are ignored.

    torch.export and executorch's passes warn about functions of torch that executorch's operators still call
    (`torch._check_is_size` in llama::update_cache, torch 2.13.0 and executorch 1.4.0).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def coremltools_quiet() -> Iterator[None]:
    """While coremltools 9.0 converts: it draws bars of its own on standard error, and its passes overflow float16
    on purpose to find out what does.
    """
    with ignored_deprecations(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
