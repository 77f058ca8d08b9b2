"""Shared fixtures: the trained tiny model, one bundle of it, and its cuts. Each is lowered once a session."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import onnxruntime themselves
# One thread of torch a worker, here and in processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands.export import export
from edgellama.errors import MissingDependencyError
from edgellama.host import cache
from edgellama.recipe import RECIPES
from tests.helpers import android_tools
from tests.helpers.android_build import App, Core, build_app, build_core
from tests.helpers.demo import Demo
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import CONTEXT, Cut, lower

# Files that use `demo` or `android_core` share a worker: each of these fixtures takes minutes and is made once.
FILES_OF_ONE_WORKER = {
    "tests/apps/test_android.py",
    "tests/apps/test_android_end_to_end.py",
    "tests/export/test_forecast.py",
    "tests/product/test_smollm2.py",
}


# `edgellama`, and at the end the largest resident memory of its processes in bytes.
MEASURED = """
import resource, sys
from edgellama.cli.dispatch import main
code = main(sys.argv[1:])
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(peak * 1024)
sys.exit(code)
"""


class _FixturesOnce(LoadFileScheduling):  # type: ignore[misc]
    """A file is one worker's, as with --dist=loadfile. Files of the same costly fixtures are one worker's too."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "one worker" if file in FILES_OF_ONE_WORKER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _FixturesOnce(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_cache() -> Iterator[None]:
    """Turns the calibration cache off, so that no test reads an earlier run. Tests of the cache set their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, cache.OFF)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Restores Ctrl-C where the shell ignores it, as for background jobs. Interrupted test processes inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    return open_checkpoint(TINY)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model at int4-fast, exported and validated. Read-only: a test that alters it copies it first."""
    output = tmp_path_factory.mktemp("bundle") / "tiny.edgellama"
    return export(tiny_checkpoint, output, recipe="int4-fast", context=CONTEXT)


@pytest.fixture(scope="session")
def cut(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Cut]:
    """`cut(layers, recipe)`: the first layers of the tiny model, quantized and lowered. The model must not be altered."""
    directory: Path = tmp_path_factory.mktemp("cuts")
    cuts: dict[tuple[int, str], Cut] = {}

    def lowered_once(layers: int, recipe: str) -> Cut:
        if (layers, recipe) not in cuts:
            path = directory / f"{layers}-{recipe}.pte"
            cuts[layers, recipe] = lower(tiny_checkpoint.first_layers(layers), RECIPES[recipe], path)
        return cuts[layers, recipe]

    return lowered_once


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct."""
    from edgellama.cli.demo import demo_checkpoint

    try:
        return demo_checkpoint()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demo(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`edgellama demo`, run once as a command, with the fastest recipe. Its bundle is read-only."""
    path = tmp_path_factory.mktemp("demo") / "smollm2.edgellama"
    command = [sys.executable, "-c", MEASURED, "demo", "-r", "int4-fast", "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    output, _, peak = done.stdout.rstrip("\n").rpartition("\n")
    return Demo(Bundle.open(path), output, int(peak))


@pytest.fixture(scope="session")
def android_core(tmp_path_factory: pytest.TempPathFactory) -> Core:
    """The Kotlin core and its tests, compiled. Without the tools it fails on CI and is skipped elsewhere."""
    missing = android_tools.missing()
    if missing:
        reason = f"no {', '.join(missing)}: python -m tests.helpers.android_tools fetches what android_demo is built with"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return build_core(tmp_path_factory.mktemp("android-core"))


@pytest.fixture(scope="session")
def android_app(android_core: Core, tmp_path_factory: pytest.TempPathFactory) -> App:
    return build_app(tmp_path_factory.mktemp("android-app"), android_core)
