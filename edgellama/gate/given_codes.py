"""Given codes against the checkpoint's bytes, decoded a second time by rules of their own.

The reader of a packing makes the reference as well as the quantized model, so a fault in it shows in neither
parity nor quality. This pass takes the stored tensors apart byte by byte, by the documents of each packing,
and uses nothing of the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from edgellama.checkpoints.given import Given
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, codes_of
from edgellama.report import Check, check
from edgellama.report.checks import listed

Array = npt.NDArray[np.int64]
Decoded = tuple[
    Array, npt.NDArray[np.float32]
]  # codes and scales, one of each for every weight [rows, columns]
_AWQ_NIBBLE = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # of a column in its word of eight
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"


def check_given(
    model: Llama, given: Given, taken: list[str], reference: Callable[[str], Tensor]
) -> list[Check]:
    """Checks that modules have the codes and scales of the checkpoint, and that the reference has their values.

    Args:
        model: the quantized model.
        given: codes of the checkpoint. Only its stored tensors are used.
        taken: modules whose codes are the checkpoint's.
        reference: function from a tensor's name to the reference model's weight.
    """
    codes_differ, scales_differ, values_differ = [], [], []
    for name in taken:
        codes = codes_of(model.get_submodule(name))
        tied = name == _HEAD and model.config.tie_word_embeddings
        values, scales = decoded(name, given, model.config)
        if codes is None or not np.array_equal(codes.values.numpy(), values):
            codes_differ.append(name)
        if codes is None or not np.array_equal(_spread(codes), scales):
            scales_differ.append(name)
        weight = reference(f"{_EMBEDDING if tied else name}.weight")
        if not np.array_equal(weight.numpy(), values.astype(np.float32) * scales):
            values_differ.append(name)
    return [
        check(f"weights.{kind}", not names, value=len(names), limit=0, detail=listed(words, names))
        for kind, names, words in (
            ("codes", codes_differ, "not the checkpoint's codes:"),
            ("scales", scales_differ, "not the checkpoint's scales:"),
            ("reference", values_differ, "the reference has other values than the checkpoint's codes:"),
        )
    ]


def _spread(codes: Codes) -> npt.NDArray[np.float32]:
    """Scale of every weight, [rows, columns]."""
    width = codes.values.shape[1] // codes.scales.shape[1]
    spread: npt.NDArray[np.float32] = np.repeat(codes.scales.numpy(), width, axis=1)
    return spread


def decoded(module: str, given: Given, config: LlamaConfig) -> Decoded:
    """Codes and scales of every weight of a module, from the tensors that the checkpoint stores."""
    parts, bits = given.raw(module), given.schemes[module].bits
    if given.origin.layout in ("gptq", "gptq_v2"):
        return _gptq(parts, bits, plus=int(given.origin.layout == "gptq"))
    if given.origin.layout == "awq":
        return _awq(parts)
    if given.origin.layout == "pack-quantized":
        return _packed(parts, bits)
    return _blocks(module, parts, config)


def _numbers(words: Tensor, bits: int) -> Array:
    """Numbers of int32 words [rows, n], along the last axis, from their bytes: the lowest bits come first."""
    stored = np.ascontiguousarray(words.numpy().astype("<i4")).view(np.uint8).astype(np.int64)
    if bits == 8:
        return stored
    numbers = np.empty((stored.shape[0], 2 * stored.shape[1]), np.int64)
    numbers[:, 0::2], numbers[:, 1::2] = stored % 16, stored // 16
    return numbers


def _gptq(parts: Mapping[str, Tensor], bits: int, *, plus: int) -> Decoded:
    numbers = _numbers(parts["qweight"].t(), bits)  # [rows, columns]
    zeros = _numbers(parts["qzeros"], bits) + plus  # [groups, rows]
    scales = parts["scales"].float().numpy()
    columns = numbers.shape[1]
    group = np.arange(columns) * len(scales) // columns
    if "g_idx" in parts:
        group = parts["g_idx"].numpy().astype(np.int64)
    return numbers - zeros[group].T[: len(numbers)], scales[group].T


def _awq(parts: Mapping[str, Tensor]) -> Decoded:
    scales = parts["scales"].float().numpy()  # [groups, rows]
    stored, zeros = _numbers(parts["qweight"], 4), _numbers(parts["qzeros"], 4)
    columns, rows = stored.shape
    place = np.array([row // 8 * 8 + _AWQ_NIBBLE[row % 8] for row in range(rows)])
    group = np.arange(columns) * len(scales) // columns
    return (stored[:, place] - zeros[:, place][group]).T, scales[group].T


def _packed(parts: Mapping[str, Tensor], bits: int) -> Decoded:
    columns = int(parts["weight_shape"][1])
    numbers = _numbers(parts["weight_packed"], bits)[:, :columns]
    scales = parts["weight_scale"].float().numpy().reshape(len(numbers), -1)
    group = np.arange(columns) * scales.shape[1] // columns
    return numbers - 2 ** (bits - 1), scales[:, group]


def _blocks(module: str, parts: Mapping[str, Tensor], config: LlamaConfig) -> Decoded:
    ((kind, stored),) = parts.items()
    codes = ("qs", "u1", (16,)) if kind == "Q4_0" else ("qs", "i1", (32,))
    blocks = np.ascontiguousarray(stored.numpy()).view(np.dtype([("d", "<f2"), codes]))
    stored_codes = blocks["qs"].astype(np.int64)
    if kind == "Q4_0":
        stored_codes = np.concatenate((stored_codes % 16, stored_codes // 16), axis=-1) - 8
    rows = len(blocks)
    values = stored_codes.reshape(rows, -1)
    scales = np.repeat(blocks["d"].astype(np.float32), 32, axis=1)
    if module.endswith(("q_proj", "k_proj")):
        half = config.head_dim // 2
        # Row i of a head's first half lies at 2 i in llama.cpp's order, row i of its second half at 2 i + 1.
        head, inner = np.divmod(np.arange(rows), config.head_dim)
        place = head * config.head_dim + np.where(inner < half, 2 * inner, 2 * (inner - half) + 1)
        values, scales = values[place], scales[place]
    return values, scales


def taken_modules(model: Llama, given: Given) -> list[str]:
    """Modules of the model whose scheme is that of the checkpoint's codes."""
    names = []
    for name, own in given.schemes.items():
        try:
            codes = codes_of(model.get_submodule(name))
        except AttributeError:  # a layer that a cut does not have
            continue
        if codes is not None and (codes.scheme.bits, codes.scheme.group_size) == (own.bits, own.group_size):
            names.append(name)
    return names
