"""Isolation of a verb in a child process, so that a crash of a native library does not crash the command.

ExecuTorch, ONNX Runtime, llama.cpp and coremltools read files that may be untrusted, and none of them is
safe against hostile files. The child is forked before anything heavy is imported. The fork takes a
millisecond. The child has the same terminal, options and environment.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from edgellama.errors import InputError
from edgellama.host.log_filters import SILENT

_FORWARDED = (signal.SIGTERM, signal.SIGHUP)
_AT_ONCE = 0.1  # seconds within which a Ctrl-C at a terminal reaches the child as well


def run_contained(verb: Callable[[], int]) -> int:
    """Runs `verb` in a child process and returns its exit code.

    Raises InputError if a signal ended the child. On a system without `fork`, the verb runs in this process.
    """
    if not hasattr(os, "fork"):
        return verb()
    sys.stdout.flush()
    sys.stderr.flush()
    (alive, parent), (heard, hearing) = os.pipe(), os.pipe()
    os.set_blocking(hearing, False)
    child = os.fork()
    if child == 0:
        os.close(parent)
        os.close(heard)
        signal.set_wakeup_fd(hearing, warn_on_full_buffer=False)
        _end_with_parent(alive)
        _child(verb)
    os.close(alive)
    os.close(hearing)
    status = _wait(child, heard)
    os.close(parent)
    os.close(heard)
    if os.WIFSIGNALED(status):
        raise _ended_by(os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


def _child(verb: Callable[[], int]) -> Any:
    """Runs `verb` and exits. Never returns."""
    code = 70  # exit code for a defect of edgellama, whose traceback is printed
    try:
        code = verb()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 (the outer frames belong to the parent)
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _end_with_parent(alive: int) -> None:
    """Ends the child when the other end of the pipe is closed, because the parent was killed."""

    def watch() -> None:
        os.read(alive, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name=SILENT).start()


def _wait(child: int, heard: int) -> int:
    """Waits for the child and returns its status. Forwards signals that would end this process.

    A terminal sends Ctrl-C to both processes; a program that knows only this process's number sends it to
    this one. The child writes a byte to `heard` for every signal it receives, so that none reaches it twice.
    """

    def forward(number: int, _: Any) -> None:
        os.kill(child, number)

    def interrupt(number: int, _: Any) -> None:
        if not select.select([heard], [], [], _AT_ONCE)[0]:
            os.kill(child, number)
            select.select([heard], [], [], _AT_ONCE)
        if select.select([heard], [], [], 0)[0]:
            os.read(heard, 4096)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        return os.waitpid(child, 0)[1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended_by(number: int) -> InputError:
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return InputError(
            f"the process that read the files was killed ({name}), probably for want of memory",
            remedy="Free memory, or look at the file on a larger machine; a hostile file may ask for any amount.",
        )
    if number in _FORWARDED:
        return InputError(f"ended by {name}", remedy="Run it again.")
    return InputError(
        f"the library that read the files crashed ({name})",
        remedy="Files that edgellama wrote do not do this: they are damaged, hostile, or of another version. Export again, "
        "or take them again from where they come.",
    )
