"""Installation of the emulator: refusals, and the stand-in for CUDA. The download itself is tried by `.ci/run`."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from edgellama.cli import main
from edgellama.emulator import debian, install, installed
from edgellama.emulator.cuda_stub import assembly, remove_cuda
from edgellama.errors import MissingDependencyError, ResourceError
from edgellama.files import to_json
from edgellama.host.progress import Progress
from edgellama.host.versions import installed_versions


def record(directory: Path, **versions: str) -> None:
    """Writes the record of an installed emulator with this environment's versions, but for those given."""
    here = {name: v for name, v in installed_versions(installed.DECIDING).items() if v is not None}
    data = {"schema": installed.SCHEMA, "qemu": "10.0.13", "versions": here | versions}
    (directory / installed.RECORD).write_text(to_json(data), encoding="utf-8")


def test_an_installed_emulator_is_found(tmp_path: Path) -> None:
    record(tmp_path)
    assert installed.find_emulator(tmp_path).qemu == "10.0.13"
    assert install.install(tmp_path, Progress()).directory == tmp_path


def test_a_missing_emulator_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulator", "show", str(tmp_path)]) == 2
    assert "edgellama emulator install" in capsys.readouterr().err


def test_other_versions_than_this_environments_are_refused(tmp_path: Path) -> None:
    record(tmp_path, torch="2.12.0")
    with pytest.raises(MissingDependencyError, match=r"torch 2\.12\.0"):
        installed.find_emulator(tmp_path)


def test_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert main(["emulator", "show", str(tmp_path)]) == 2


def test_missing_keys_of_debian_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "keyring.gpg")
    with pytest.raises(MissingDependencyError, match="debian"):
        install.install(tmp_path / "emulator", Progress())


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "mirror", lambda: f"file://{tmp_path}/no-mirror")
    with pytest.raises(ResourceError, match="apt-get"):
        install.install(tmp_path / "emulator", Progress())
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_refused_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "DISK_BYTES", 10**18)
    with pytest.raises(ResourceError, match="GB are free"):
        install.install(tmp_path / "emulator", Progress())


def test_the_stand_in_declares_each_kind_of_symbol() -> None:
    source = assembly(["cudaMalloc", "_ZTIN3FooE", "_ZTVN3FooE", "get_gil_checker"])
    assert "cudaMalloc: b nothing" in source
    assert "get_gil_checker: b somewhere" in source
    assert ".type _ZTIN3FooE, %object" in source and '.asciz "N3FooE"' in source
    assert "_ZTVN3FooE: .zero 512" in source


def test_only_cuda_libraries_are_removed(tmp_path: Path) -> None:
    for name in ("libtorch_cpu.so", "libtorch_cuda.so", "libc10_cuda.so", "libnvrtc-builtins.so"):
        (tmp_path / name).touch()
    remove_cuda(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["libtorch_cpu.so"]
