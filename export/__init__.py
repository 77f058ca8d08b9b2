"""Export of a checkpoint to artifacts: plan, quantize, lower. One folder for each target.

The package is also the verb: `edgellama.export(...)` calls `edgellama.commands.export.export`. Python binds a
subpackage as an attribute of its package at the first import. A function of the same name in
`edgellama/__init__.py` would then be replaced by the package. A module that can be called avoids this race.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Imported by name, because an import statement would make this package depend on the verbs above it.
        return import_module("edgellama.commands.export").export(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
