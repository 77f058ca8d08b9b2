"""Layouts of packed codes, turned into codes int8 [rows, columns] and scales float32 [rows, groups].

Rows are outputs and columns are inputs, as in Hugging Face's weights. Each layout is written down from its own
package's source: AutoGPTQ and GPTQModel (`gptq`), AutoAWQ (`awq`), compressed-tensors (`pack-quantized`).
Stored numbers are unsigned, and the middle of their range stands for 0: 8 with 4 bits, 128 with 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgellama.errors import CheckpointError

_WORD = 32  # bits
# Position in a word of AWQ's eight columns: column 2 is stored fifth (autoawq/utils/packing_utils.py).
AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
_ASYMMETRIC = "Take a checkpoint that was quantized with symmetric=True (sym), or the full-precision one."

Parts = Mapping[str, Tensor]
Unpacked = tuple[Tensor, Tensor]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers in int32 words [..., n] as uint8 [..., n * 32 / bits], lowest bits first."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    numbers = (words.to(torch.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.reshape(*words.shape[:-1], -1).to(torch.uint8)


def centred(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers as int8 codes around 0."""
    return (numbers.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def from_gptq(module: str, parts: Parts, bits: int, stored_middle: int) -> Unpacked:
    """Codes of `qweight` [columns * bits / 32, rows], `qzeros`, `scales` [groups, rows] and perhaps `g_idx`.

    stored_middle: zero point in the file that means the middle: one less than it in `gptq`, equal in `gptq_v2`.

    Raises CheckpointError for other zero points, and for groups of columns that do not lie together.
    """
    _check_order(module, parts.get("g_idx"), parts["scales"].shape[0])
    _check_zeros(module, unpack_words(parts["qzeros"], bits), stored_middle)
    numbers = unpack_words(parts["qweight"].t(), bits)
    return centred(numbers, bits).contiguous(), parts["scales"].t().float().contiguous()


def from_awq(module: str, parts: Parts) -> Unpacked:
    """Codes of `qweight` [columns, rows / 8], `qzeros` and `scales` [groups, rows], with 4 bits.

    Raises CheckpointError for zero points other than 8.
    """
    numbers, zeros = (unpack_words(parts[name], 4) for name in ("qweight", "qzeros"))
    _check_zeros(module, zeros, 8)
    columns, rows = numbers.shape
    ordered = numbers.reshape(columns, rows // 8, 8)[..., list(AWQ_POSITIONS)].reshape(columns, rows)
    return centred(ordered.t(), 4).contiguous(), parts["scales"].t().float().contiguous()


def from_packed(module: str, parts: Parts, bits: int, shape: tuple[int, ...]) -> Unpacked:
    """Codes of compressed-tensors: `weight_packed` [rows, columns * bits / 32], `weight_scale`, `weight_shape`.

    shape: [rows, columns] that the config leads to expect.
    """
    stated = tuple(int(size) for size in parts["weight_shape"])
    if stated != shape:
        raise CheckpointError(
            f"{module}: weight_shape is {list(stated)}, expected {list(shape)}",
            remedy="The file is damaged, or of another model; download it again.",
        )
    numbers = unpack_words(parts["weight_packed"], bits)[:, : shape[1]]
    scales = parts["weight_scale"].float()
    return centred(numbers, bits).contiguous(), scales.reshape(len(numbers), -1).contiguous()


def _check_zeros(module: str, zeros: Tensor, middle: int) -> None:
    other = zeros[zeros != middle]
    if other.numel():
        raise CheckpointError(
            f"{module}: {other.numel()} of {zeros.numel()} zero points are not the middle of the range: one is stored "
            f"as {int(other[0])}, the middle as {middle}",
            remedy=_ASYMMETRIC
            + " If all are off by one, quantization_config names the wrong checkpoint_format (gptq or gptq_v2).",
        )


def _check_order(module: str, group_of_column: Tensor | None, groups: int) -> None:
    """Raises CheckpointError unless the groups are runs of columns of one length."""
    if group_of_column is None or not group_of_column.numel():
        return
    expected = torch.arange(len(group_of_column)) // -(-len(group_of_column) // groups)
    if not torch.equal(group_of_column.long(), expected):
        raise CheckpointError(
            f"{module}: its groups are no runs of columns (g_idx), because it was quantized in act order (desc_act)",
            remedy="No format of a target has groups of scattered columns, and reordering the columns of one module "
            "would change the modules before it. Take a checkpoint with desc_act false, or with static groups.",
        )
