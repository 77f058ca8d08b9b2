"""Injects faults while a bundle is written and published: `python -m tests.fuzz.publish_faults FOLDER SEED`.

Forked children write a bundle with the code of every export. At each operation on the file system in turn, the child
is killed or the operation fails. Operations are Python's audit events, plus fsync and exchange, which have none.
A limit of the process truncates files at seeded sizes. After each child the remains are judged, and the next export
runs. Prints the counts as JSON. The first violation ends the run. torch is not imported, so that a fork is cheap.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgellama.bundle import Bundle, publish
from edgellama.bundle.bundle import write_manifest
from edgellama.bundle.publish import staged, work_directory
from edgellama.errors import EdgellamaError
from tests.helpers.small_bundle import REPORT, SECTIONS, write_small_bundle

Fault = Callable[[str], None]

DONE, FAILED = 0, 7  # exit codes of a child
LIMITED = 16  # number of seeded sizes at which files are truncated


@dataclass(frozen=True)
class Scene:
    """State before an export: with or without an old bundle, on a file system with or without exchange."""

    name: str
    old: bool
    exchanges: bool


SCENES = (
    Scene("first export", old=False, exchanges=True),
    Scene("replaced", old=True, exchanges=True),
    Scene("replaced by two renames", old=True, exchanges=False),
)


def killed(operation: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(operation: str) -> None:
    raise OSError(28, "No space left on device", operation)


def read_only(operation: str) -> None:
    raise OSError(30, "Read-only file system", operation)


def interrupted(operation: str) -> None:
    raise KeyboardInterrupt


FAULTS: tuple[Fault, ...] = (killed, no_space, read_only, interrupted)


class Operations:
    """Counts operations on files below `folder` and applies `fault` to the one with number `at`."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.count, self.at = 0, -1
        self.fault: Fault = killed
        self.armed = False
        sys.addaudithook(self._audit)
        self.cleaning: list[int] = []  # number of the first operation of each cleaning
        self._fsync, self._exchange, self._clean = os.fsync, publish.exchange, publish._clean
        os.fsync = self.fsync  # type: ignore[assignment]
        publish.exchange = self.exchange
        publish._clean = self.clean
        self.exchanges = True

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed or not (event == "open" or event.startswith("os.")):
            return
        place = args[0] if args else None
        path = os.fsdecode(place) if isinstance(place, (str, bytes, os.PathLike)) else "a descriptor"
        if path.startswith(self.folder) or not os.path.isabs(path):  # other paths are imports of modules
            self.count_and_fail(f"{event} {path}")

    def fsync(self, descriptor: int) -> None:
        self.count_and_fail("fsync")
        self._fsync(descriptor)

    def exchange(self, one: Path, other: Path) -> bool:
        self.count_and_fail("exchange")
        return self.exchanges and self._exchange(one, other)

    def clean(self, work: Path, destination: Path) -> None:
        self.cleaning.append(self.count)
        self._clean(work, destination)

    def count_and_fail(self, operation: str) -> None:
        """Counts an operation, and raises or kills if its fault is due."""
        if not self.armed:
            return
        number, self.count = self.count, self.count + 1
        if number == self.at:
            self.fault(operation)


def write(folder: Path, mark: str) -> None:
    """Writes the files of one export to folder/b."""
    with staged(folder / "b", force=True) as directory:
        write_small_bundle(directory)
        (directory / REPORT).write_text(json.dumps({"mark": mark}), encoding="utf-8")
        write_manifest(directory, SECTIONS)


def in_child(work: Callable[[], None]) -> int:
    """Exit code of a forked child that does the work, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except (OSError, EdgellamaError, KeyboardInterrupt):
            _leave(FAILED)
        except BaseException:  # noqa: BLE001 (the child must end here)
            traceback.print_exc()
            _leave(1)
        _leave(DONE)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _leave(code: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)


def mark_of(path: Path) -> str | None:
    """Mark of the bundle at `path`, or None without one. Raises for an incomplete bundle."""
    if not os.path.lexists(path):
        return None
    bundle = Bundle.open(path)
    problems = bundle.problems()
    assert not problems, problems
    return str(json.loads((path / REPORT).read_text(encoding="utf-8"))["mark"])


def judge(folder: Path, scene: Scene, code: int, *, tidy: bool) -> str:
    """Asserts that no bundle is lost or incomplete, and names the remaining one.

    With `tidy`, no other file may remain.
    """
    destination = folder / "b"
    work = work_directory(destination)
    assert {path.name for path in folder.iterdir()} <= {"b", work.name}, sorted(folder.rglob("*"))
    mark = mark_of(destination)
    if mark is None and scene.old:
        assert not scene.exchanges and code == -signal.SIGKILL, "the old bundle is gone"
        assert mark_of(work / "old") == "old"
        mark = "old, aside"
    assert mark in (("old", "old, aside") if scene.old else (None,)) or mark == "new", mark
    assert code != DONE or mark == "new", "success, and the new bundle is not there"
    assert not (tidy and work.exists()), sorted(folder.rglob("*"))
    return mark or "none"


def prepare(folder: Path, scene: Scene) -> None:
    """Makes an empty folder, with an old bundle if the scene has one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if scene.old:
        write(folder, "old")


def next_export(folder: Path, scene: Scene) -> None:
    """Asserts that the next export succeeds and leaves only its bundle."""
    assert in_child(lambda: write(folder, "next")) == DONE
    assert mark_of(folder / "b") == "next" and [path.name for path in folder.iterdir()] == ["b"]


def run(folder: Path, seed: int) -> dict[str, Any]:
    """Injects all faults into all scenes. Returns the number of runs, and counts of the remains by fault."""
    operations = Operations(folder)
    counts: Counter[str] = Counter()
    points = 0
    random_numbers = random.Random(seed)
    for scene in SCENES:
        operations.exchanges = scene.exchanges
        prepare(folder, scene)
        operations.count, operations.at, operations.armed, operations.cleaning = 0, -1, True, []
        write(folder, "new")
        operations.armed = False
        _, cleaning = operations.cleaning
        cases: list[tuple[int, Fault]] = list(itertools.product(range(operations.count), FAULTS))
        random_numbers.shuffle(cases)
        for at, fault in cases:
            if fault is not killed and random_numbers.random() < 0.8:
                continue
            prepare(folder, scene)

            def faulty(at: int = at, fault: Fault = fault) -> None:
                operations.count, operations.at, operations.fault, operations.armed = 0, at, fault, True
                write(folder, "new")

            code = in_child(faulty)
            assert code in (DONE, FAILED, -signal.SIGKILL), code
            # A fault during cleaning leaves files for the next export. An earlier fault is cleaned up.
            left = judge(folder, scene, code, tidy=fault is not killed and at < cleaning)
            next_export(folder, scene)
            points += 1
            counts[f"{scene.name}, {fault.__name__}: {left}"] += 1
        for _ in range(LIMITED):
            prepare(folder, scene)
            size = random_numbers.randrange(20_000)

            def limited(size: int = size) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                write(folder, "new")

            code = in_child(limited)
            left = judge(folder, scene, code, tidy=True)
            next_export(folder, scene)
            points += 1
            counts[f"{scene.name}, file size limited: {left}"] += 1
    return {"points": points, "left": dict(sorted(counts.items()))}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]) / "place", int(sys.argv[2])), indent=2))
