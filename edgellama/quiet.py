"""Messages of dependencies that users can do nothing about, kept off their terminal. The one place that does so."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# torchao 0.18 warns about CUDA libraries that a CPU has no use for; torch 2.13 about torchao's own enum
# registration; executorch 1.4.0 logs each step of its passes at warning level.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "torch.utils._pytree.python", "executorch", "root")


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
