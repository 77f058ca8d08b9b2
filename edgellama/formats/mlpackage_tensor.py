"""Constants of an ML Program: location and decoding of their bytes.

Small constants are in the program itself, large ones in weight.bin, in Core ML's storage format 2. The
program names an offset in weight.bin, at which 64 bytes describe the data: a mark, the dtype, the size and
the place. They are read here and compared with the program. The reader in coremltools 9.0 is internal, so it
is not used.
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

# DataType in MIL.proto -> name.
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
# Names of BlobDataType in weight.bin; the first has number 1.
_STORED = (
    *("float16", "float32", "uint8", "int8", "bfloat16", "int16", "uint16", "int4"),
    *("uint1", "uint2", "uint4", "uint3", "uint6", "int32", "uint32"),
)
_MODEL_PATH = "@model_path/"  # in a program: the directory of the model file
_BLOB = struct.Struct("<IIQQ")  # mark, dtype, bytes, offset of the data
_BLOB_MARK = 0xDEADBEEF


@dataclass(frozen=True)
class Constant:
    """A constant, either inline in the program or in a weight.bin.

    Attributes:
        offset: Offset of the description in the file `weights`; None for an inline constant.
        data: Inline value; None for a constant in the file `weights`.
    """

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
        """The values. Integers narrower than a byte become int8 or uint8.

        Raises BundleError for a damaged weight.bin, a string, or a dtype that numpy lacks.
        """
        if isinstance(self.data, np.ndarray):
            return self.data
        if self.offset is None:
            raise BundleError(f"a constant of dtype {self.dtype} has no numbers", remedy=REMEDY)
        with _opened(self.weights) as file:
            file.seek(_locate(self, file))
            return unpacked(np.fromfile(file, np.uint8, self.nbytes), self.dtype, self.shape)


def type_of(message: Any) -> tuple[str, tuple[int | None, ...]]:
    """(dtype, shape) in a ValueType; a size that varies is None. Raises KeyError for an unknown dtype."""
    if message.WhichOneof("type") == "stateType":
        message = message.stateType.wrappedType
    if message.WhichOneof("type") != "tensorType":
        return message.WhichOneof("type") or "?", ()
    t = message.tensorType
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in t.dimensions)
    return DTYPES[t.dataType], shape


def tensor_of(value: Any, root: Path) -> Constant:
    """The constant that a Value message holds or refers to.

    root: Directory of the model file.
    Raises KeyError or ValueError for a damaged message or a place outside `root`.
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
    """Raises BundleError unless constants in weight.bin are complete, with the program's dtype and size."""
    files: dict[Path, list[Constant]] = {}
    for tensor in tensors:
        if tensor.offset is not None:
            files.setdefault(tensor.weights, []).append(tensor)
    for path, stored in files.items():
        with _opened(path) as file:
            for tensor in stored:
                _locate(tensor, file)


def unpacked(packed: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Array:
    """Values of `shape` from their bytes, which the program and weight.bin store in the same way.

    Raises BundleError for a dtype that numpy lacks, and ValueError for a wrong number of bytes.
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
    """Offset of the data of `tensor`. Raises BundleError if the description does not match."""
    assert tensor.offset is not None
    end = file.seek(0, 2)
    file.seek(min(tensor.offset, end))
    header = file.read(_BLOB.size)
    mark, dtype_number, size, place = _BLOB.unpack(header) if len(header) == _BLOB.size else (0, 0, 0, 0)
    stored_dtype = _STORED[dtype_number - 1] if 0 < dtype_number <= len(_STORED) else f"dtype {dtype_number}"
    if mark != _BLOB_MARK:
        problem = "nothing is stored there"
    elif (stored_dtype, size) != (tensor.dtype, tensor.nbytes):
        problem = f"{size} bytes of {stored_dtype} are stored there"
    elif place + size > end:
        problem = "the file ends before the data"
    else:
        return int(place)
    raise BundleError(
        f"{tensor.weights} is damaged: its program expects {tensor.nbytes} bytes of {tensor.dtype} at {tensor.offset}, "
        f"but {problem}",
        remedy=REMEDY,
    )
