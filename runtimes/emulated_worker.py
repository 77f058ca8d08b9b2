"""Program inside the emulator: opens one artifact, and answers calls on standard input.

    python3.11 emulated_worker.py KIND ARTIFACT LIBRARIES [ENTRY=VALUE ...]

KIND is `executorch` or `onnxruntime`. LIBRARIES is the file edgellama/host/executorch_libraries.py, or for
`onnxruntime` a directory with probe.onnx and probe.npy, or `-`. ENTRY=VALUE are session entries of ONNX Runtime. Of
edgellama it imports that file and executorch_versions.py beside it, because emulated imports are slow.

The answer to the start is a line of JSON about the artifact and the processor. A call is the position and the
number of tokens (two int64), and then the tokens (int64). Its answer is the logits (float32 [vocab_size]). A
call without tokens ends the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, BinaryIO, Protocol

import numpy as np

# Bits of getauxval(AT_HWCAP) and getauxval(AT_HWCAP2), from Linux's uapi/asm/hwcap.h for arm64.
AT_HWCAP, AT_HWCAP2 = 16, 26
FEATURES = (
    ("atomics", AT_HWCAP, 8),
    ("dotprod", AT_HWCAP, 20),
    ("sve", AT_HWCAP, 22),
    ("i8mm", AT_HWCAP2, 13),
    ("sme", AT_HWCAP2, 23),
)


class Artifact(Protocol):
    """One opened artifact.

    Attributes:
        library: parts of file names, one of which is that of the library that holds its kernels.
        probe: result of the probe for all rows in one call and one by one, if one was given.
    """

    library: tuple[str, ...]
    probe: list[Any] | None
    vocab_size: int
    context_length: int

    def forward(self, tokens: list[int], position: int) -> np.ndarray[Any, np.dtype[np.float32]]: ...


class Pte:
    """A .pte in ExecuTorch, with one thread."""

    library: tuple[str, ...] = (
        "_portable_lib",
        "libexecutorch_backend_xnnpack",
    )  # ExecuTorch 1.4, and from 1.5 on
    probe: list[Any] | None = None

    def __init__(self, path: str, libraries: str) -> None:
        import torch

        torch.set_num_threads(1)
        # The file imports the one beside it, which it then finds without the rest of edgellama.
        loaded("executorch_versions", libraries)
        executorch = loaded("executorch_libraries", libraries)
        executorch.set_threads(1)
        self._tensor = torch.tensor
        self._program = executorch.Runtime.get().load_program(path)
        self.vocab_size = self._constant("get_vocab_size")
        self.context_length = self._constant("get_max_context_len")
        self._longest = self._constant("get_max_seq_len")
        self._method = self._program.load_method("forward")

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute([])[0])

    def forward(self, tokens: list[int], position: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        for start in range(0, len(tokens), self._longest):
            piece = self._tensor([tokens[start : start + self._longest]])
            logits = self._method.execute((piece, self._tensor([position + start])))[0]
        return np.asarray(logits[0].numpy(), np.float32)


class Onnx:
    """A model.onnx in ONNX Runtime, with one thread and the session entries of the client's configuration."""

    library: tuple[str, ...] = ("onnxruntime_pybind11_state",)

    def __init__(self, path: str, entries: list[str], probe: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        for entry in entries:
            options.add_session_config_entry(*entry.split("=", 1))
        self._session = ort.InferenceSession(
            f"{path}/model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.probe: list[Any] | None = None if probe == "-" else probed(ort, options, probe)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.vocab_size = int(metadata["edgellama.vocab_size"])
        self.context_length = int(metadata["edgellama.context_length"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._empty = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self._session.get_inputs()
            if value.name.startswith("past")
        }
        self._past = self._empty

    def forward(self, tokens: list[int], position: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, position + len(tokens)), np.int64),
            **(self._past if position else self._empty),
        }
        named = dict(zip(self._outputs, self._session.run(None, inputs), strict=True))
        logits = named.pop("logits")
        self._past = {name.replace("present", "past_key_values"): value for name, value in named.items()}
        return np.asarray(logits[0, 0], np.float32)


def probed(ort: Any, options: Any, directory: str) -> list[Any]:
    """Results of the probe in `directory`, for all rows in one call and for the rows one by one."""
    session = ort.InferenceSession(f"{directory}/probe.onnx", options, providers=["CPUExecutionProvider"])
    x = np.load(f"{directory}/probe.npy")
    one_by_one = [session.run(None, {"x": row[None]})[0][0].tolist() for row in x]
    return [session.run(None, {"x": x})[0].tolist(), one_by_one]


def features() -> list[str]:
    """Instruction sets that the processor reports to programs, from the oldest."""
    library = ctypes.CDLL(None)
    library.getauxval.argtypes, library.getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return [name for name, kind, bit in FEATURES if library.getauxval(kind) >> bit & 1]


def loaded(name: str, libraries: str) -> Any:
    """Module of edgellama/host, loaded from the folder of the file `libraries`."""
    full_name = f"edgellama.host.{name}"
    spec = spec_from_file_location(full_name, os.path.join(os.path.dirname(libraries), f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[full_name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mapped(library: Sequence[str]) -> list[list[Any]]:
    """[start, end, file offset, path] of every mapped part of the library."""
    parts = []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            words = line.split()
            if len(words) > 5 and any(name in os.path.basename(words[5]) for name in library):
                start, end = (int(x, 16) for x in words[0].split("-"))
                parts.append([start, end, int(words[2], 16), words[5]])
    return parts


def mark() -> None:
    """Tells qemu's counting plugin that a call begins or ends, by a system call that has no effect."""
    with contextlib.suppress(OSError):
        os.close(-12345)


def serve(artifact: Artifact, calls: BinaryIO, answers: BinaryIO) -> None:
    """Answers calls until one has no tokens."""
    header = {
        "vocab_size": artifact.vocab_size,
        "context_length": artifact.context_length,
        "features": features(),
        "mapped": mapped(artifact.library),
        "probe": artifact.probe,
    }
    answers.write(json.dumps(header).encode() + b"\n")
    answers.flush()
    while len(head := calls.read(16)) == 16:
        position, count = struct.unpack("<qq", head)
        if count == 0:
            break
        tokens = np.frombuffer(calls.read(8 * count), np.int64).tolist()
        mark()
        logits = artifact.forward(tokens, position)
        mark()
        answers.write(np.ascontiguousarray(logits, "<f4").tobytes())
        answers.flush()


def main(kind: str, path: str, libraries: str, *entries: str) -> None:
    # Libraries print to standard output, which carries the answers. They get standard error.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    artifact = Pte(path, libraries) if kind == "executorch" else Onnx(path, list(entries), libraries)
    serve(artifact, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
