"""Tests of the proven versions: they fit pyproject.toml, are whole, and a difference is seen."""

from __future__ import annotations

import tomllib
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgellama.commands.doctor import PYTHON
from edgellama.host import proven_versions
from edgellama.host.executorch_versions import PROVEN
from edgellama.host.proven_versions import Difference, constraints_file, differences
from tests.helpers.lift_pins import lifted
from tests.helpers.paths import ROOT
from tests.make_constraints import HEADER, roots

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_constraints_are_those_of_pyproject() -> None:
    pins = proven_versions.proven_versions()
    for requirement in roots():
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert pins["executorch"] == PROVEN[-1]
    assert constraints_file().read_text(encoding="utf-8").startswith(HEADER)


def test_a_moved_package_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    proven = proven_versions.proven_versions()
    installed = {**proven, "torch": "2.14.0", "kiwisolver": None}
    monkeypatch.setattr(proven_versions, "installed_versions", lambda names: installed)
    assert differences() == [Difference("torch", proven["torch"], "2.14.0")]


def test_lifted_pins_leave_lower_bounds() -> None:
    project = tomllib.loads(lifted(PYPROJECT))["project"]
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        assert all(s.operator == ">=" for s in Requirement(line).specifier), line
    assert project["requires-python"] == PYTHON
