"""Counts of instructions: the plugin's messages, and refusals without a built counter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgellama.cli import main
from edgellama.emulator import counter
from edgellama.emulator.installed import Emulator
from edgellama.errors import MissingDependencyError
from tests.helpers.paths import ROOT


def test_every_second_message_is_a_call() -> None:
    """The worker marks the begin and the end of each call, and each message counts since the last mark."""
    messages = (
        b"a warning\ninstructions 900\ninstructions 40\ninstructions 7\ninstructions 41\n instructions 1\n"
    )
    assert counter.counts(messages) == [40, 41]
    assert counter.counts(b"") == []


def test_an_emulator_without_the_counter_names_the_command(tmp_path: Path) -> None:
    emulator = Emulator(tmp_path, "10.0.13", {})
    with pytest.raises(MissingDependencyError) as error:
        counter.counter(emulator)
    assert counter.INSTALL in error.value.remedy
    for name in (counter.QEMU, counter.PLUGIN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert counter.counter(emulator) == (tmp_path / counter.QEMU, tmp_path / counter.PLUGIN)


def test_a_missing_compiler_is_named_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "cc" else f"/usr/bin/{name}")
    with pytest.raises(MissingDependencyError, match="cc is missing"):
        counter.build_counter(Emulator(tmp_path, "10.0.13", {}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--repeat", "--threads"])
def test_options_about_time_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model.edgellama", "--emulate", "arm64", option, "2"]) == 2
    assert "has no meaning for counts" in capsys.readouterr().err


def test_the_plugins_source_is_packaged() -> None:
    assert counter.SOURCE.is_file()
    assert f'"edgellama.emulator" = ["*{counter.SOURCE.suffix}"]' in (ROOT / "pyproject.toml").read_text()
