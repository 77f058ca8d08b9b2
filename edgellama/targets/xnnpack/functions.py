"""XNNPACK's sigmoid and reciprocal square root, computed by XNNPACK on this machine.

Both are approximations within a few units in the last place. XNNPACK chooses their polynomials and Newton
steps by processor, so no formula in torch gives the same bits everywhere. Here each function is a program of
that one operator, run by the runtime that runs the artifacts. A test compares it with the true function. The
programs ship as data, because making them takes six seconds of every process that validates.
`export/xnnpack/function_programs.py` makes them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from edgellama.data import read_bytes
from edgellama.host.executorch_libraries import runtime

CHUNK = 1 << 18  # values per call


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of a float32 tensor of any shape."""
    return _apply("sigmoid", x)


def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x) of a float32 tensor of any shape."""
    return _apply("rsqrt", x)


def file_name(function: str) -> str:
    """Name of a function's program in edgellama/data."""
    return f"xnnpack_{function}.pte"


def _apply(name: str, x: Tensor) -> Tensor:
    _, method = _program(name)
    pieces = [method.execute([piece])[0] for piece in x.detach().reshape(-1).contiguous().split(CHUNK)]
    return torch.cat(pieces).reshape(x.shape)


def forget_programs() -> None:
    """Drops the loaded programs, which hold XNNPACK's pool of threads, before that pool is replaced."""
    _program.cache_clear()


@cache
def _program(name: str) -> tuple[Any, Any]:
    """(program, its method). The method does not keep the program alive, so both are cached."""
    program = runtime().load_program(read_bytes(file_name(name)))
    return program, program.load_method("forward")
