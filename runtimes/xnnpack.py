"""Runtime `executorch-xnnpack`: a .pte in ExecuTorch through its Python bindings, as an app runs it."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
from torch import Tensor

from edgellama.errors import BundleError, UsageError
from edgellama.host.log_filters import SILENT_THREADS
from edgellama.host.threads import one_thread
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.parts import LONGEST, States

_CONSTANTS = ("get_vocab_size", "get_max_context_len", "get_max_seq_len")


class PteRuntime(Runtime):
    """Runs the `forward` method of the .pte at `path`, loaded from disk."""

    name = "executorch-xnnpack"
    can_rewind = True
    load_options: ClassVar[Mapping[str, Any]] = {}  # of `load_program`

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if not path.is_file():
            raise BundleError(f"{path}: no such file", remedy="Check the path, or export again.")
        with _streams(), native_output_captured() as output:
            # Imported here, so that the libraries' own messages are captured.
            from edgellama.host import executorch_libraries as executorch

            runtime = executorch.runtime()
            if threads is not None and threads != executorch.threads():
                _resize_pool(threads)
            try:
                self._program: Any = runtime.load_program(path, **self.load_options)
                metadata = {name: self._constant(name) for name in _CONSTANTS}
                self._method: Any = self._program.load_method("forward")
                self._output_size = int(self._method.metadata.output_tensor_meta(0).sizes()[-1])
            except (RuntimeError, KeyError) as error:
                raise BundleError(
                    f"{path}: ExecuTorch cannot load it ({_reason(error, output)})",
                    remedy="Export again with this version of edgellama; `edgellama inspect` shows the file's requirements.",
                ) from error
        _loaded.add(self)
        self.path = path
        self.vocab_size, self.context_length, self._longest = (metadata[name] for name in _CONSTANTS)

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute([])[0])

    @property
    def threads(self) -> int:
        from edgellama.host import executorch_libraries

        return executorch_libraries.threads()

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        """Feeds a prompt that is longer than the method's longest call in pieces, as ExecuTorch's runner does."""
        for start in range(0, len(tokens), self._longest):
            outputs = self._execute(tokens[start : start + self._longest], position + start)
        logits: Logits = outputs[0][0].numpy()
        return logits

    def _execute(self, tokens: Sequence[int], position: int) -> list[Tensor]:
        """Outputs of the method, in order."""
        inputs = (
            torch.tensor([list(tokens)], dtype=torch.int64),
            torch.tensor([position], dtype=torch.int64),
        )
        with one_thread(), _streams():
            try:
                outputs: list[Tensor] = self._method.execute(inputs)
            except RuntimeError as error:
                raise BundleError(
                    f"{self.path}: ExecuTorch failed while running it ({error})",
                    remedy="Export again, or report it with the bundle's manifest.",
                ) from error
        return outputs

    def close(self) -> None:
        self._method = self._program = None
        _loaded.discard(self)


_loaded: WeakSet[PteRuntime] = WeakSet()  # runtimes whose methods hold the pool of threads


def _resize_pool(count: int) -> None:
    """Gives XNNPACK another number of threads. Raises UsageError if a loaded artifact would lose its pool."""
    from edgellama.host import executorch_libraries as executorch
    from edgellama.targets.xnnpack import functions

    if _loaded:
        raise UsageError(
            f"{count} threads were asked for, and an artifact that is loaded runs on {executorch.threads()}; ExecuTorch "
            "has one number for the process",
            remedy="Close the other runtimes first, or leave the number of threads out.",
        )
    functions.forget_programs()
    executorch.set_threads(count)


class PteParts(PteRuntime):
    """Runs a .pte whose method returns the input of each layer after the logits."""

    @classmethod
    def of(cls, path: Path, layers: int) -> Self:
        """Opens the .pte at `path` with these outputs, from a temporary copy."""
        from edgellama.formats.pte_program import PteProgram
        from edgellama.targets.xnnpack.parts import with_states

        program = PteProgram.read(path)
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / path.name
            with_states(program, layers, LONGEST).write(copy)
            return cls(copy)

    def states(self, tokens: Sequence[int]) -> States:
        tokens = self._checked(tokens)
        logits, *inputs = self._execute(tokens, self.position)
        self.position += len(tokens)
        return States([x[0].clone() for x in inputs], logits[0].clone())


@cache
def _sink() -> int:
    """Descriptor that captured output goes to: a file in memory where the system has them, else nowhere."""
    if sys.platform == "linux":
        return os.memfd_create("executorch", 0)
    return os.open(os.devnull, os.O_RDWR)


@contextmanager
def native_output_captured() -> Iterator[int]:
    """Keeps lines that ExecuTorch's C++ logs while it loads out of standard output and error.

    Yields the descriptor of the lines; error messages quote the last one. The descriptors 1 and 2 belong to the
    whole process, so they are exchanged only while no other Python thread could print. Else the lines are left:
    there are five at the first load on x86-64 Linux. A method that runs logs nothing but failures.
    """
    sink = _sink()
    if sys.platform == "linux":
        os.ftruncate(sink, 0)
        os.lseek(sink, 0, os.SEEK_SET)
    if _others_may_print() or not all(map(_is_open, (1, 2))):
        yield sink
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    saved = os.dup(1), os.dup(2)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        yield sink
    finally:
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextmanager
def _streams() -> Iterator[None]:
    """Standard streams for ExecuTorch's bindings, which write to them, in a process that has none (pythonw)."""
    with ExitStack() as stack:
        if sys.stdout is None:
            stack.enter_context(redirect_stdout(io.StringIO()))
        if sys.stderr is None:
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def _others_may_print() -> bool:
    """Whether another Python thread runs, apart from those that lose nothing."""
    own = threading.current_thread()
    return any(thread is not own and thread.name not in SILENT_THREADS for thread in threading.enumerate())


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _reason(error: Exception, output: int) -> str:
    lines = os.pread(output, 1 << 20, 0).decode(errors="replace").strip().splitlines()
    return f"{error}; {lines[-1]}" if lines else str(error)
