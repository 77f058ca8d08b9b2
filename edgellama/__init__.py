"""edgellama: small Llama models, quantized, lowered and proven for the device they will run on.

`model` is the path of a checkpoint:

>>> import edgellama
>>> bundle = edgellama.export(model, "model.edgellama", recipe="int4-fast", context=128)
>>> report = edgellama.validate(bundle, reference=model, tokens=1024)
>>> report.verdict
'pass'
>>> with edgellama.load(bundle) as runtime:
...     logits = runtime.forward(bundle.tokenizer.encode("Once upon"))
>>> logits.dtype, len(logits) == runtime.vocab_size
(dtype('float32'), True)

Importing edgellama imports nothing heavy. Each name below is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellama.bundle import Bundle as Bundle
    from edgellama.checkpoints import Checkpoint as Checkpoint
    from edgellama.checkpoints import open_checkpoint as open_checkpoint
    from edgellama.commands.export import export as export
    from edgellama.commands.validate import validate as validate
    from edgellama.errors import EdgellamaError as EdgellamaError
    from edgellama.recipe import RECIPES as RECIPES
    from edgellama.recipe import Recipe as Recipe
    from edgellama.report import Report as Report
    from edgellama.runtimes.base import Runtime as Runtime
    from edgellama.runtimes.load import load as load
    from edgellama.runtimes.load import load_reference as load_reference

from edgellama._version import __version__

# Module of each public name. `export` is a package that can be called (edgellama/export/__init__.py).
_PUBLIC = {
    "Bundle": "edgellama.bundle.bundle",
    "Checkpoint": "edgellama.checkpoints.checkpoint",
    "EdgellamaError": "edgellama.errors",
    "RECIPES": "edgellama.recipe",
    "Recipe": "edgellama.recipe",
    "Report": "edgellama.report.report",
    "Runtime": "edgellama.runtimes.base",
    "load": "edgellama.runtimes.load",
    "load_reference": "edgellama.runtimes.load",
    "open_checkpoint": "edgellama.checkpoints.open",
    "validate": "edgellama.commands.validate",
}

__all__ = ["__version__", "export", *sorted(_PUBLIC)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "export":
        return import_module("edgellama.export")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'edgellama' has no attribute {name!r}")
