"""A bundle comes to its place whole, or not at all; whatever happens on the way, and whoever else is at it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgellama.bundle import Bundle, publish
from edgellama.bundle.bundle import MANIFEST
from edgellama.bundle.publish import exchange, staged, work_directory
from edgellama.errors import UsageError
from tests.bundle.test_bundle import fill

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place: thousands of fsyncs would wait for a disk."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    place = memory / f"edgellama-{os.getpid()}-{tmp_path.name}"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


def test_faults_at_every_operation(folder: Path) -> None:
    """Killed, a full disk, a disk gone read-only, interrupted, files cut off: see tests/fuzz/publish_faults.py, which
    judges each of them."""
    done = python("-m", "tests.fuzz.publish_faults", str(folder), "20261124")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["points"] >= 300
    kinds = {name.rpartition(":")[0] for name in found["left"]}
    assert len(kinds) == 3 * 5  # scenes by faults
    assert {"replaced, killed: old", "replaced, killed: new"} <= set(found["left"])
    assert "replaced by two renames, killed: old, aside" in found["left"]


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one: too small for a bundle, for a second one beside it, or large enough."""
    numbers = random.Random(9)
    sizes = [numbers.randrange(20 << 10, 90 << 10) for _ in range(12)]
    failed = 0
    for size in sizes:
        with small_disk(tmp_path / "disk", size):
            place = tmp_path / "disk" / "b"
            try:
                with staged(place, force=False) as directory:
                    fill(directory)
            except OSError:
                failed += 1
                assert list((tmp_path / "disk").iterdir()) == []
                continue
            before = (place / MANIFEST).read_bytes()
            try:
                with staged(place, force=True) as directory:
                    fill(directory)
                    (directory / "mark").touch()
                assert (place / "mark").exists()
            except OSError:
                failed += 1
                assert (place / MANIFEST).read_bytes() == before and Bundle.open(place).problems() == []
            assert list((tmp_path / "disk").iterdir()) == [place]
    assert 3 < failed < len(sizes)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Refused before any work. Not even root writes below /proc."""
    with pytest.raises(OSError), staged(Path("/proc/new.edgellama"), force=False):
        pytest.fail("work began")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError), staged(tmp_path / "new", force=False):
            pytest.fail("work began")


def test_of_two_exports_to_one_place_one_wins(tmp_path: Path) -> None:
    """The other says so at once, with exit code 2; and can have another place, or this one afterwards."""
    place = tmp_path / "b.edgellama"
    export = ["-m", "edgellama", "export", str(ROOT / "tests/tiny_llama/model"), "-o", str(place)]
    with staged(place, force=False) as directory:
        fill(directory)
        done = python(*export)
        assert done.returncode == 2
        assert done.stderr.startswith(f"edgellama: error: another export is writing to {place}\n")
        assert "Wait for it to end, or choose another name" in done.stderr
        with pytest.raises(UsageError, match="another export"), staged(place, force=True):
            pytest.fail("work began")
        with staged(tmp_path / "c.edgellama", force=False) as other:
            fill(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.edgellama", "c.edgellama"]
    with staged(place, force=True) as directory:
        fill(directory)
    assert Bundle.open(place).problems() == []


WRITER = """
import sys
from pathlib import Path
from edgellama.errors import UsageError
from edgellama.bundle.publish import staged
from tests.bundle.test_bundle import fill
wins = 0
for _ in range(40):
    try:
        with staged(Path(sys.argv[1]), force=True) as directory:
            fill(directory)
        wins += 1
    except UsageError as error:
        assert "another export" in error.message, error
print(wins)
"""


def test_many_exports_to_one_place(folder: Path) -> None:
    """Whatever the order in which locks are made, taken and removed: each wins or is told, and all is whole."""
    place = folder / "b"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(place)]
    writers = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    wins = [int(writer.communicate()[0]) for writer in writers]
    assert all(writer.returncode == 0 for writer in writers) and sum(wins) >= 1
    assert Bundle.open(place).problems() == [] and list(folder.iterdir()) == [place]


def test_two_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "nowhere")


def test_what_an_export_that_was_killed_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "b"
    work = work_directory(place)
    (work / "new" / "xnnpack").mkdir(parents=True)
    (work / "new" / "xnnpack" / "model.pte").write_bytes(b"half")
    (work / "lock").touch()
    with staged(place, force=False) as directory:
        assert list(directory.iterdir()) == []
        fill(directory)
    assert list(tmp_path.iterdir()) == [place]


def test_a_bundle_that_was_put_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an exchange, a process killed between the two renames leaves it so; the next one wants --force again."""
    place = tmp_path / "b"
    old = work_directory(place) / "old"
    old.mkdir(parents=True)
    fill(old)
    with pytest.raises(UsageError, match="b exists"), staged(place, force=False):
        pytest.fail("work began")
    assert Bundle.open(place).problems() == [] and list(tmp_path.iterdir()) == [place]
    monkeypatch.setattr(publish, "exchange", lambda one, other: False)
    with staged(place, force=True) as directory:
        fill(directory)
        (directory / "mark").touch()
    assert (place / "mark").exists() and list(tmp_path.iterdir()) == [place]


def test_a_link_in_place_of_the_work_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    work_directory(tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a symbolic link"), staged(tmp_path / "b", force=False):
        pytest.fail("work began")
    assert list((tmp_path / "elsewhere").iterdir()) == []
