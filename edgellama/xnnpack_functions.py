"""XNNPACK's sigmoid and reciprocal square root, computed by XNNPACK on this machine.

Both are approximations within a few units in the last place, by polynomials and Newton steps that XNNPACK chooses
by processor, so no formula in torch gives the same bits everywhere. Here each is a program of that one operator,
run by the runtime that runs the artifacts; a test compares it with the true function.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import Tensor, nn

from edgellama.executorch_libraries import Runtime
from edgellama.quiet import ignored_deprecations

CHUNK = 1 << 18  # values of one call


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of a float32 tensor of any shape."""
    return _apply("sigmoid", x)


def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x) of a float32 tensor of any shape."""
    return _apply("rsqrt", x)


def _apply(name: str, x: Tensor) -> Tensor:
    _, method = _program(name)
    pieces = [method.execute([piece])[0] for piece in x.detach().reshape(-1).contiguous().split(CHUNK)]
    return torch.cat(pieces).reshape(x.shape)


class _Function(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(torch, self.name)(x)
        return y


@cache
def _program(name: str) -> tuple[Any, Any]:
    """(program, its method): the method does not keep the program alive."""
    with ignored_deprecations(), torch.no_grad():
        traced = torch.export.export(
            _Function(name),
            (torch.ones(8),),
            dynamic_shapes=({0: torch.export.Dim("n", max=CHUNK)},),
            strict=False,
        )
        edge = to_edge_transform_and_lower(
            traced,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        program = Runtime.get().load_program(edge.to_executorch().buffer)
        return program, program.load_method("forward")
