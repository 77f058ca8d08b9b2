"""Temporary replacement of modules, so that one model computes with the arithmetic of another target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def replaced(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> Iterator[None]:
    """Replaces modules of `model` inside the block, and restores them at its end.

    replacement: returns the new module, or None to keep the module.
    """
    originals: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        new = replacement(module)
        if new is not None:
            originals[name] = module
            model.set_submodule(name, new)
    try:
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
