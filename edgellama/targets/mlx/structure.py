"""Gate, part 1, for MLX: exact comparison of the directory on disk with the recipe.

Every code, scale, bias and float is compared with the quantized model, bit for bit, and config.json with the
one that follows from the model. MLX computes from nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from edgellama.errors import BundleError
from edgellama.files import to_json
from edgellama.formats.mlx_model import MlxFile, read_mlx
from edgellama.model.llama import Llama, RMSNorm
from edgellama.model.quantized import Codes, QuantizedEmbedding, codes_of
from edgellama.report import Check, below, check
from edgellama.report.checks import listed
from edgellama.targets.mlx.interface import (
    DTYPES,
    WEIGHTS_FILE,
    config_data,
    has_lm_head,
    layouts,
    metadata,
)
from edgellama.targets.mlx.storage import STORAGE
from edgellama.targets.provenance import Provenance
from edgellama.targets.sizes import planned_bytes

OVERHEAD = 0.005  # share of the planned bytes; in a small model the header itself counts for more
BYTES_PER_TENSOR = 180  # of the header
BYTES_OF_METADATA = 4_000


def check_structure(path: Path, model: Llama, provenance: Provenance) -> list[Check]:
    """The checks named `structure.*`: the directory `path` against the quantized `model`."""
    file = read_mlx(path)
    expected = Expected(model, provenance)
    return [
        _files(path),
        _tensors(file, expected),
        _schemes(file, expected),
        *_codes(file, expected),
        _constants(file, expected),
        _config(file, expected),
        _metadata(file, expected),
        _bytes(file, expected),
    ]


def stored_codes(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Integer weights in the directory `path`: int8 codes [rows, columns], float32 scales [rows, groups].

    A weight with repeated row scales comes a second time, with one scale per row as in the scheme.
    """
    file = read_mlx(path)
    for name in file.quantized:
        packed = file.packed(name)
        values, scales = packed.values, packed.scales
        yield values, scales
        if scales.shape[1] > 1 and bool((scales == scales[:, :1]).all()):
            yield values, scales[:, :1].contiguous()


class Expected:
    """Content of the directory that follows from a quantized model.

    Attributes:
        codes: of the quantized modules, by name.
        floats: float32 values of the other tensors, rounded as in the file, by name.
    """

    def __init__(self, model: Llama, provenance: Provenance) -> None:
        self.model, self.provenance = model, provenance
        self.dtype = DTYPES[provenance.recipe.mlx_dtype]
        self.layouts = layouts(model.config, provenance.recipe)
        self.codes: dict[str, Codes] = {}
        self.floats: dict[str, Tensor] = {}
        with_head = has_lm_head(model.config, provenance.recipe)
        for name, module in model.named_modules():
            if name == "lm_head" and not with_head:
                continue
            if isinstance(module, RMSNorm):
                self._add_float(f"{name}.weight", module.weight)
            if not isinstance(module, (nn.Linear, nn.Embedding, QuantizedEmbedding)):
                continue
            codes = codes_of(module)
            if codes is None:
                self._add_float(f"{name}.weight", module.get_parameter("weight"))
            else:
                self.codes[name] = codes
            if isinstance(module, nn.Linear) and module.bias is not None:
                self._add_float(f"{name}.bias", module.bias)

    def _add_float(self, name: str, values: Tensor) -> None:
        self.floats[name] = values.detach()

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of every tensor of the file, by name."""
        dtype = str(self.dtype).removeprefix("torch.")
        shapes = {name: (dtype, tuple(values.shape)) for name, values in self.floats.items()}
        for name, codes in self.codes.items():
            rows, columns = codes.values.shape
            layout = self.layouts[name]
            assert layout is not None
            size, bits = layout
            shapes[f"{name}.weight"] = ("uint32", (rows, columns * bits // 32))
            shapes[f"{name}.scales"] = shapes[f"{name}.biases"] = (dtype, (rows, columns // size))
        return shapes


def _verdict(name: str, problems: list[str], count: int) -> Check:
    return check(
        name, not problems, value=count - len(problems), limit=count, detail=listed("", problems[:3])
    )


def _files(path: Path) -> Check:
    """One file of weights. Older releases of MLX Swift load every other one below the directory as well."""
    others = sorted(str(f.relative_to(path)) for f in path.rglob("*.safetensors*"))
    problems = [f"{name} is a second file of weights" for name in others if name != WEIGHTS_FILE]
    problems += [
        f"{name} makes MLX read other weights" for name in others if name.endswith(".safetensors.index.json")
    ]
    return check(
        "structure.weight_files", not problems, value=len(others), limit=1, detail=listed("", problems)
    )


def _tensors(file: MlxFile, expected: Expected) -> Check:
    wanted = expected.shapes()
    problems = [f"{name} is missing" for name in wanted if name not in file.tensors]
    problems += [f"{name} is not expected" for name in file.tensors if name not in wanted]
    for name, (dtype, shape) in wanted.items():
        tensor = file.tensors.get(name)
        if tensor is not None and (tensor.dtype, tensor.shape) != (dtype, shape):
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
    return _verdict("structure.tensors", problems, len(wanted))


def _schemes(file: MlxFile, expected: Expected) -> Check:
    """Group size and bits of every module, as config.json states them and as the file's shapes have them."""
    problems = []
    for name, layout in expected.layouts.items():
        if layout is None:
            if name in file.quantized:
                problems.append(f"{name}: expected floats, found integers")
            continue
        wanted = f"int{layout[1]} g{layout[0]}"
        if name not in file.quantized:
            problems.append(f"{name}: expected {wanted}, found floats")
            continue
        try:
            size, bits = file.layout(name)
            if (size, bits) != layout:
                problems.append(f"{name}: expected {wanted}, config.json says int{bits} g{size}")
        except BundleError as error:
            problems.append(f"{name}: {error.message}")
    return _verdict("structure.schemes", problems, len(expected.layouts))


