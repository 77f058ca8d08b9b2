"""Tests of isolation: a crash of a native library ends a child process, and the command exits with code 2."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.cli.dispatch import VERBS
from edgellama.cli.isolation import run_contained
from edgellama.errors import InputError

PROGRAM = [sys.executable, "-m", "edgellama"]


@pytest.mark.parametrize("verb", ["validate", "run"])
@pytest.mark.slow
def test_a_file_that_crashes_executorch(verb: str, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The loader of ExecuTorch 1.4.0 logs the file's identifier and aborts if that is not UTF-8."""
    path = tmp_path / "hostile.edgellama"
    shutil.copytree(tiny_bundle.path, path)
    artifact = path / "xnnpack" / "model.pte"
    data = bytearray(artifact.read_bytes())
    data[4:8] = b"\xff" * 4
    artifact.write_bytes(data)
    write_manifest(path, json.loads((path / MANIFEST).read_text()))
    done = subprocess.run(
        [*PROGRAM, verb, str(path), *(["-p", "Hi"] if verb == "run" else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "edgellama: error: the library that read the files crashed (SIGABRT)" in done.stderr
    assert "Export again" in done.stderr


def test_verbs_that_read_untrusted_files_are_contained() -> None:
    assert {name for name, verb in VERBS.items() if verb.contained} >= {"inspect", "validate", "run"}


def script(code: str) -> list[str]:
    imports = "import os, signal, sys, time\nfrom edgellama.cli.isolation import run_contained\n"
    return [sys.executable, "-c", imports + code]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE"])
def test_every_deadly_signal_is_one_error(name: str) -> None:
    def crash() -> int:
        faulthandler.disable()  # the handler of pytest would print every stack
        os.kill(os.getpid(), getattr(signal, name))
        return 0

    with pytest.raises(InputError, match=rf"crashed \({name}\)") as caught:
        run_contained(crash)
    assert caught.value.exit_code == 2


def test_a_kill_by_the_system_is_reported_as_want_of_memory() -> None:
    def killed() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(InputError, match="want of memory"):
        run_contained(killed)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_the_exit_code_is_passed_on(code: int) -> None:
    assert run_contained(lambda: code) == code


def test_the_child_uses_the_standard_streams_of_the_command() -> None:
    code = "sys.exit(run_contained(lambda: print('heard', sys.stdin.readline().strip()) or 3))"
    done = subprocess.run(script(code), input="this\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "heard this\n")


WAITING = "def wait():\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n    return 0\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(number: int) -> None:
    process = subprocess.Popen(script(WAITING + "run_contained(wait)"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    os.kill(process.pid, number)
    assert process.stdout.read() == "", "the pipe is closed when both have ended"
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


COUNTING = """
def verb():
    count = 0
    while count < 2:
        try:
            print(count, flush=True)
            time.sleep(60 if count == 0 else 1)
            return 100 + count
        except KeyboardInterrupt:
            count += 1
    return 100 + count
sys.exit(run_contained(verb))
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the command", "as a terminal, to both"])
def test_one_ctrl_c_reaches_the_child_once(send: Callable[[int, int], None]) -> None:
    process = subprocess.Popen(script(COUNTING), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    send(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (101, "1\n")


def test_the_child_handles_ctrl_c() -> None:
    code = (
        WAITING
        + "def verb():\n    try:\n        return wait()\n    except KeyboardInterrupt:\n        return 130\n"
        "sys.exit(run_contained(verb))"
    )
    process = subprocess.Popen(
        script(code), stdout=subprocess.PIPE, text=True, start_new_session=True, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "")
