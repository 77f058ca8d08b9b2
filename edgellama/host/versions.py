"""Versions of Python, edgellama and the packages that decide an artifact's bytes."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgellama._version import __version__
from edgellama.files import file_sha256, raise_error

# Packages whose versions may change a bundle of any target; `Target.packages` has the others.
PACKAGES = ("gguf", "jinja2", "numpy", "safetensors", "sentencepiece", "tokenizers", "torch", "torchao")


def tools(packages: Iterable[str] = ()) -> dict[str, str | None]:
    """Versions by name: Python, edgellama, a hash of its sources, and packages (None if not installed)."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "edgellama": __version__,
        "edgellama sources": _sources_sha256(),
        **{name: _version(name) for name in sorted({*PACKAGES, *packages})},
    }


@cache
def _sources_sha256() -> str:
    """Hash of the package's files without docs/: a change of code may change the result, a page does not."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    names = sorted(
        os.path.relpath(os.path.join(at, name), root)
        for at, _, files in os.walk(root, followlinks=True, onerror=raise_error)
        for name in files
        if not name.endswith((".pyc", ".md")) and not name.startswith(".")
        if Path(at) != root / "docs"
    )
    for name in names:
        total.update(f"{file_sha256(root / name)}  {Path(name).as_posix()}\n".encode())
    return total.hexdigest()


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions by name, without the local part (`+cpu`); None for a package that is not installed."""
    return {name: (_version(name) or "").partition("+")[0] or None for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
