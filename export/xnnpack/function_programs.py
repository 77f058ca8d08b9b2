"""Programs of one operator each, for `edgellama.targets.xnnpack.functions`.

    python -m edgellama.export.xnnpack.function_programs

writes them into edgellama/data. A test compares the files with the output of this module.
"""

from __future__ import annotations

from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import Tensor, nn

from edgellama import data
from edgellama.host.log_filters import ignored_deprecations
from edgellama.targets.xnnpack.functions import CHUNK, file_name

FUNCTIONS = ("rsqrt", "sigmoid")


class _Function(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(torch, self.name)(x)
        return y


def program(name: str) -> bytes:
    """A .pte whose method applies torch's function `name` to float32 [n], n up to CHUNK."""
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
        return bytes(edge.to_executorch().buffer)


if __name__ == "__main__":
    for function in FUNCTIONS:
        Path(data.__file__).with_name(file_name(function)).write_bytes(program(function))
