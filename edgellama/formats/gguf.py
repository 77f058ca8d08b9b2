"""Reader of GGUF files: metadata and tensors, directly from the mapped file.

Layout, all little-endian, in this order (github.com/ggml-org/ggml, docs/gguf.md):

- magic, version, counts
- metadata: key, type, value
- per tensor: name, dimensions (contiguous one first), type, offset
- padding and data

The `gguf` package names the types and dequantizes. Its GGUFReader is not used, because it makes two numpy
objects for every token and merge. For the vocabulary of Llama 3 that costs 10 s and 600 MB, against 0.3 s and
40 MB here. It also raises no error for a damaged length.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellama.errors import CheckpointError
from edgellama.files import MAX_PARTS, is_lfs_pointer, numbered_parts
from edgellama.host.threads import side_by_side

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPES = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}

MAGIC = b"GGUF"

# Numbers of types that ggml has removed (ggml.h, `enum ggml_type`). Such files were made for phones until 2024.
RETIRED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
_LARGEST_TYPE = 255  # a larger number is damage, and no type of a newer ggml

# GGUF's value type -> struct code. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

_WEIGHTS_AT_ONCE = 2**17  # dequantized per call: small enough for the CPU caches, large enough for numpy
_AGAIN = "Download the file again, or convert it again with llama.cpp's convert_hf_to_gguf.py."


@dataclass(frozen=True)
class GgufTensor:
    """Location of a tensor in the file. `dtype` is ggml's name; `shape` has the contiguous dimension last.

    part: number of the file of a model in parts, from 0.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: metadata as Python values, tensors by name, and the mapped bytes of every part."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    parts: tuple[NDArray[np.uint8], ...]
    files: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        """One tensor: a view of the mapped file for dtypes in FLOATS, otherwise dequantized to float32."""
        tensor = self.tensors[name]
        raw = self.parts[tensor.part][tensor.start : tensor.start + tensor.nbytes]
        if tensor.dtype in FLOATS:
            return torch.from_numpy(raw).view(FLOATS[tensor.dtype]).view(tensor.shape)
        return dequantize(raw, tensor.dtype, tensor.shape)


def dequantize(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """float32 [*shape] from the blocks in `raw`. Works on a few rows at a time to keep temporaries small.

    Each piece is given as one row. The package takes 16 rows at a time, and narrow ones cost more calls than
    arithmetic.
    """
    kind = gguf.GGMLQuantizationType[dtype]
    rows = np.asarray(raw).reshape(math.prod(shape[:-1]), -1)  # a view without the costs of a memmap
    weights = torch.empty(shape)
    out = weights.numpy().reshape(len(rows), -1)
    step = max(1, _WEIGHTS_AT_ONCE // shape[-1])

    def piece(first: int) -> None:
        blocks, values = rows[first : first + step], out[first : first + step]
        # A damaged scale may be infinite or NaN. Checkpoint.tensor reports it with the tensor's name.
        with np.errstate(all="ignore"):
            values[:] = gguf.dequantize(blocks.reshape(1, -1), kind).reshape(values.shape)

    side_by_side(piece, range(0, len(rows), step))
    return weights


def is_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF files do, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """Opens the GGUF file at `path`, version 2 or 3, little-endian. Any part of a model in parts opens the whole.

    Raises CheckpointError for another format, a damaged or truncated file, or a missing part.
    """
    first = _read_part(path)
    count = _part_count(first)
    if count == 1:
        return first
    paths = numbered_parts(path)
    if len(paths) != count:
        raise CheckpointError(
            f"{path}: this is one of {count} parts (split.count), and its name does not lead to the others",
            remedy=f"Give the parts their names back: NAME-00001-of-{count:05d}.gguf and on.",
        )
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {count} parts are missing beside it: {', '.join(missing[:4])}",
            remedy="Download all parts into the same directory.",
        )
    parts = [first if part == path else _read_part(part) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        place = (_part_count(part), part.metadata.get("split.no"))
        if place != (count, number):
            raise CheckpointError(
                f"{part.path}: its metadata says part {place[1]} of {place[0]} (counted from 0), "
                f"its name part {number} of {count}",
                remedy="The parts are not of one model; take them all from the same download.",
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part.path}: tensor {name} is in another part too", remedy=_AGAIN)
            tensors[name] = replace(tensor, part=number)
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{path}: the parts hold {len(tensors)} tensors, and split.tensors.count is {total}",
            remedy=_AGAIN,
        )
    return GgufFile(path, parts[0].metadata, tensors, tuple(part.parts[0] for part in parts), tuple(paths))


def _part_count(file: GgufFile) -> int:
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_PARTS:
        raise CheckpointError(f"{file.path}: split.count is {count!r:.40}, expected a number", remedy=_AGAIN)
    return max(1, count)


def _read_part(path: Path) -> GgufFile:
    try:
        # Copy-on-write because torch needs writable memory. The file itself never changes.
        data = np.memmap(path, mode="c") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", remedy="Check that the file may be read."
        ) from error
    header = _Header(path, data.data)
    tensor_count, key_count = header.start()
    metadata = header.metadata(key_count)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 4 or alignment & (alignment - 1):
        raise header.damaged(f"general.alignment is {alignment!r}, expected a power of two from 4 on")
    return GgufFile(path, metadata, header.tensors(tensor_count, alignment), (data,), (path,))


