"""Constants of a MIL program: stored inline, or in weight.bin, from where they are read one at a time.

coremltools 9.0 ships the messages and, as the internal `libmilstoragepython`, the reader of weight.bin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellama.errors import BundleError

REMEDY = "Export the package again, or copy it again as a whole."
Array = npt.NDArray[Any]

# DataType of MIL.proto -> name, bits
_DTYPES: Mapping[int, tuple[str, int]] = {
    1: ("bool", 8),
    2: ("string", 0),
    10: ("float16", 16),
    11: ("float32", 32),
    12: ("float64", 64),
    21: ("int8", 8),
    22: ("int16", 16),
    23: ("int32", 32),
    24: ("int64", 64),
    25: ("int4", 4),
    31: ("uint8", 8),
    32: ("uint16", 16),
    33: ("uint32", 32),
    34: ("uint64", 64),
    35: ("uint4", 4),
    36: ("uint2", 2),
    37: ("uint1", 1),
    38: ("uint6", 6),
    39: ("uint3", 3),
}
BITS = dict(_DTYPES.values())
_READERS = {
    "float16": "read_fp16_data",
    "float32": "read_float_data",
    **{n: f"read_{n}_data" for n in ("int4", "int8", "int16", "int32", "uint8", "uint16", "uint32")},
    **{n: f"read_{n}_data" for n in ("uint1", "uint2", "uint3", "uint4", "uint6")},
}


@dataclass(frozen=True)
class Tensor:
    """A constant. data: what was stored inline, or None for what lies in weight.bin at `offset`."""

    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    data: Array | str | None = field(repr=False)
    weights: Path = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes as stored; sub-byte types are packed."""
        bits = BITS[self.dtype]
        return -(-int(np.prod(self.shape, dtype=np.int64)) * bits // 8)

    def array(self) -> Array:
        """The values; int4 and narrower as int8 or uint8. Raises BundleError for a damaged weight.bin."""
        if isinstance(self.data, np.ndarray):
            return self.data
        from coremltools.libmilstoragepython import _BlobStorageReader

        try:
            reader = _BlobStorageReader(str(self.weights / "weight.bin"))
            raw = np.asarray(getattr(reader, _READERS[self.dtype])(self.offset))
            if self.dtype == "float16":
                raw = raw.view(np.float16)
            elif self.dtype.startswith(("int4", "uint1", "uint2", "uint3", "uint4", "uint6")) and (
                self.dtype not in ("uint16", "uint32")
            ):
                raw = raw.astype(np.int8 if self.dtype == "int4" else np.uint8)
            return raw.reshape(self.shape)
        except (RuntimeError, ValueError, KeyError) as error:
            raise BundleError(
                f"{self.weights}: weight.bin is damaged at {self.offset} ({error})", remedy=REMEDY
            ) from error


def read_type(message: Any) -> tuple[str, tuple[int | None, ...]]:
    if message.WhichOneof("type") == "stateType":
        message = message.stateType.wrappedType
    if message.WhichOneof("type") != "tensorType":
        return message.WhichOneof("type") or "?", ()
    t = message.tensorType
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in t.dimensions)
    return _DTYPES[t.dataType][0], shape


def read_tensor(value: Any, weights: Path) -> Tensor:
    dtype, dims = read_type(value.type)
    shape = tuple(int(n or 0) for n in dims)
    if value.WhichOneof("value") == "blobFileValue":
        return Tensor(dtype, shape, value.blobFileValue.offset, None, weights)
    return Tensor(dtype, shape, None, _immediate(value.immediateValue.tensor, dtype, shape), weights)


def _immediate(tensor: Any, dtype: str, shape: tuple[int, ...]) -> Array | str | None:
    kind = tensor.WhichOneof("value")
    if kind is None:
        return None
    values = getattr(tensor, kind).values
    if kind == "strings":
        return str(values[0]) if len(values) else ""
    if kind == "bytes":
        if dtype == "float16":
            return np.frombuffer(values, np.float16).reshape(shape)
        width = BITS[dtype]
        if width < 8:
            bits = np.unpackbits(np.frombuffer(values, np.uint8), bitorder="little")
            count = int(np.prod(shape, dtype=np.int64))
            numbers = bits[: count * width].reshape(count, width) @ (1 << np.arange(width))
            if dtype == "int4":
                numbers = (numbers + 8) % 16 - 8
            return numbers.astype(np.int8).reshape(shape)
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape)
    return np.array(values, dtype=np.dtype(dtype)).reshape(shape)
