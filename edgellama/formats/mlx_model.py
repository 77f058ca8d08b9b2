"""Reader of MLX directories: config.json and the tensors of model.safetensors. It executes nothing.

Files are untrusted. The safetensors library checks names, shapes and offsets before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgellama.errors import BundleError
from edgellama.files import read_json, strange_file

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_REMEDY = "Export it again, or copy it again as a whole."
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


@dataclass(frozen=True)
class StoredTensor:
    """Name, dtype, shape and bytes of a stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Packed:
    """Quantized weight as MLX reads it. A weight is `scales * code + biases`, codes counted from 0.

    Attributes:
        codes: uint8 [rows, columns].
        scales: float32 [rows, groups].
        biases: float32 [rows, groups].
        group_size: columns that share a scale.
        bits: of a code.
    """

    codes: Tensor
    scales: Tensor
    biases: Tensor
    group_size: int
    bits: int

    @property
    def values(self) -> Tensor:
        """Codes with a middle of 0, int8 [rows, columns]."""
        return (self.codes - (1 << (self.bits - 1))).view(torch.int8)  # wraps around


@dataclass(frozen=True)
class MlxFile:
    """The model in the directory `path`.

    Attributes:
        config: config.json.
        metadata: of the header of model.safetensors.
        tensors: by name.
        bytes: of model.safetensors.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    bytes: int

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS_FILE

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Names of the modules with scales, in order."""
        return tuple(n.removesuffix(".scales") for n in sorted(self.tensors) if n.endswith(".scales"))

    def layout(self, module: str) -> tuple[int, int]:
        """(group size, bits) that config.json states for a module, by its entry or the model's own.

        Raises BundleError if it states none, or other values than integers.
        """
        table = self.config.get("quantization")
        table = table if isinstance(table, Mapping) else {}
        entry = table.get(module)
        entry = entry if isinstance(entry, Mapping) else table
        size, bits = entry.get("group_size"), entry.get("bits")
        if type(size) is not int or bits not in (4, 8) or size < 1:
            raise _bad(self.path / CONFIG_FILE, f"quantization of {module!r:.80}: {size!r:.20}, {bits!r:.20}")
        return size, bits

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`. Raises BundleError if there is none."""
        if name not in self.tensors:
            raise _bad(self.weights_path, f"no tensor {name!r:.80}")
        with _opened(self.weights_path) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def packed(self, module: str) -> Packed:
        """A quantized weight. Raises BundleError if its parts do not fit config.json."""
        size, bits = self.layout(module)
        words, scales, biases = (self.tensor(f"{module}.{part}") for part in ("weight", "scales", "biases"))
        fits = (
            words.dtype == torch.uint32
            and words.dim() == scales.dim() == 2
            and scales.shape == biases.shape
            and len(words) == len(scales)
            and words.shape[1] * 32 == scales.shape[1] * size * bits
        )
        if not fits:
            raise _bad(
                self.weights_path,
                f"{module!r:.80}: {tuple(words.shape)} words and {tuple(scales.shape)} scales are no {bits} bits in "
                f"groups of {size}",
            )
        codes = words.view(torch.uint8)
        if bits == 4:
            codes = torch.stack((codes & 0xF, codes >> 4), -1).flatten(1)
        return Packed(codes, scales.float(), biases.float(), size, bits)


def read_mlx(path: Path) -> MlxFile:
    """Reads the header of the model in the directory `path`. Raises BundleError if it cannot be read."""
    weights, config_path = path / WEIGHTS_FILE, path / CONFIG_FILE
    for file in (weights, config_path):
        if (problem := strange_file(file)) is not None:
            raise _bad(file, problem)
    try:
        config = read_json(config_path)
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(config_path, f"not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise _bad(config_path, "no JSON object")
    with _opened(weights) as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: _described(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    return MlxFile(path, config, metadata, tensors, weights.stat().st_size)


def is_mlx(path: Path) -> bool:
    """True for a directory with quantized weights that say they are MLX's.

    Float weights of MLX are a checkpoint like any other.
    """
    if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
        return False
    try:
        file = read_mlx(path)
    except BundleError:
        return False
    return file.metadata.get("format") == "mlx" and bool(file.quantized)


def _described(name: str, view: Any) -> StoredTensor:
    shape, dtype = tuple(view.get_shape()), str(view.get_dtype())
    known = _DTYPES.get(dtype, dtype)
    kind = getattr(torch, known, None)
    size = kind.itemsize if isinstance(kind, torch.dtype) else 1
    return StoredTensor(name, known, shape, torch.Size(shape).numel() * size)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise _bad(path, f"not readable as safetensors ({error})") from error


def _bad(path: Path, problem: str) -> BundleError:
    return BundleError(f"{path}: {problem}", remedy=_REMEDY)
