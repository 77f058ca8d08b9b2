"""Writes edgellama/data/constraints.txt: the versions of all packages that edgellama and its extras need.

    python -m tests.make_constraints

Run it in a new environment with ".[test]" in which all tests have passed. It takes the versions that are installed
there, of Linux on x86-64. Packages that only another system needs are not in the file.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgellama.host.proven_versions import constraints_file
from tests.helpers.paths import ROOT

HEADER = """\
# Versions that edgellama was proven with on x86-64 Linux. Written by python -m tests.make_constraints.
# pip install -c constraints.txt edgellama
"""


def roots() -> list[Requirement]:
    """Requirements of edgellama and of its extra `all`, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    lines = [*project["dependencies"], *(line for name in sorted(everything.extras) for line in extras[name])]
    return [Requirement(line) for line in lines]


def installed_pins() -> dict[str, str]:
    """Installed version of everything that `roots` need, by canonical name, sorted."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = roots()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            if name in {canonicalize_name(root.name) for root in roots()}:
                raise
            continue  # an option of a dependency that nobody asked for
        pins[name] = found.version.partition("+")[0]
        for line in found.requires or ():
            child = Requirement(line)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in ("", *extras)):
                waiting.append(child)
    return dict(sorted(pins.items()))


def main() -> None:
    lines = [f"{name}=={version}\n" for name, version in installed_pins().items()]
    constraints_file().write_text(HEADER + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
