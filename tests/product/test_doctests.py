"""Examples in docstrings, run as they stand. `model` and `bundle` are the tiny model and its bundle."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import edgellama
from edgellama.bundle import Bundle
from tests.helpers.paths import ROOT, TINY


def modules_with_examples() -> list[str]:
    """Names of the package's modules whose docstrings hold an example."""
    names = []
    for folder, package in (
        ("edgellama", "edgellama"),
        ("export", "edgellama.export"),
        ("runtimes", "edgellama.runtimes"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            is_link = folder == "edgellama" and parts[0] in ("export", "runtimes")
            if not is_link and ">>> " in path.read_text(encoding="utf-8"):
                names.append(".".join((package, *(p for p in parts if p != "__init__"))))
    return names


SLOW = {"edgellama", "edgellama.commands.export", "edgellama.commands.validate"}  # they run the gate


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in modules_with_examples()]
)
def test_examples(name: str, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"model": str(TINY), "bundle": tiny_bundle})
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "name", sorted(set(edgellama.__all__) - {"__version__", "RECIPES", "EdgellamaError", "Checkpoint"})
)
def test_every_public_name_has_an_example(name: str) -> None:
    """`open_checkpoint` shows a Checkpoint; recipes and errors are data."""
    item = getattr(edgellama, name)
    function = importlib.import_module("edgellama.commands.export").export if name == "export" else item
    assert ">>> " in (function.__doc__ or ""), name
