"""Writer of safetensors files with metadata, whose bytes depend on nothing but the content.

The library's own writer orders metadata by chance (safetensors 0.8), so two files of one content differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_ALIGNMENT = 8  # bytes of the header are a multiple of this


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is made when it is written. `make` returns it in this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> None:
    """Writes tensors one after another, so that one at a time is in memory.

    Wide dtypes come first, then names in order, as in the library's own writer.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, source in ordered:
        start, end = end, end + source.nbytes
        header[name] = {
            "dtype": _NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, source in ordered:
            tensor = source.make()
            if tensor.dtype != source.dtype or tuple(tensor.shape) != source.shape:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, declared otherwise")
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
