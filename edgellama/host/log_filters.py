"""Filters for messages of dependencies that users can do nothing about. No other file silences messages."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

# Warnings that these loggers show:
# - torchao 0.18: CUDA libraries that a CPU has no use for
# - torch 2.13: torchao's own enum registration
# - executorch 1.4.0: each step of its passes, logged at warning level
# - coremltools 9.0: versions of torch and scikit-learn and, away from macOS, its missing libraries
NOISY_LOGGERS = (
    "torchao",
    "torch.utils._pytree",
    "torch.utils._pytree.python",
    "executorch",
    "root",
    "coremltools",
)


SILENT = "edgellama, silent"  # name of threads of edgellama's own, which never print

# Threads that lose nothing when output is captured. tqdm's draws a bar again that it could not draw.
SILENT_THREADS = (SILENT, "tqdm_monitor")


def quiet_loggers() -> None:
    """Shows only the errors of NOISY_LOGGERS, for the command line."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def ignored_deprecations() -> Iterator[None]:
    """Ignores deprecation warnings of a dependency about its own code, in a block.

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
    """Silences conversions by coremltools 9.0, in a block.

    It draws its own bars on standard error, and its passes overflow float16 on purpose to detect overflow.
    """
    with ignored_deprecations(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
