"""The versions of all packages that edgellama was proven with, and what is installed instead.

They stand in edgellama/data/constraints.txt, in pip's format for `pip install -c`. `python -m tests.make_constraints`
writes it from an environment in which the tests passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgellama import data
from edgellama.host.versions import installed_versions

CONSTRAINTS = "constraints.txt"


@dataclass(frozen=True)
class Difference:
    """A package whose installed version is not the proven one."""

    package: str
    proven: str
    installed: str


def constraints_file() -> Path:
    """Path of the constraints, for `pip install -c`."""
    return Path(str(data.__file__)).parent / CONSTRAINTS


def proven_versions() -> dict[str, str]:
    """Proven version of each package, by name.

    >>> proven_versions()["torch"]
    '2.13.0'
    """
    lines = data.read_text(CONSTRAINTS).splitlines()
    pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name: version for name, _, version in pairs}


def differences() -> list[Difference]:
    """Installed packages whose version is not the proven one, by name. A package that is absent is none of them."""
    proven = proven_versions()
    return [
        Difference(name, proven[name], installed)
        for name, installed in installed_versions(proven).items()
        if installed is not None and installed != proven[name]
    ]
