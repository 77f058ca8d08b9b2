"""Tests of `edgellama doctor`: a complete machine passes, and each problem has a remedy."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellama.cli.dispatch import main
from edgellama.commands import doctor as doctor_module
from edgellama.commands.doctor import doctor
from edgellama.emulator import installed
from edgellama.errors import MissingDependencyError
from edgellama.files import to_json
from edgellama.host.proven_versions import Difference, constraints_file
from edgellama.host.versions import installed_versions
from edgellama.targets import TARGETS, Target


def problems() -> dict[str, str]:
    """Remedy of each problem that `doctor` reports."""
    return {p["what"]: p["remedy"] for p in doctor()["problems"]}


def test_a_complete_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """All pinned packages are installed on machines that run the tests."""
    assert main(["doctor", "--json", "-"]) == 0
    out, text = capsys.readouterr()
    data: dict[str, Any] = json.loads(out)
    assert data["problems"] == []
    assert {row["target"]: row["export"] for row in data["targets"]} == dict.fromkeys(TARGETS, "yes")
    packages = {row["package"] for row in data["packages"]}
    assert packages >= {"torch", "executorch", "coremltools", "onnxruntime"}
    assert "pytest" not in packages
    assert "interpreted only" in text or "darwin" in data["machine"]["system"].lower()


def test_a_wrong_version_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = doctor_module._version
    monkeypatch.setattr(
        doctor_module, "_version", lambda name: "1.3.0" if name == "executorch" else installed(name)
    )
    assert problems() == {
        "executorch is 1.3.0; needed is <=1.5.1,>=1.4.0": "pip install 'executorch<=1.5.1,>=1.4.0'"
    }
    assert main(["doctor"]) == 1
    assert "problem: executorch is 1.3.0" in capsys.readouterr().err


def test_an_old_python_and_an_old_mac_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.14.0")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.6", ("", "", ""), ""))
    monkeypatch.setattr(doctor_module, "sys", SimpleNamespace(platform="darwin"))
    (python,) = doctor_module._python()
    assert python.what == "Python is 3.14.0; edgellama was proven with >=3.11,<3.14"
    processor, system = doctor_module._mac()
    assert "Apple silicon alone" in processor.what and system.what.startswith("macOS is 13.6")


def test_packages_that_moved_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Difference("torch", "2.13.0", "2.14.0")
    monkeypatch.setattr(doctor_module, "differences", lambda: [moved])
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "2.14.0" in out and "1 packages differ" in err and str(constraints_file()) in err


def test_a_missing_package_is_a_problem_unless_it_belongs_to_an_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = doctor_module._version
    missing = ("torchao", "onnxruntime", "lm_eval", "matplotlib", "transformers", "mlx-lm", "xllamacpp")
    monkeypatch.setattr(doctor_module, "_version", lambda name: None if name in missing else installed(name))
    assert problems() == {"torchao is not installed; needed is ==0.18.0": "pip install 'torchao==0.18.0'"}


def test_a_missing_extra_disables_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def opener(target: Target) -> None:
        if target.extra:
            raise MissingDependencyError("no onnxruntime", remedy=f"pip install 'edgellama[{target.extra}]'")

    monkeypatch.setattr(doctor_module, "opener_for", opener)
    rows = {row["target"]: row["run"] for row in doctor()["targets"]}
    assert rows["onnx"] == "no: pip install 'edgellama[onnx]'" and rows["xnnpack"] == "yes"


def test_the_emulator_is_no_problem_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(installed.VARIABLE, str(tmp_path))
    data = doctor()
    assert data["problems"] == [] and installed.INSTALL in data["emulator"]["arm64"]
    versions = {name: v for name, v in installed_versions(installed.DECIDING).items() if v is not None}
    record = {"schema": installed.SCHEMA, "qemu": "10.0.13", "versions": versions}
    (tmp_path / installed.RECORD).write_text(to_json(record), encoding="utf-8")
    assert doctor()["emulator"]["arm64"].startswith("yes: qemu 10.0.13, torch")


def test_executorch_without_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    class RuntimeWithoutOperator:
        @staticmethod
        def get() -> Any:
            return SimpleNamespace(
                backend_registry=SimpleNamespace(registered_backend_names=["XnnpackBackend"]),
                operator_registry=SimpleNamespace(operator_names=list(doctor_module.OPERATORS[1:])),
            )

    from edgellama.host import executorch_libraries

    monkeypatch.setattr(executorch_libraries, "Runtime", RuntimeWithoutOperator)
    assert list(problems()) == [f"executorch lacks the operators {doctor_module.OPERATORS[0]}"]


def test_little_memory_and_disk_are_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor_module, "free_memory", lambda: 1_000_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=500_000_000))
    memory, disk = problems()
    assert memory.startswith("1.0 GB of memory are free") and disk.startswith("0.5 GB are free")
