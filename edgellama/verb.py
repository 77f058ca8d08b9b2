"""Verbs that are modules and functions at once: `edgellama.export(...)` beside `edgellama.export.pipeline`.

Python binds a submodule as an attribute of its package when it is first imported, so a function of the same name
in `edgellama/__init__.py` would be replaced by the module. A module that can be called has no such race.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    __verb__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _, function = self.__verb__.partition(":")
        return getattr(import_module(module), function)(*args, **kwargs)


def callable_as(name: str, verb: str) -> None:
    """Calling the module `name` calls `verb`, given as `module:function`."""
    module = sys.modules[name]
    module.__class__ = _Callable
    module.__dict__["__verb__"] = verb
