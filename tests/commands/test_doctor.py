"""Verb `doctor`: a fit machine passes, and each thing that can be wrong is named with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellama.cli.dispatch import main
from edgellama.commands import doctor as module
from edgellama.commands.doctor import doctor
from edgellama.errors import MissingDependencyError
from edgellama.targets import TARGETS, Target


def problems() -> dict[str, str]:
    return {p["what"]: p["remedy"] for p in doctor()["problems"]}


def test_a_fit_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Where these tests run, everything that the project pins is installed."""
    assert main(["doctor", "--json", "-"]) == 0
    out, text = capsys.readouterr()
    data: dict[str, Any] = json.loads(out)
    assert data["problems"] == []
    assert {row["target"]: row["export"] for row in data["targets"]} == dict.fromkeys(TARGETS, "yes")
    assert {row["package"] for row in data["packages"]} >= {
        "torch",
        "executorch",
        "coremltools",
        "onnxruntime",
    }
    assert "pytest" not in {row["package"] for row in data["packages"]}
    assert "interpreted only" in text or "darwin" in data["machine"]["system"].lower()


def test_another_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    versions = module._version
    monkeypatch.setattr(module, "_version", lambda name: "1.3.0" if name == "executorch" else versions(name))
    assert problems() == {"executorch is 1.3.0; needed is ==1.4.0": "pip install 'executorch==1.4.0'"}
    assert main(["doctor"]) == 1
    assert "problem: executorch is 1.3.0" in capsys.readouterr().err


def test_a_missing_package_is_a_problem_unless_an_extra_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = module._version
    gone = ("torchao", "onnxruntime")
    monkeypatch.setattr(module, "_version", lambda name: None if name in gone else versions(name))
    assert problems() == {"torchao is not installed; needed is ==0.18.0": "pip install 'torchao==0.18.0'"}


def test_what_a_missing_extra_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    def opener(target: Target) -> None:
        if target.extra:
            raise MissingDependencyError("no onnxruntime", remedy=f"pip install 'edgellama[{target.extra}]'")

    monkeypatch.setattr(module, "opener_for", opener)
    rows = {row["target"]: row["run"] for row in doctor()["targets"]}
    assert rows["onnx"] == "no: pip install 'edgellama[onnx]'" and rows["xnnpack"] == "yes"


def test_executorch_without_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        @staticmethod
        def get() -> Any:
            return SimpleNamespace(
                backend_registry=SimpleNamespace(registered_backend_names=["XnnpackBackend"]),
                operator_registry=SimpleNamespace(operator_names=list(module.OPERATORS[1:])),
            )

    from edgellama.host import executorch_libraries

    monkeypatch.setattr(executorch_libraries, "Runtime", Empty)
    assert list(problems()) == [f"executorch lacks the operators {module.OPERATORS[0]}"]


def test_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "free_memory", lambda: 1_000_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=500_000_000))
    found = list(problems())
    assert len(found) == 2
    assert found[0].startswith("1.0 GB of memory are free") and found[1].startswith("0.5 GB are free")
