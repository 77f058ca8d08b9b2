"""Tests of killed exports: the old bundle stays sound, and the next export removes the leftovers.

A killed process leaves the files of that moment. So one export is observed before each operation on a file: the
bundle in its place must be sound. From random moments a copy is taken, on which the next export starts.
The module tests/fuzz/publish_faults.py kills real processes and lets single operations fail.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST
from edgellama.bundle.publish import claimed, work_directory
from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import write_hf

pytestmark = pytest.mark.slow

COPIES = 12  # least number of copies with leftovers
SEED = 20261124


@pytest.fixture
def old_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle at the destination of the export."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "place" / "b.edgellama"))


@pytest.fixture
def model(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return write_hf(tiny_checkpoint.first_layers(1), tmp_path / "model")


def export_command(model: Path, output: Path, *more: str) -> list[str]:
    options = ["-r", "int4-fast", "--context", "64", "--no-validate", "--force"]
    return ["export", str(model), "-o", str(output), *options, *more]


class Observer:
    """Calls `observe` before each operation on files below `folder`, until `active` is False."""

    def __init__(self, folder: Path, observe: Callable[[int], None]) -> None:
        self.folder, self.observe = str(folder), observe
        self.count, self.active = 0, True
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        place = args[0] if args else None
        path = os.fsdecode(place) if isinstance(place, (str, bytes, os.PathLike)) else ""
        if path.startswith(self.folder):
            self.active = False  # ignores operations of `observe` itself
            self.observe(self.count)
            self.count += 1
            self.active = True


def test_the_bundle_is_sound_at_every_moment(
    old_bundle: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (old_bundle / MANIFEST).read_bytes()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    manifests: list[bytes] = []
    copies: list[Path] = []
    random_numbers = random.Random(SEED)

    def observe(number: int) -> None:
        assert Bundle.open(old_bundle).problems() == []
        manifests.append((old_bundle / MANIFEST).read_bytes())
        if random_numbers.random() < 0.1:
            copies.append(Path(shutil.copytree(old_bundle.parent, tmp_path / f"copy{number}")))

    observer = Observer(old_bundle.parent, observe)
    try:
        assert main(export_command(model, old_bundle, "-t", "xnnpack", "-t", "coreml")) == 0
    finally:
        observer.active = False
    after = (old_bundle / MANIFEST).read_bytes()
    assert Bundle.open(old_bundle).problems() == [] and set(manifests) == {before, after}
    assert manifests == sorted(manifests, key=lambda manifest: manifest == after)  # replaced exactly once
    assert observer.count > 200
    assert list(old_bundle.parent.iterdir()) == [old_bundle] and list(temporary.iterdir()) == []
    copies_with_leftovers = [copy for copy in copies if work_directory(copy / old_bundle.name).exists()]
    assert len(copies_with_leftovers) >= COPIES
    for copy in copies_with_leftovers:
        with claimed(copy / old_bundle.name, force=True):
            assert {path.name for path in work_directory(copy / old_bundle.name).iterdir()} == {"lock", "tmp"}
        assert [path.name for path in copy.iterdir()] == [old_bundle.name]
        assert Bundle.open(copy / old_bundle.name).problems() == []


def test_a_killed_process_leaves_the_old_bundle(old_bundle: Path, model: Path, tmp_path: Path) -> None:
    before = (old_bundle / MANIFEST).read_bytes()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellama", *export_command(model, old_bundle)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("lower …"):
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    assert (old_bundle / MANIFEST).read_bytes() == before and Bundle.open(old_bundle).problems() == []
    assert list(temporary.iterdir()) == []
    work = work_directory(old_bundle)
    assert sorted(old_bundle.parent.iterdir()) == [work, old_bundle]
    with claimed(old_bundle, force=True):
        assert {path.name for path in work.iterdir()} == {"lock", "tmp"}
    assert list(old_bundle.parent.iterdir()) == [old_bundle]


LIMITED = """
import resource, sys
from edgellama.commands import export_phases  # imports the libraries before the limit is set
from edgellama.cli.dispatch import main
name, size = sys.argv[1], int(sys.argv[2])
if name == "RLIMIT_AS":
    with open("/proc/self/statm") as file:
        size += int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(getattr(resource, name), (size, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind exist on Linux only")
@pytest.mark.parametrize(("limit", "size"), [("RLIMIT_AS", 30_000_000), ("RLIMIT_FSIZE", 200_000)])
def test_out_of_memory_or_disk_space(
    limit: str, size: int, old_bundle: Path, model: Path, tmp_path: Path
) -> None:
    """The old bundle stays sound. Without memory, the next export may have to clean up."""
    assert hasattr(resource, limit)
    before = (old_bundle / MANIFEST).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, limit, str(size), *export_command(model, old_bundle)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert (old_bundle / MANIFEST).read_bytes() == before and Bundle.open(old_bundle).problems() == []
    if limit == "RLIMIT_FSIZE":
        assert done.returncode == 2 and "File too large" in done.stderr
        assert list(old_bundle.parent.iterdir()) == [old_bundle]
    with claimed(old_bundle, force=True):
        pass
    assert list(old_bundle.parent.iterdir()) == [old_bundle]
