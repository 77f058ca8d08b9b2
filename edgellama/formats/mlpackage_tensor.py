"""A constant of an ML Program: where its bytes lie, and what they mean.

Small constants are in the program itself, large ones in weight.bin, in Core ML's storage format 2: at the offset that
the program names stand 64 bytes about the data (a mark, the dtype, size and place), which are read here and compared
with what the program says. (The reader that coremltools 9.0 has is internal.)
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgellama.errors import BundleError

Array = npt.NDArray[Any]
REMEDY = "Export the package again, or copy it again as a whole."

# DataType of MIL.proto -> name
DTYPES: Mapping[int, str] = {
    1: "bool",
    2: "string",
    10: "float16",
    11: "float32",
    12: "float64",
    13: "bfloat16",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
    40: "float8e4m3fn",
    41: "float8e5m2",
}
BITS: Mapping[str, int] = {
    name: {"bool": 8, "string": 0}.get(name) or int(re.findall(r"\d+", f"{name} 0")[0])
    for name in DTYPES.values()
}
# BlobDataType of weight.bin, from 1 on
_STORED = (
    *("float16", "float32", "uint8", "int8", "bfloat16", "int16", "uint16", "int4"),
    *("uint1", "uint2", "uint4", "uint3", "uint6", "int32", "uint32"),
)
_MODEL_PATH = "@model_path/"  # in a program: the directory of the model file
_BLOB = struct.Struct("<IIQQ")  # mark, dtype, bytes, offset of the data
_BLOB_MARK = 0xDEADBEEF


@dataclass(frozen=True)
class Constant:
    """data: what was stored inline; or None for what lies in the file `weights` at `offset`."""

    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    data: Array | str | None = field(repr=False)
    weights: Path = field(repr=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored; sub-byte types are packed."""
        return -(-self.size * BITS[self.dtype] // 8)

    def array(self) -> Array:
        """The values; integers narrower than a byte as int8 or uint8. Raises BundleError for a damaged weight.bin,
        and for what has no values: a string, or a dtype that numpy does not know.
        """
        if isinstance(self.data, np.ndarray):
            return self.data
        if self.offset is None:
            raise BundleError(f"a constant of dtype {self.dtype} has no numbers", remedy=REMEDY)
        with _opened(self.weights) as file:
            file.seek(_locate(self, file))
            return unpacked(np.fromfile(file, np.uint8, self.nbytes), self.dtype, self.shape)


def type_of(message: Any) -> tuple[str, tuple[int | None, ...]]:
    """(dtype, shape) that a ValueType message says, None for a size that varies. Raises KeyError for no known dtype."""
    if message.WhichOneof("type") == "stateType":
        message = message.stateType.wrappedType
    if message.WhichOneof("type") != "tensorType":
        return message.WhichOneof("type") or "?", ()
    t = message.tensorType
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in t.dimensions)
    return DTYPES[t.dataType], shape


def tensor_of(value: Any, root: Path) -> Constant:
    """The constant that a Value message holds or names; root: the directory of the model file.

    Raises KeyError or ValueError for a damaged one, and for a place outside of `root`.
    """
    dtype, dimensions = type_of(value.type)
    shape = tuple(int(n or 0) for n in dimensions)
    if value.WhichOneof("value") != "blobFileValue":
        return Constant(dtype, shape, None, _immediate(value.immediateValue.tensor, dtype, shape), root)
    blob = value.blobFileValue
    place = PurePosixPath(blob.fileName.removeprefix(_MODEL_PATH))
    if place.is_absolute() or ".." in place.parts or not blob.fileName.startswith(_MODEL_PATH):
        raise ValueError(f"weights in {blob.fileName!r}")
    return Constant(dtype, shape, blob.offset, None, root / place)


def _immediate(tensor: Any, dtype: str, shape: tuple[int, ...]) -> Array | str | None:
    kind = tensor.WhichOneof("value")
    if kind is None:
        return None
    values = getattr(tensor, kind).values
    if kind == "strings":
        return str(values[0]) if len(values) else ""
    if kind == "bytes":
        return unpacked(np.frombuffer(values, np.uint8).copy(), dtype, shape)
    return np.array(values, dtype=np.dtype(dtype)).reshape(shape)


def check_stored(tensors: Iterable[Constant]) -> None:
    """Raises BundleError unless all that lie in a weight.bin are there, whole, as what the program takes them for."""
    files: dict[Path, list[Constant]] = {}
    for tensor in tensors:
        if tensor.offset is not None:
            files.setdefault(tensor.weights, []).append(tensor)
    for path, stored in files.items():
        with _opened(path) as file:
            for tensor in stored:
                _locate(tensor, file)


def unpacked(packed: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Array:
    """Values of `shape` from their bytes, as both places store them. Raises BundleError for a dtype that numpy lacks
    and ValueError for another number of bytes.
    """
    bits = BITS[dtype]
    if dtype.startswith("float8") or dtype in ("bfloat16", "string"):
        raise BundleError(f"a constant of dtype {dtype} cannot be read", remedy="Convert it to float16.")
    if bits >= 8:
        return packed.view(np.dtype(dtype)).reshape(shape)
    count = math.prod(shape)
    if 8 % bits == 0:  # the lowest bits of a byte first
        parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        values = np.stack(parts, axis=-1).reshape(-1)[:count]
    else:
        stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
        values = stream @ (1 << np.arange(bits)).astype(np.uint8)
    if dtype == "int4":
        values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return values.reshape(shape)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}", remedy=REMEDY) from error


def _locate(tensor: Constant, file: BinaryIO) -> int:
    """The offset of the data of `tensor`."""
    assert tensor.offset is not None
    end = file.seek(0, 2)
    file.seek(min(tensor.offset, end))
    header = file.read(_BLOB.size)
    mark, stored, size, place = _BLOB.unpack(header) if len(header) == _BLOB.size else (0, 0, 0, 0)
    found = _STORED[stored - 1] if 0 < stored <= len(_STORED) else f"dtype {stored}"
    if mark != _BLOB_MARK:
        problem = "nothing is stored there"
    elif (found, size) != (tensor.dtype, tensor.nbytes):
        problem = f"{size} bytes of {found} are stored there"
    elif place + size > end:
        problem = "the file ends before the data"
    else:
        return int(place)
    raise BundleError(
        f"{tensor.weights} is damaged: its program expects {tensor.nbytes} bytes of {tensor.dtype} at {tensor.offset}, "
        f"but {problem}",
        remedy=REMEDY,
    )
