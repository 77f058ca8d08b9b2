"""Runtime of an artifact on an emulated Arm processor: a process in the emulator that answers calls.

Its kernels are those of the aarch64 library, chosen for the emulated processor. Each call is answered by a
real run of the artifact. Speed and memory say nothing about a phone.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.emulator.counter import counter, counts
from edgellama.emulator.installed import Emulator
from edgellama.emulator.processors import Processor
from edgellama.errors import BundleError, UsageError
from edgellama.runtimes.base import Logits, Runtime
from edgellama.targets import Target

WORKER = Path(__file__).with_name("emulated_worker.py")
LIBRARIES = Path(__file__).parents[1] / "host/executorch_libraries.py"
KINDS = {"xnnpack": "executorch", "onnx": "onnxruntime"}
# Reasons why other targets are not emulated, where there is more to say than that no library exists.
_REASONS = {"gguf": "llama.cpp's library for Arm on PyPI lacks the dotprod kernels that phones run"}
_ILLEGAL_INSTRUCTION = 4  # SIGILL; qemu ends with the negative number or with 128 more


class EmulatedRuntime(Runtime):
    """Runs the artifact of `target` at `path` on an emulated processor.

    Args:
        emulator: the installed emulator.
        processor: the processor.
        target: `xnnpack` or `onnx`.
        path: the artifact.
        entries: session entries of ONNX Runtime.
        probe: directory of the probe of ONNX Runtime's rounding (`targets/onnx/rounding_probe`).
        log: file for qemu's log of translated instructions, which names the kernels; None for no log.
        counting: count the instructions of each call (`instructions`).

    Raises UsageError for a target without a runtime in the emulator, BundleError if the artifact cannot be
    loaded there, MissingDependencyError if instructions cannot be counted.
    """

    def __init__(
        self,
        emulator: Emulator,
        processor: Processor,
        target: Target,
        path: Path,
        *,
        entries: Sequence[str] = (),
        probe: Path | None = None,
        log: Path | None = None,
        counting: bool = False,
    ) -> None:
        if target.name not in KINDS:
            raise not_emulated([target.name])
        options = () if log is None else ("-d", "in_asm", "-D", str(log))
        qemu = None
        if counting:
            qemu, plugin = counter(emulator)
            options = (*options, "-plugin", str(plugin))
        program: list[str | Path] = [
            "python3.11",
            WORKER.resolve(),
            KINDS[target.name],
            path.resolve(),
            LIBRARIES.resolve() if KINDS[target.name] == "executorch" else probe or "-",
        ]
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            emulator.command(processor, [*program, *entries], options=options, qemu=qemu),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
        )
        self.processor, self.path = processor, path
        header: dict[str, Any] = json.loads(self._answer(None))
        self.vocab_size, self.context_length = header["vocab_size"], header["context_length"]
        self.features: list[str] = header["features"]
        self.mapped: list[list[Any]] = header["mapped"]
        self.probe: list[Any] | None = header["probe"]
        self.name = f"emulated {processor.name}, qemu {emulator.qemu}"

    @property
    def threads(self) -> int:
        return 1

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        assert self._process.stdin is not None
        call = struct.pack("<qq", position, len(tokens)) + np.asarray(tokens, np.int64).tobytes()
        try:
            self._process.stdin.write(call)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error
        return np.frombuffer(self._answer(4 * self.vocab_size), np.float32)

    def instructions(self) -> list[int]:
        """Instructions that each call so far executed, if they are counted."""
        # Read at a position, because the process writes at the file's own.
        descriptor = self._messages.fileno()
        return counts(os.pread(descriptor, os.fstat(descriptor).st_size, 0))

    def _answer(self, size: int | None) -> bytes:
        """The next `size` bytes of the program's output, or its next line. Raises BundleError if it ended."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline() if size is None else self._process.stdout.read(size)
        if not answer or (size is not None and len(answer) < size):
            raise self._failure()
        return answer

    def _failure(self) -> BundleError:
        """The error of a program that ended too early."""
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        self.close()
        if code in (-_ILLEGAL_INSTRUCTION, 128 + _ILLEGAL_INSTRUCTION):
            return BundleError(
                f"{self.path}: the runtime ended with SIGILL on {self.processor.label}",
                remedy="The library uses an instruction that this processor lacks; phones with it cannot run it.",
            )
        return BundleError(
            f"{self.path}: the runtime ended on {self.processor.label}: {' '.join(lines[-2:])}",
            remedy="Validate the bundle on this machine first. `edgellama emulator install --force` renews the emulator.",
        )

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._messages):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def not_emulated(targets: Iterable[str]) -> UsageError:
    """The refusal of targets of which none has a runtime on emulated Arm.

    >>> not_emulated(["coreml"]).message
    'none of the targets coreml has a runtime on emulated Arm'
    """
    names = list(dict.fromkeys(targets))
    reasons = "; ".join(_REASONS[name] for name in names if name in _REASONS)
    return UsageError(
        f"none of the targets {', '.join(names)} has a runtime on emulated Arm{f': {reasons}' if reasons else ''}",
        remedy=f"Targets that can be emulated: {', '.join(KINDS)}.",
    )
