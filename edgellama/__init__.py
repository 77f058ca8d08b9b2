"""edgellama: small Llama models, quantized, lowered and proven for the device they will run on.

    bundle = edgellama.export("path/to/model", "out.edgellama", targets=["xnnpack"], recipe="int4-fast")
    report = edgellama.validate(bundle, reference="path/to/model")
    with edgellama.load(bundle, target="xnnpack") as runtime:
        logits = runtime.forward(tokens)

Importing edgellama imports nothing heavy; each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellama.build import export as export
    from edgellama.bundle import Bundle as Bundle
    from edgellama.checkpoint import Checkpoint as Checkpoint
    from edgellama.checkpoint import open_checkpoint as open_checkpoint
    from edgellama.errors import EdgellamaError as EdgellamaError
    from edgellama.load import load as load
    from edgellama.load import load_reference as load_reference
    from edgellama.recipe import RECIPES as RECIPES
    from edgellama.recipe import Recipe as Recipe
    from edgellama.report import Report as Report
    from edgellama.runtimes.base import Runtime as Runtime
    from edgellama.validate import validate as validate

__version__ = "0.1.0"

# Where each public name lives. A verb's module is itself callable (edgellama.verb).
_PUBLIC = {
    "Bundle": "edgellama.bundle",
    "Checkpoint": "edgellama.checkpoint",
    "EdgellamaError": "edgellama.errors",
    "RECIPES": "edgellama.recipe",
    "Recipe": "edgellama.recipe",
    "Report": "edgellama.report",
    "Runtime": "edgellama.runtimes.base",
    "load_reference": "edgellama.load",
    "open_checkpoint": "edgellama.checkpoint",
}
_VERBS = ("export", "load", "validate")

__all__ = ["__version__", *sorted((*_PUBLIC, *_VERBS))]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return import_module(f"edgellama.{name}")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'edgellama' has no attribute {name!r}")
