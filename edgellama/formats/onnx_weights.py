"""Weights that the operators of an ONNX model multiply or look up, with scheme and layout.

Works on models of other tools too (`inspect`). The gate finds the weight of a module by the node names that
the export assigns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgellama.errors import BundleError
from edgellama.formats.onnx_model import Node, OnnxFile

# Name of a node -> modules whose rows its weight stacks.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_BLOCKS = ("MatMulNBits", "GatherBlockQuantized")


@dataclass(frozen=True)
class StoredWeight:
    """Weight of one node. `values`, `scales` and `zero_points` are names of tensors.

    Attributes:
        group_size: Number of weights that share a scale along a row; None without scales.
        transposed: True if stored as [in, out].
        axis: Dimension of `values` that scales of one dimension belong to; None for the operator's default.
    """

    node: Node
    bits: int
    group_size: int | None
    values: str
    scales: str | None = None
    zero_points: str | None = None
    transposed: bool = False
    axis: int | None = None

    @property
    def scheme(self) -> str:
        """Scheme such as `int4 g32`, `int8 g64` or `float32`."""
        return f"int{self.bits} g{self.group_size}" if self.scales else f"float{self.bits}"

    def codes(self, file: OnnxFile) -> tuple[np.ndarray, np.ndarray]:
        """(int8 codes [rows, columns], scales [rows, blocks]) of a quantized weight in any layout.

        A scale that several rows or blocks share is repeated. Raises BundleError for scales of other shapes.
        """
        assert self.scales is not None
        values, scales = file.array(self.values), file.array(self.scales)
        if self.node.operator not in _BLOCKS:
            return values.T, self._row_scales(values.T, scales)
        packed = values.reshape(len(values), -1)
        if self.bits == 8:
            return (packed ^ np.uint8(128)).view(np.int8), scales
        codes = np.empty((*packed.shape, 2), np.int8)
        np.bitwise_and(packed, 0xF, out=codes[..., 0], casting="unsafe")
        np.right_shift(packed, 4, out=codes[..., 1], casting="unsafe")
        codes -= 8
        return codes.reshape(len(packed), -1), scales

    def _row_scales(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Scales [rows, blocks] of a weight that is stored as [columns, rows]."""
        if scales.size == 1:
            return np.full((len(codes), 1), scales.item(), scales.dtype)
        # Other tools write one dimension: DequantizeLinear with `axis`, which is 1 unless the node has it.
        axis = 1 if self.axis is None else self.axis % 2
        if scales.ndim == 1 and len(scales) == codes.shape[1 - axis]:
            return scales[:, None] if axis == 1 else np.tile(scales, (len(codes), 1))
        if scales.ndim != 2:
            raise BundleError(
                f"{self.node.name}: scales of shape {scales.shape} for codes of shape {codes.shape}",
                remedy="Export it again, or copy it again as a whole, weights included.",
            )
        # A look-up has scales [rows, 1], one per row. A transposed weight has scales [blocks, rows].
        return scales if scales.shape[1] == 1 else scales.T

    def floats(self, file: OnnxFile) -> np.ndarray:
        """float32 [rows, columns] of a weight that is not quantized."""
        values = file.array(self.values)
        return values.T if self.transposed else values

    def nbytes(self, file: OnnxFile) -> int:
        """Bytes of codes, scales and zero points."""
        names = (self.values, self.scales, self.zero_points)
        return sum(file.place(name)[2] for name in names if name in file.tensors)


def weights_of(file: OnnxFile) -> dict[str, StoredWeight]:
    """All weights with two or more dimensions, by the name of the node that reads them."""
    makers = {output: node for node in file.nodes for output in node.outputs}
    weights = {}
    for node in file.nodes:
        weight = _weight(file, node, makers)
        if weight is not None:
            weights[node.name] = weight
    return weights


def find_weight(
    weights: Mapping[str, StoredWeight], name: str
) -> tuple[StoredWeight, tuple[str, ...]] | None:
    """(weight of module `name`, modules whose rows it holds in order), or None without such a weight."""
    for node in (name, f"{name}.matmul", f"{name}.columns"):
        if node in weights:
            return weights[node], (name,)
    prefix, _, leaf = name.rpartition(".")
    for joined, members in JOINED.items():
        if leaf in members and f"{prefix}.{joined}" in weights:
            return weights[f"{prefix}.{joined}"], tuple(f"{prefix}.{member}" for member in members)
    return None


def _weight(file: OnnxFile, node: Node, makers: Mapping[str, Node]) -> StoredWeight | None:
    inputs = [*node.inputs, "", "", ""]
    if node.operator in _BLOCKS and node.domain:
        first = 1 if node.operator == "MatMulNBits" else 0
        values, scales, zeros = inputs[first], inputs[2], inputs[3]
        bits = node.attributes.get("bits", 4)
        group = node.attributes.get("block_size", 128)
        return StoredWeight(node, bits, group, values, scales, zeros or None)
    if node.operator in ("MatMul", "FusedMatMul"):
        source = makers.get(inputs[1])
        if source is not None and source.operator == "DequantizeLinear":
            values, scales, zeros = [*source.inputs, ""][:3]
            bits = file.bits(values)
            block = source.attributes.get("block_size") or file.tensor(values).dims[0]
            axis = source.attributes.get("axis")
            return StoredWeight(node, bits, block, values, scales, zeros or None, transposed=True, axis=axis)
        if len(_dims(file, inputs[1])) == 2 and all(_dims(file, inputs[1])):  # a size of 0: an absent adapter
            transposed = not node.attributes.get("transB", 0)
            return StoredWeight(node, file.bits(inputs[1]), None, inputs[1], transposed=transposed)
    if node.operator == "Gather" and len(_dims(file, inputs[0])) == 2:
        bits, transposed = file.bits(inputs[0]), node.attributes.get("axis", 0) == 1
        scale = file.by_name.get(node.name.removesuffix(".columns") + ".scale")
        if bits == 8 and scale is not None:
            columns = file.tensor(inputs[0]).dims[0]
            return StoredWeight(node, bits, columns, inputs[0], scale.inputs[0], transposed=True)
        if node.name.endswith(".scale"):
            return None
        return StoredWeight(node, bits, None, inputs[0], transposed=transposed)
    return None


def _dims(file: OnnxFile, name: str) -> tuple[int, ...]:
    return tuple(file.tensors[name].dims) if name in file.tensors else ()
