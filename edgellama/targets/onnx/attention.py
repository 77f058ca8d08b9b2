"""Gate, part 1, for ONNX: comparison of the graph's attention with the model's.

Attention operators are compared with the model's sizes and their own layer's cache. A few operators turn the
mask into lengths and positions. onnx's own interpreter runs these for calls of several shapes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from edgellama.formats.onnx_model import Node, OnnxFile
from edgellama.model.llama import Llama
from edgellama.report import Check, check
from edgellama.targets.onnx.interface import (
    ATTENTION_MASK,
    INPUT_IDS,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
)

# Errors of onnx's interpreter on a graph that is not from edgellama.
_REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# (cached tokens, new tokens): a first token, a prompt, a decode step, a chunk.
_CALLS = ((0, 1), (0, 5), (7, 1), (3, 4))


def check_attention(file: OnnxFile, model: Llama, form: str) -> Check:
    """Attention equals the model's. It reads its own layer's cache and the right lengths, tables and mask."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    scale = np.float32(config.head_dim**-0.5)
    problems = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        cache = (PAST_KEY.format(layer), PAST_VALUE.format(layer))
        present = (PRESENT_KEY.format(layer), PRESENT_VALUE.format(layer))
        expected: dict[str, Any]
        if form == "ort":
            expected = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, "rotary_interleaved": 0}
            inputs = {
                3: cache[0],
                4: cache[1],
                5: "seqlens_k",
                6: "total_sequence_length",
                7: "cos",
                8: "sin",
            }
        else:
            expected = {"q_num_heads": heads, "kv_num_heads": kv_heads}
            inputs = {3: "visible", 4: cache[0], 5: cache[1]}
        node = file.by_name.get(name)
        if node is None:
            problems.append(f"{name} is missing")
            continue
        attributes = dict(node.attributes)
        if np.float32(attributes.pop("scale", 0)) != scale or attributes != expected:
            problems.append(f"{name} has attributes {dict(node.attributes)}")
        wrong_inputs = [n for i, n in inputs.items() if i >= len(node.inputs) or node.inputs[i] != n]
        wrong_inputs += [extra for extra in node.inputs[max(inputs) + 1 :] if extra]
        if wrong_inputs or node.outputs[1:3] != present:
            problems.append(
                f"{name} reads or writes other values ({', '.join(wrong_inputs[:3]) or 'its cache'})"
            )
        if form == "portable":
            problems += _rotations(file, node, heads, kv_heads)
    return check(
        "structure.attention", not problems, value=len(problems), limit=0, detail="; ".join(problems[:3])
    )


def _rotations(file: OnnxFile, attention: Node, heads: int, kv_heads: int) -> list[str]:
    makers = {output: node for node in file.nodes for output in node.outputs}
    problems = []
    for value, count in zip(attention.inputs[:2], (heads, kv_heads), strict=True):
        node = makers.get(value)
        if (
            node is None
            or node.operator != "RotaryEmbedding"
            or node.inputs[1:] != ("cos", "sin", "position_ids")
            or dict(node.attributes) != {"num_heads": count}
        ):
            problems.append(f"{value} is not rotated as the model does it")
    return problems


def check_lengths(file: OnnxFile, form: str) -> Check:
    """Values computed from the mask: lengths of form `ort`, positions and visible keys of form `portable`."""
    outputs = ["seqlens_k", "total_sequence_length"] if form == "ort" else ["visible", "position_ids"]
    problems = []
    try:
        part = _ancestors(file, outputs)
        for past, tokens in _CALLS:
            total = past + tokens
            ids, mask = np.zeros((1, tokens), np.int64), np.ones((1, total), np.int64)
            actual = part.run(outputs, {INPUT_IDS: ids, ATTENTION_MASK: mask})
            positions = np.arange(past, total)
            expected: list[Any] = (
                [np.array([total - 1]), np.array(total)]
                if form == "ort"
                else [np.arange(total) <= positions[:, None], positions[None]]
            )
            for name, actual_value, expected_value in zip(outputs, actual, expected, strict=True):
                if not np.array_equal(actual_value, expected_value):
                    problems.append(
                        f"{name} of {tokens} tokens after {past} is {np.asarray(actual_value).tolist()}"
                    )
    except _REFUSALS as error:
        problems.append(f"cannot be computed ({str(error).partition(chr(10))[0]:.100})")
    return check(
        "structure.lengths", not problems, value=len(problems), limit=0, detail="; ".join(problems[:3])
    )


def _ancestors(file: OnnxFile, outputs: list[str]) -> ReferenceEvaluator:
    """The part of the graph that computes `outputs`, as a separate model."""
    needed, nodes = set(outputs), []
    for node in reversed(file.proto.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    graph = onnx.helper.make_graph(
        nodes[::-1],
        "lengths",
        [v for v in file.proto.graph.input if v.name in (INPUT_IDS, ATTENTION_MASK)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [t for t in file.proto.graph.initializer if t.name in needed],
    )
    return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=list(file.proto.opset_import)))