def _codes(file: MlxFile, expected: Expected) -> list[Check]:
    """Codes and scales are equal, bit for bit, and each bias is the one that makes a code of 0 a weight of 0."""
    different: dict[str, list[str]] = {"codes": [], "scales": [], "biases": []}
    for name, codes in expected.codes.items():
        try:
            packed = file.packed(name)
        except BundleError:
            for names in different.values():
                names.append(name)
            continue
        scales = codes.scales.float()
        scales = scales.repeat_interleave(max(1, packed.scales.shape[1] // scales.shape[1]), 1)
        zero = -float(1 << (packed.bits - 1))
        if not torch.equal(packed.values, codes.values):
            different["codes"].append(name)
        if not torch.equal(packed.scales, scales):
            different["scales"].append(name)
        if not torch.equal(packed.biases, zero * packed.scales):
            different["biases"].append(name)
    return [
        check(
            f"structure.{part}",
            not names,
            value=len(names),
            limit=0,
            detail=f"differ in {', '.join(names[:3])}" if names else "",
        )
        for part, names in different.items()
    ]


def _constants(file: MlxFile, expected: Expected) -> Check:
    """Norms, biases of linears and float weights are the model's, in the dtype of the file."""
    problems = []
    for name, values in expected.floats.items():
        try:
            if not torch.equal(file.tensor(name), values.to(expected.dtype)):
                problems.append(f"{name} is altered")
        except BundleError:
            problems.append(f"{name} is missing")
    return _verdict("structure.constants", problems, len(expected.floats))


def _config(file: MlxFile, expected: Expected) -> Check:
    """config.json has the values that follow from the model, and no further ones."""
    wanted = config_data(expected.model.config, expected.provenance.recipe)
    names = sorted({*wanted, *file.config})
    problems = []
    for name in names:
        if name not in file.config:
            problems.append(f"{name} is missing")
        elif name not in wanted:
            problems.append(f"{name} is not expected")
        elif to_json(file.config[name]) != to_json(wanted[name]):
            problems.append(f"{name} is {str(file.config[name])[:60]}, expected {str(wanted[name])[:60]}")
    return _verdict("structure.config", problems, len(names))


def _metadata(file: MlxFile, expected: Expected) -> Check:
    wanted = metadata(expected.model, expected.provenance)
    problems = [
        f"{key} is {file.metadata.get(key)!r:.40}, expected {value!r:.40}"
        for key, value in wanted.items()
        if file.metadata.get(key) != value
    ]
    problems += [f"{key} is not expected" for key in file.metadata if key not in wanted]
    return _verdict("structure.metadata", problems, len(wanted))


def _bytes(file: MlxFile, expected: Expected) -> Check:
    model, recipe = expected.model, expected.provenance.recipe
    planned = planned_bytes(model.config, recipe, STORAGE, model.context_length)
    header = BYTES_PER_TENSOR * len(file.tensors) + BYTES_OF_METADATA
    limit = max(int(planned * (1 + OVERHEAD)), planned + header)
    return below("structure.bytes", file.bytes, limit, detail=f"{planned} planned for the weights")
