"""Forecast of `export --plan` against files and processes, and refusals for lack of memory or disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.cli.dispatch import main
from edgellama.errors import ResourceError
from edgellama.export import forecast, pipeline
from edgellama.export.plan import make_plan
from edgellama.host import memory
from edgellama.recipe import find_recipe
from edgellama.targets import TARGETS, Target, find_target
from tests.helpers.demo import Demo
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import CONTEXT

# Resident memory that a load and a forward add to a process that already ran a small artifact.
GROWTH = """
import gc, json, re, sys
from pathlib import Path
from edgellama.runtimes.load import opener_for
from edgellama.targets import find_target

def resident():
    return 1024 * int(re.search(r"^Rss:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])

runtime = opener_for(find_target("xnnpack"))
small = runtime(Path(sys.argv[1]))
small.forward([1, 2, 3])
small.close()
del small
gc.collect()
before = resident()
loaded = runtime(Path(sys.argv[2]))
loaded.forward(list(range(3, 131)))
print(resident() - before)
"""


@pytest.mark.slow
def test_bytes_and_memory_of_the_real_model(demo: Demo, gguf: Path, tiny_bundle: Bundle) -> None:
    """Bytes agree within 3 % and peak memory within 20 %, on SmolLM2-135M."""
    config = open_checkpoint(gguf).config
    planned = forecast.forecast_artifact(
        config, find_recipe("int4-fast"), find_target("xnnpack"), demo.bundle.context_length
    )
    path = demo.bundle.artifact("xnnpack")
    assert planned.bytes == pytest.approx(path.stat().st_size, rel=0.03)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tiny_bundle.artifact("xnnpack")), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = int(done.stdout.splitlines()[-1])
    assert planned.memory.peak_estimate == pytest.approx(measured, rel=0.20), (
        planned.memory,
        measured,
    )
    assert planned.memory.kv_cache == demo.bundle.artifact_entry("xnnpack")["memory"]["kv_cache"]


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("recipe", ["int4", "int8", "fp32"])
def test_a_forecast_for_every_target_and_recipe(
    target: str, recipe: str, tiny_checkpoint: Checkpoint
) -> None:
    planned = forecast.forecast_artifact(
        tiny_checkpoint.config, find_recipe(recipe), find_target(target), CONTEXT
    )
    estimate = planned.memory
    assert estimate.weights == planned.bytes > 0 and estimate.kv_cache > 0 and estimate.activations > 0
    assert estimate.peak_estimate == estimate.weights + estimate.kv_cache + estimate.activations
    longer = forecast.forecast_artifact(
        tiny_checkpoint.config, find_recipe(recipe), find_target(target), 2 * CONTEXT
    )
    assert longer.memory.kv_cache == 2 * estimate.kv_cache


def test_plan_prints_the_forecast_and_exports_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "plan.json"
    common = ["export", str(TINY), "--context", "128", "-t", "xnnpack", "-t", "coreml", "--plan"]
    assert main([*common, "-r", "int8", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "peak estimate" in printed and "peak memory bytes" in printed
    data = json.loads(out.read_text())
    assert data["schema"] == "edgellama.plan/1" and data["recipe"] == "int8"
    assert [row["target"] for row in data["artifacts"]] == ["xnnpack", "coreml"]
    assert set(data["artifacts"][0]["memory"]) == {"weights", "kv_cache", "activations", "peak_estimate"}
    needs = data["export"]
    assert set(needs) == {
        *("peak_memory_bytes", "disk_bytes", "seconds", "processor_seconds", "cores", "stages"),
    }
    assert 0 < needs["seconds"] <= needs["processor_seconds"] + 1
    assert "score" in needs["stages"] and "score" in printed
    assert main([*common, "-r", "int8", "--no-validate", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["export"]["peak_memory_bytes"] < data["export"]["peak_memory_bytes"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (1.02, "Export one target at a time"),
        (0.82, "--no-validate"),
        (0.1, "on a larger machine"),
    ],
)
def test_too_little_memory_names_the_option_that_fits(
    free: float, words: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """free: memory, relative to what the largest target or the export without the gate surely takes."""
    targets = [find_target(name) for name in ("xnnpack", "onnx")]
    plan = make_plan(tiny_checkpoint, find_recipe("int4-fast"), targets, CONTEXT)
    needs = {("xnnpack", "onnx"): 3.0, ("xnnpack",): 1.0, ("onnx",): 0.9}

    def needed(_: object, __: object, chosen: Sequence[Target], ___: int, *, validate: bool) -> object:
        gigabytes = needs[tuple(target.name for target in chosen)] if validate else 0.8
        return forecast.ExportForecast(int(gigabytes * 1e9 / forecast.TOLERANCE), 0)

    monkeypatch.setattr(forecast, "forecast_export", needed)
    monkeypatch.setattr(forecast, "available_memory", lambda: int(free * 1e9))
    with pytest.raises(ResourceError) as caught:
        forecast.check_resources(plan, tmp_path / "out", validate=True)
    assert words in (caught.value.remedy or "")


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_too_little_memory_or_disk_is_refused_before_the_slow_part(
    resource: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if resource == "memory":
        monkeypatch.setattr(forecast, "available_memory", lambda: 300_000_000)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1_000_000))

    def slow(*_: Any, **__: Any) -> None:
        pytest.fail("the slow part began")

    monkeypatch.setattr(pipeline, "run", slow)
    code = main(
        ["export", str(TINY), "-o", str(tmp_path / "out.edgellama"), "-r", "int8", "--context", "128"]
    )
    error = capsys.readouterr().err
    assert code == ResourceError.exit_code == 2
    assert ("0.3 GB are free" if resource == "memory" else "0.00 GB are free") in error
    assert list(tmp_path.iterdir()) == []


def test_the_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "groups" / "system" / "job"
    group.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  8000000 kB\nSwapFree: 1000000 kB\n")
    (tmp_path / "cgroup").write_text("0::/system/job\n")
    for name, path in (("_MEMINFO", "meminfo"), ("_CGROUP", "cgroup"), ("_GROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    assert memory.available_memory() == 9_000_000 * 1024
    for folder, limit in ((group, "max"), (group.parent, "2000000000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("1500000000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 400000000\n")
    assert memory.available_memory() == 900_000_000
    (tmp_path / "meminfo").unlink()
    (tmp_path / "cgroup").unlink()
    assert memory.available_memory() is None
