"""Speed of the machine: measured once, remembered for this processor and these versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellama.files import to_json
from edgellama.host import machine_speed
from edgellama.host.cache import VARIABLE
from edgellama.host.machine_speed import Speed

KNOWN = Speed(1.5e9, 2.5e9, 3.5e6)


def test_a_measurement_finds_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "_SECONDS", 0.01)
    assert all(value > 1e4 for value in vars(machine_speed.measure_speed()).values())


def test_the_speed_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(machine_speed, "measure_speed", lambda: KNOWN)
    assert machine_speed.machine_speed() == KNOWN
    monkeypatch.setattr(machine_speed, "measure_speed", lambda: pytest.fail("measured again"))
    assert machine_speed.machine_speed() == KNOWN
    monkeypatch.setattr(machine_speed, "_processor", lambda: "another one")
    with pytest.raises(pytest.fail.Exception):
        machine_speed.machine_speed()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"products": 1.0}', to_json({"products": -1.0, "memory": 1.0, "python": 1.0})],
)
def test_a_damaged_entry_is_measured_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(machine_speed, "measure_speed", lambda: KNOWN)
    machine_speed.machine_speed()
    (entry,) = (tmp_path / "speed").iterdir()
    entry.write_text(text)
    assert machine_speed.machine_speed() == KNOWN
    assert "1500000000" in entry.read_text()


def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(machine_speed, "measure_speed", lambda: KNOWN)
    assert machine_speed.machine_speed() == KNOWN
    assert not list(tmp_path.iterdir())
