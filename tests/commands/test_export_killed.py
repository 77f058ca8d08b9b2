"""An export that ends before its time: the old bundle stays whole, and the next export removes what is left.

What a killed process leaves is what lies on the disk at that moment. So one export is looked at whenever it is about to
do something to a file: is the bundle in its place whole? And from moments drawn by lot the next export starts, on a copy.
(tests/fuzz/publish_faults.py kills processes for real, and lets single operations fail.)
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
from tests.helpers.tiny_models import write_hf

COPIES = 12
SEED = 20261124


@pytest.fixture
def old(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle in the place where an export is going to write."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "place" / "b.edgellama"))


@pytest.fixture
def model(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return write_hf(tiny_checkpoint.first_layers(1), tmp_path / "model")


def command(model: Path, output: Path, *more: str) -> list[str]:
    options = ["-r", "int4-fast", "--context", "64", "--no-validate", "--force"]
    return ["export", str(model), "-o", str(output), *options, *more]


class Watch:
    """Calls `look` before each operation on files below `folder`, until `stop`."""

    def __init__(self, folder: Path, look: Callable[[int], None]) -> None:
        self.folder, self.look = str(folder), look
        self.count, self.active = 0, True
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        place = args[0] if args else None
        path = os.fsdecode(place) if isinstance(place, (str, bytes, os.PathLike)) else ""
        if path.startswith(self.folder):
            self.active = False  # not while looking
            self.look(self.count)
            self.count += 1
            self.active = True


def test_at_every_moment_there_is_a_whole_bundle(
    old: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (old / MANIFEST).read_bytes()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    found: list[bytes] = []
    copies: list[Path] = []
    lot = random.Random(SEED)

    def look(number: int) -> None:
        assert Bundle.open(old).problems() == []
        found.append((old / MANIFEST).read_bytes())
        if lot.random() < 0.1:
            copies.append(Path(shutil.copytree(old.parent, tmp_path / f"copy{number}")))

    watch = Watch(old.parent, look)
    try:
        assert main(command(model, old, "-t", "xnnpack", "-t", "coreml")) == 0
    finally:
        watch.active = False
    after = (old / MANIFEST).read_bytes()
    assert Bundle.open(old).problems() == [] and set(found) == {before, after}
    assert found == sorted(found, key=lambda manifest: manifest == after)  # once, and not back
    assert watch.count > 200
    assert list(old.parent.iterdir()) == [old] and list(temporary.iterdir()) == []
    kept = [copy for copy in copies if work_directory(copy / old.name).exists()]
    assert len(kept) >= COPIES
    for copy in kept:
        with claimed(copy / old.name, force=True):
            assert {path.name for path in work_directory(copy / old.name).iterdir()} == {"lock", "tmp"}
        assert [path.name for path in copy.iterdir()] == [old.name]
        assert Bundle.open(copy / old.name).problems() == []


def test_killed_for_real(old: Path, model: Path, tmp_path: Path) -> None:
    before = (old / MANIFEST).read_bytes()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellama", *command(model, old)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(temporary)},
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
    assert (old / MANIFEST).read_bytes() == before and Bundle.open(old).problems() == []
    assert list(temporary.iterdir()) == []
    work = work_directory(old)
    assert sorted(old.parent.iterdir()) == [work, old]
    with claimed(old, force=True):
        assert {path.name for path in work.iterdir()} == {"lock", "tmp"}
    assert list(old.parent.iterdir()) == [old]


LIMITED = """
import resource, sys
from edgellama.commands import export_phases  # with all it needs to begin with
from edgellama.cli.dispatch import main
name, size = sys.argv[1], int(sys.argv[2])
if name == "RLIMIT_AS":
    with open("/proc/self/statm") as file:
        size += int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(getattr(resource, name), (size, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
@pytest.mark.parametrize(("limit", "size"), [("RLIMIT_AS", 30_000_000), ("RLIMIT_FSIZE", 200_000)])
def test_out_of_memory_or_of_space(limit: str, size: int, old: Path, model: Path, tmp_path: Path) -> None:
    """However the process ends, the old bundle is whole. Without memory, cleaning up may be left to the next export."""
    assert hasattr(resource, limit)
    before = (old / MANIFEST).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, limit, str(size), *command(model, old)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert (old / MANIFEST).read_bytes() == before and Bundle.open(old).problems() == []
    if limit == "RLIMIT_FSIZE":
        assert done.returncode == 2 and "File too large" in done.stderr
        assert list(old.parent.iterdir()) == [old]
    with claimed(old, force=True):
        pass
    assert list(old.parent.iterdir()) == [old]
