"""What all tests share: the trained tiny model, one bundle of it, and its cuts, each lowered once a session."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.commands.export import export
from edgellama.errors import MissingDependencyError
from edgellama.export.quantization import calibration_cache
from edgellama.recipe import RECIPES
from tests.helpers import android_tools
from tests.helpers.android_build import App, Core, build_app, build_core
from tests.helpers.tiny_models import CONTEXT, TINY, Cut, lower

# Fixtures that take minutes are made once: the files that use `demo` or `android_core` share a worker.
SLOW_FILES = {
    "tests/apps/test_android.py",
    "tests/apps/test_android_end_to_end.py",
    "tests/export/test_forecast.py",
    "tests/product/test_smollm2.py",
}


class _SlowFilesTogether(LoadFileScheduling):  # type: ignore[misc]
    """A file is one worker's, as --dist=loadfile has it, and all slow files are the same one's."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "slow files" if file in SLOW_FILES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _SlowFilesTogether(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_cache() -> Iterator[None]:
    """No test finds what an earlier run calibrated; those about the cache have one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(calibration_cache.VARIABLE, calibration_cache.OFF)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Where Ctrl-C is ignored (a job in a script's background), the processes that tests interrupt would ignore it too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    return open_checkpoint(TINY)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The whole tiny model at int4-fast, exported and validated. Read-only: a test that alters it copies it first."""
    output = tmp_path_factory.mktemp("bundle") / "tiny.edgellama"
    return export(tiny_checkpoint, output, recipe="int4-fast", context=CONTEXT)


@pytest.fixture(scope="session")
def cut(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Cut]:
    """`cut(layers, recipe)`: the first layers of the tiny model, quantized and lowered. The model must not be altered."""
    directory: Path = tmp_path_factory.mktemp("cuts")
    made: dict[tuple[int, str], Cut] = {}

    def make(layers: int, recipe: str) -> Cut:
        if (layers, recipe) not in made:
            path = directory / f"{layers}-{recipe}.pte"
            made[layers, recipe] = lower(tiny_checkpoint.first_layers(layers), RECIPES[recipe], path)
        return made[layers, recipe]

    return make


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct."""
    from edgellama.cli.demo import demo_checkpoint

    try:
        return demo_checkpoint()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Demo:
    bundle: Bundle
    output: str


@pytest.fixture(scope="session")
def demo(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`edgellama demo`, run once as a command, with the recipe that takes least time. Its bundle is read-only."""
    path = tmp_path_factory.mktemp("demo") / "smollm2.edgellama"
    done = subprocess.run(
        [sys.executable, "-m", "edgellama", "demo", "-r", "int4-fast", "-o", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(Bundle.open(path), done.stdout)


@pytest.fixture(scope="session")
def android_core(tmp_path_factory: pytest.TempPathFactory) -> Core:
    """The Kotlin core and its tests, compiled. Skipped without the tools, unless this is CI, which has to have them."""
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
