"""Structure checks of a GGUF file: every tensor and key against the quantized model, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgellama.errors import CheckpointError
from edgellama.formats.gguf import GgufFile, GgufTensor, read_gguf
from edgellama.formats.gguf_blocks import BLOCK, BYTES, unpack
from edgellama.formats.gguf_names import is_rotated, permute, unpermute
from edgellama.model.llama import Llama
from edgellama.report import Check, below, check
from edgellama.targets.gguf.interface import (
    TOKENIZER,
    PlannedTensor,
    key_problems,
    model_keys,
    scale_halves,
    tensors,
)
from edgellama.targets.gguf.storage import STORAGE
from edgellama.targets.provenance import Provenance
from edgellama.targets.sizes import planned_bytes

PADDING = 32  # bytes before a tensor, at most
FACTORS = 2  # bytes of RoPE's factors for each of head_dim
_ARCHITECTURE = {"general.architecture": "llama"}


def check_structure(path: Path, model: Llama, provenance: Provenance) -> list[Check]:
    """The checks named `structure.*` of the file at `path` against the quantized `model`."""
    try:
        file = read_gguf(path)
    except CheckpointError as error:
        return [check("structure.valid", False, detail=error.message)]
    planned = list(tensors(model))
    return [
        check("structure.valid", True, detail=f"{len(file.tensors)} tensors"),
        _schemes(file, planned),
        _codes(file, [t for t in planned if t.codes is not None], model.config.head_dim),
        _constants(file, [t for t in planned if t.codes is None], model.config.head_dim),
        _metadata(file, model, provenance),
        _bytes(file, model, provenance),
    ]


def stored_codes(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Quantized weights: int8 codes [rows, columns] and float32 scales [rows, groups], rows as in the model.

    A weight whose neighbouring blocks share their scales comes again with a scale for each longer group.
    """
    file = read_gguf(path)
    head_dim = int(file.metadata["llama.attention.key_length"])
    for name, tensor in file.tensors.items():
        if tensor.dtype not in BYTES:
            continue
        values, scales = _unpacked(file, tensor)
        if ".attn_q." in name or ".attn_k." in name:
            values, scales = unpermute(values, head_dim), unpermute(scales, head_dim)
        yield values, scales
        for count in _divisors(scales.shape[1]):
            groups = scales.reshape(len(scales), scales.shape[1] // count, count)
            if bool((groups == groups[..., :1]).all()):
                yield values, groups[..., 0].contiguous()


def _divisors(count: int) -> Iterator[int]:
    return (n for n in range(2, count + 1) if count % n == 0)


def _unpacked(file: GgufFile, tensor: GgufTensor) -> tuple[Tensor, Tensor]:
    raw = file.parts[tensor.part][tensor.start : tensor.start + tensor.nbytes]
    values, scales = unpack(tensor.dtype, raw, tensor.shape)
    return torch.from_numpy(values), torch.from_numpy(scales.astype(np.float32))


def _verdict(name: str, problems: list[str], count: int) -> Check:
    return check(name, not problems, value=count - len(problems), limit=count, detail="; ".join(problems[:3]))


def _schemes(file: GgufFile, planned: list[PlannedTensor]) -> Check:
    """The file has the model's tensors with their types and shapes, and no others."""
    problems = []
    for tensor in planned:
        stored = file.tensors.get(tensor.name)
        if stored is None:
            problems.append(f"{tensor.name} is missing")
        elif (stored.dtype, stored.shape) != (tensor.kind, tensor.shape):
            problems.append(
                f"{tensor.name}: expected {tensor.kind} {list(tensor.shape)}, found {stored.dtype} "
                f"{list(stored.shape)}"
            )
    names = {tensor.name for tensor in planned}
    problems += [f"{name} is not expected" for name in file.tensors if name not in names]
    return _verdict("structure.schemes", problems, len(planned))


def _codes(file: GgufFile, planned: list[PlannedTensor], head_dim: int) -> Check:
    """Codes and scales are equal, bit for bit."""
    different = [words for tensor in planned if (words := _code_difference(file, tensor, head_dim))]
    return check(
        "structure.codes",
        not different,
        value=len(different),
        limit=0,
        detail="; ".join(different[:3]),
    )


def _code_difference(file: GgufFile, planned: PlannedTensor, head_dim: int) -> str | None:
    """Words about a tensor whose codes or scales differ, with the usual mistake if it is one."""
    stored = file.tensors.get(planned.name)
    if stored is None or (stored.dtype, stored.shape) != (planned.kind, planned.shape):
        return f"{planned.name} has another type"
    assert planned.codes is not None
    values, scales = _unpacked(file, stored)
    halves, _ = scale_halves(planned.codes.scales, planned.shape[1], BLOCK)
    wanted = planned.codes.values, torch.from_numpy(halves.astype(np.float32))
    same = tuple(torch.equal(a, b) for a, b in zip((values, scales), wanted, strict=True))
    if all(same):
        return None
    parts = [part for part, equal in zip(("codes", "scales"), same, strict=True) if not equal]
    unpermuted = is_rotated(planned.source) and all(
        torch.equal(permute(a, head_dim), b)
        for a, b, s in zip((values, scales), wanted, same, strict=True)
        if not s
    )
    swapped = planned.kind == "Q4_0" and not same[0] and torch.equal(_nibbles_swapped(values), wanted[0])
    reason = (
        " (rows in Hugging Face's order)" if unpermuted else " (halves of bytes exchanged)" if swapped else ""
    )
    rows = (values != wanted[0]).any(1) | (scales != wanted[1]).any(1)
    return f"{planned.name}: {' and '.join(parts)} differ in {int(rows.sum())} of {len(rows)} rows{reason}"


def _nibbles_swapped(values: Tensor) -> Tensor:
    halves = values.unflatten(-1, (-1, 2, BLOCK // 2))
    swapped: Tensor = halves.flip(-2).flatten(-3)
    return swapped


def _constants(file: GgufFile, planned: list[PlannedTensor], head_dim: int) -> Check:
    """Norms, biases, float linears and the factors of RoPE are equal, bit for bit."""
    problems = []
    for tensor in planned:
        assert tensor.floats is not None
        stored = file.tensors.get(tensor.name)
        if stored is None or stored.dtype != "F32" or stored.shape != tensor.shape:
            problems.append(f"{tensor.name} is missing or of another type")
        elif not torch.equal(values := file.read(tensor.name), tensor.floats):
            unpermuted = is_rotated(tensor.source) and torch.equal(permute(values, head_dim), tensor.floats)
            problems.append(
                f"{tensor.name} is altered{' (rows in Hugging Face’s order)' if unpermuted else ''}"
            )
    return _verdict("structure.constants", problems, len(planned))


def _metadata(file: GgufFile, model: Llama, provenance: Provenance) -> Check:
    """The file has the model's keys and no others but the tokenizer's, which are compared on their own."""
    expected = {**_ARCHITECTURE, **model_keys(model, provenance)}
    own = {key: value for key, value in file.metadata.items() if not key.startswith(TOKENIZER)}
    problems = key_problems(own, expected)
    return _verdict("structure.metadata", problems, len(expected))


def _bytes(file: GgufFile, model: Llama, provenance: Provenance) -> Check:
    """The weights have the planned bytes. The header before them holds the keys, which other checks compare."""
    planned = planned_bytes(model.config, provenance.recipe, STORAGE, model.context_length)
    weights = planned - STORAGE.vocabulary_bytes(model.config.vocab_size)
    header = min(tensor.start for tensor in file.tensors.values())
    limit = header + weights + PADDING * (len(file.tensors) + 1) + FACTORS * model.config.head_dim
    detail = f"{planned} planned; {header} bytes of keys"
    return below("structure.bytes", file.path.stat().st_size, limit, detail=detail)