class _Header:
    """Sequential reader of a GGUF header. A read past the end raises CheckpointError for a truncated file."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path, self.buffer, self.position = path, buffer, 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged or truncated GGUF file: {what}", remedy=_AGAIN)

    def start(self) -> tuple[int, int]:
        """(number of tensors, number of metadata keys)."""
        magic = bytes(self.buffer[:4])
        if is_lfs_pointer(bytes(self.buffer[:64])):
            raise CheckpointError(
                f"{self.path}: a Git LFS pointer and not the model", remedy="Run `git lfs pull`."
            )
        if magic != MAGIC:
            raise CheckpointError(
                f"{self.path}: not a GGUF file: it starts with {magic!r}, expected b'GGUF'",
                remedy="Check that the download is complete and not a web page.",
            )
        self.position = 4
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path}: the file is big-endian, expected little-endian",
                remedy="Turn it with gguf-convert-endian (package gguf), or convert without --bigendian.",
            )
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version}, expected 2 or 3", remedy=_AGAIN)
        return self.number("Q"), self.number("Q")

    def metadata(self, count: int) -> dict[str, Any]:
        """Metadata by key: bool, int, float, str or a list of these."""
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.text()
            if key in values:
                raise self.damaged(f"metadata key {key!r} is there twice")
            values[key] = self.value(key)
        return values

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        """Tensors by name. Raises CheckpointError for a tensor that is not within the file."""
        entries = {}
        for _ in range(count):
            name, dimensions = self.text(), self.number("I")
            if not 1 <= dimensions <= 4:
                raise self.damaged(f"tensor {name!r} has {dimensions} dimensions, expected 1 to 4")
            shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
            if name in entries:
                raise self.damaged(f"tensor {name!r} is there twice")
            entries[name] = (shape, self.number("I"), self.number("Q"))
        data_start = -(-self.position // alignment) * alignment
        return {name: self.tensor(name, *entry, data_start, alignment) for name, entry in entries.items()}

    def tensor(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int, alignment: int
    ) -> GgufTensor:
        if kind in RETIRED:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {RETIRED[kind]}, which ggml has removed; the file is sound, and "
                "no current program reads it",
                remedy="Take the Q4_0 file of the same model (llama.cpp arranges it for the processor when it loads), "
                "or best its F16 file.",
            )
        if kind not in _TYPES:
            if kind > _LARGEST_TYPE:
                raise self.damaged(f"tensor {name} has type number {kind}")
            raise CheckpointError(
                f"{self.path}: tensor {name} has type number {kind}, which the installed package gguf does not know",
                remedy="Install a newer one (pip install -U gguf), or take the F16 file of the same model.",
            )
        dtype = _TYPES[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
        if not all(shape) or shape[-1] % block:
            raise self.damaged(f"tensor {name} has shape {list(shape)}, and {dtype} has blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise self.damaged(f"tensor {name} starts at {offset}, not a multiple of {alignment}")
        if data_start + offset + nbytes > len(self.buffer):
            raise self.damaged(
                f"tensor {name} ends at byte {data_start + offset + nbytes}, the file at {len(self.buffer)}"
            )
        return GgufTensor(dtype, shape, data_start + offset, nbytes)

    def take(self, size: int) -> memoryview:
        if size > len(self.buffer) - self.position:
            raise self.damaged(f"the header goes on past the file's end at byte {len(self.buffer)}")
        self.position += size
        return self.buffer[self.position - size : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        start = self.position
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text at byte {start} is not UTF-8") from error

    def texts(self, count: int) -> list[str]:
        """Same as `count` calls of `text`, ten times faster. A vocabulary has half a million strings."""
        buffer, position, lengths = self.buffer, self.position, struct.Struct("<Q")
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + lengths.unpack_from(buffer, position)[0]
                strings.append(str(buffer[start:position], "utf-8"))
        except (struct.error, OverflowError, UnicodeDecodeError) as error:
            raise self.damaged(f"the list of texts at byte {self.position} cannot be read") from error
        self.take(position - self.position)
        return strings

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind == _FLOAT32:
            # The shortest decimal that rounds to the stored float: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(self.number("f"))))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged(f"metadata key {key!r} has value type {kind}")
        item, length = self.number("I"), self.number("Q")
        if item == _STRING:
            return self.texts(length)
        if item not in _SCALARS:
            raise self.damaged(f"metadata key {key!r} is an array of value type {item}")
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()
