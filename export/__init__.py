"""Checkpoint to artifacts: plan, quantize, lower. One folder a target.

The package is also the verb: `edgellama.export(...)` calls `edgellama.commands.export.export`. Python binds a
subpackage as an attribute of its package when it is first imported, so a function of the same name in
`edgellama/__init__.py` would be replaced by the package. A module that can be called has no such race.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # By name: the verb lies above this package, and an import statement would point up.
        return import_module("edgellama.commands.export").export(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
