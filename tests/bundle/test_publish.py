"""Tests of publishing: a bundle appears complete or not at all, despite faults and concurrent exports."""

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
from tests.helpers.paths import ROOT, TINY
from tests.helpers.small_bundle import write_small_bundle


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if possible, because thousands of fsyncs are slow on a disk."""
    shared_memory = Path("/dev/shm")
    if not (shared_memory.is_dir() and os.access(shared_memory, os.W_OK)):
        yield tmp_path
        return
    folder = shared_memory / f"edgellama-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_faults_at_every_operation(memory_folder: Path) -> None:
    """Process killed or interrupted, disk full or read-only, files truncated.

    tests/fuzz/publish_faults.py injects and judges the faults.
    """
    done = python("-m", "tests.fuzz.publish_faults", str(memory_folder), "20261124")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["points"] >= 300
    kinds = {name.rpartition(":")[0] for name in counts["left"]}
    assert len(kinds) == 3 * 5  # scenes by faults
    assert {"replaced, killed: old", "replaced, killed: new"} <= set(counts["left"])
    assert "replaced by two renames, killed: old, aside" in counts["left"]


@contextmanager
def small_disk(mount_point: Path, size: int) -> Iterator[None]:
    """Mounts a file system of `size` bytes. Skips the test without the right to mount."""
    mount_point.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount_point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Real file systems: too small for a bundle, too small for a second one, or large enough."""
    numbers = random.Random(9)
    sizes = [numbers.randrange(20 << 10, 90 << 10) for _ in range(12)]
    failed = 0
    for size in sizes:
        with small_disk(tmp_path / "disk", size):
            place = tmp_path / "disk" / "b"
            try:
                with staged(place, force=False) as directory:
                    write_small_bundle(directory)
            except OSError:
                failed += 1
                assert list((tmp_path / "disk").iterdir()) == []
                continue
            before = (place / MANIFEST).read_bytes()
            try:
                with staged(place, force=True) as directory:
                    write_small_bundle(directory)
                    (directory / "mark").touch()
                assert (place / "mark").exists()
            except OSError:
                failed += 1
                assert (place / MANIFEST).read_bytes() == before and Bundle.open(place).problems() == []
            assert list((tmp_path / "disk").iterdir()) == [place]
    assert 3 < failed < len(sizes)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The folder is refused before any work. Even root cannot write below /proc."""
    with pytest.raises(OSError), staged(Path("/proc/new.edgellama"), force=False):
        pytest.fail("work began")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError), staged(tmp_path / "new", force=False):
            pytest.fail("work began")


@pytest.mark.slow
def test_a_second_export_to_one_place_is_refused(tmp_path: Path) -> None:
    """The second export ends at once with exit code 2. Another place is free, and later the same place is."""
    place = tmp_path / "b.edgellama"
    export = ["-m", "edgellama", "export", str(TINY), "-o", str(place)]
    with staged(place, force=False) as directory:
        write_small_bundle(directory)
        done = python(*export)
        assert done.returncode == 2
        assert done.stderr.startswith(f"edgellama: error: another export is writing to {place}\n")
        assert "Wait for it to end, or choose another name" in done.stderr
        with pytest.raises(UsageError, match="another export"), staged(place, force=True):
            pytest.fail("work began")
        with staged(tmp_path / "c.edgellama", force=False) as other_directory:
            write_small_bundle(other_directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.edgellama", "c.edgellama"]
    with staged(place, force=True) as directory:
        write_small_bundle(directory)
    assert Bundle.open(place).problems() == []


WRITER = """
import sys
from pathlib import Path
from edgellama.errors import UsageError
from edgellama.bundle.publish import staged
from tests.helpers.small_bundle import write_small_bundle
wins = 0
for _ in range(40):
    try:
        with staged(Path(sys.argv[1]), force=True) as directory:
            write_small_bundle(directory)
        wins += 1
    except UsageError as error:
        assert "another export" in error.message, error
print(wins)
"""


def test_many_exports_to_one_place(memory_folder: Path) -> None:
    """Each export succeeds or is refused, in any order of lock operations, and the bundle stays sound."""
    place = memory_folder / "b"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(place)]
    writers = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    wins = [int(writer.communicate()[0]) for writer in writers]
    assert all(writer.returncode == 0 for writer in writers) and sum(wins) >= 1
    assert Bundle.open(place).problems() == [] and list(memory_folder.iterdir()) == [place]


def test_two_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "nowhere")


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    place = tmp_path / "b"
    work = work_directory(place)
    (work / "new" / "xnnpack").mkdir(parents=True)
    (work / "new" / "xnnpack" / "model.pte").write_bytes(b"half")
    (work / "lock").touch()
    with staged(place, force=False) as directory:
        assert list(directory.iterdir()) == []
        write_small_bundle(directory)
    assert list(tmp_path.iterdir()) == [place]


def test_a_bundle_that_was_put_aside_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed between the two renames leaves the old bundle aside. The next export needs --force again."""
    place = tmp_path / "b"
    old = work_directory(place) / "old"
    old.mkdir(parents=True)
    write_small_bundle(old)
    with pytest.raises(UsageError, match="b exists"), staged(place, force=False):
        pytest.fail("work began")
    assert Bundle.open(place).problems() == [] and list(tmp_path.iterdir()) == [place]
    monkeypatch.setattr(publish, "exchange", lambda source, target: False)
    with staged(place, force=True) as directory:
        write_small_bundle(directory)
        (directory / "mark").touch()
    assert (place / "mark").exists() and list(tmp_path.iterdir()) == [place]


def test_a_link_in_place_of_the_work_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    work_directory(tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a symbolic link"), staged(tmp_path / "b", force=False):
        pytest.fail("work began")
    assert list((tmp_path / "elsewhere").iterdir()) == []
