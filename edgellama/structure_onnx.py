"""Gate, part 1, for ONNX: is the model what the recipe says? Exact questions to the bytes on disk.

Every code, scale, norm, bias and RoPE table is compared with the quantized model bit for bit, attention operators
with its sizes; and what turns the mask into lengths and positions is run, since that part is small enough.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgellama.errors import BundleError
from edgellama.export.codes import Codes
from edgellama.export.quantize import codes_of, planned_bytes
from edgellama.identity import Identity
from edgellama.llama import Llama, RMSNorm
from edgellama.onnx_file import Node, OnnxFile, read_onnx
from edgellama.onnx_io import (
    ACCURACY_LEVEL,
    ATTENTION_MASK,
    CONTEXT_LENGTH,
    FORM,
    GENAI_FILE,
    INPUT_IDS,
    MANIFEST_SHA256,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    SOURCE_SHA256,
    VOCAB_SIZE,
    block_size,
)
from edgellama.onnx_weights import StoredWeight, find_weight, weights_of
from edgellama.report import Check, below, check
from edgellama.targets import TARGETS

OVERHEAD = 0.03  # of the planned bytes; where weights are few, the graph itself counts for more
BYTES_PER_NODE = 800  # its names and attributes, small tensors, and the padding of large ones to a page

# What onnx's interpreter says of a graph that is not ours.
_REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# (operators of a layer and how many), by form; norms, linears and glue are judged by name and by parity.
PER_LAYER = {
    "ort": {"com.microsoft::GroupQueryAttention": 1, "com.microsoft::SkipSimplifiedLayerNormalization": 2},
    "portable": {"Attention": 1, "RotaryEmbedding": 2},
}


def check_structure(path: Path, model: Llama, identity: Identity) -> list[Check]:
    """The checks named `structure.*`: the model in the directory `path` against the quantized `model`."""
    file = read_onnx(path)
    form = identity.recipe.onnx_form
    weights = weights_of(file)
    return [
        _valid(file),
        _schemes(weights, model, form),
        _codes(file, weights, model),
        _constants(file, model),
        _operators(file, model, form),
        _attention(file, model, form),
        _lengths(file, form),
        _metadata(file, model, identity),
        _clients(path, file, model),
        _bytes(file, model, identity),
    ]


def _verdict(name: str, problems: list[str], count: int | None = None) -> Check:
    value = len(problems) if count is None else count - len(problems)
    return check(
        name, not problems, value=value, limit=0 if count is None else count, detail="; ".join(problems[:3])
    )


def _valid(file: OnnxFile) -> Check:
    """By onnx's own checker."""
    try:
        onnx.checker.check_model(str(file.path))
    except onnx.checker.ValidationError as error:
        return check("structure.valid", False, detail=str(error).partition("\n")[0])
    return check("structure.valid", True, detail=", ".join(f"{k} {v}" for k, v in file.opsets.items()))


def _modules(model: Llama) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name == "model.embed_tokens" or isinstance(module, nn.Linear):
            yield name, module


def _schemes(weights: dict[str, StoredWeight], model: Llama, form: str) -> Check:
    """Each module's scheme, and no zero points; linears at the accuracy level that the numerics follow."""
    problems, count = [], 0
    for name, module in _modules(model):
        count += 1
        found = find_weight(weights, name)
        codes = codes_of(module)
        want, got = _scheme(codes, lookup=name == "model.embed_tokens", form=form), "nothing"
        if found is not None:
            weight, _ = found
            got = weight.scheme + (" with zero points" if weight.zero_points else "")
            if weight.node.operator == "MatMulNBits":
                level = weight.node.attributes.get("accuracy_level", 0)
                got += "" if level == ACCURACY_LEVEL else f" at accuracy level {level}"
        if want != got:
            problems.append(f"{name}: expected {want}, found {got}")
    return _verdict("structure.schemes", problems, count)


def _scheme(codes: Codes | None, *, lookup: bool, form: str) -> str:
    if codes is None:
        return "float32"
    columns = codes.values.shape[1]
    group = columns if lookup and form == "portable" else block_size(codes.scheme, columns)
    return f"int{codes.scheme.bits} g{group}"


def _codes(file: OnnxFile, weights: dict[str, StoredWeight], model: Llama) -> Check:
    """Equal bit for bit; a tensor that several modules share is read once for each."""
    rows = {name: _rows(module) for name, module in _modules(model)}
    different = []
    for name, module in _modules(model):
        found = find_weight(weights, name)
        try:
            if found is None or not _same(file, *found, name, module, rows):
                different.append(name)
        except (BundleError, ValueError, IndexError, KeyError):
            different.append(name)
    detail = f"differ in {', '.join(different[:3])}" if different else ""
    return check("structure.codes", not different, value=len(different), limit=0, detail=detail)


def _rows(module: nn.Module) -> int:
    codes = codes_of(module)
    return len(codes.values) if codes is not None else len(module.get_parameter("weight"))


def _same(
    file: OnnxFile,
    weight: StoredWeight,
    members: tuple[str, ...],
    name: str,
    module: nn.Module,
    rows: dict[str, int],
) -> bool:
    first = sum(rows[member] for member in members[: members.index(name)])
    part = slice(first, first + rows[name])
    codes = codes_of(module)
    if codes is None:
        return weight.scales is None and np.array_equal(
            weight.floats(file)[part], module.get_parameter("weight").detach().numpy()
        )
    if weight.scales is None:
        return False
    values, scales = (array[part] for array in weight.codes(file))
    want = codes.scales.float().numpy()
    return np.array_equal(values, codes.values.numpy()) and np.array_equal(
        scales, np.repeat(want, scales.shape[1] // want.shape[1], axis=1)
    )


def _constants(file: OnnxFile, model: Llama) -> Check:
    """Norms with their epsilon, biases and RoPE tables."""
    wrong, count = [], 0
    for name, values, epsilon in _expected_constants(model):
        count += 1
        node = file.by_name.get(name.removesuffix(".weight"))
        stored = np.float32(node.attributes.get("epsilon", 0)) if node else None
        array = _array(file, name)
        same = array is not None and np.array_equal(array, values)
        if not same or (epsilon is not None and stored != np.float32(epsilon)):
            wrong.append(name)
    for name, module in _modules(model):
        bias = getattr(module, "bias", None)
        if bias is not None:
            count += 1
            if not _has_bias(file, name, bias.detach().numpy()):
                wrong.append(f"{name}.bias")
    return _verdict("structure.constants", [f"{n} is missing or altered" for n in wrong], count)


def _expected_constants(model: Llama) -> Iterator[tuple[str, np.ndarray, float | None]]:
    yield "cos", model.model.cos[:, 0].numpy(), None
    yield "sin", model.model.sin[:, 0].numpy(), None
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            yield f"{name}.weight", module.weight.detach().numpy(), module.eps


def _array(file: OnnxFile, name: str) -> np.ndarray | None:
    try:
        return file.array(name)
    except BundleError:
        return None


def _has_bias(file: OnnxFile, name: str, values: np.ndarray) -> bool:
    """A bias of its own, or its part of the one that joined modules share."""
    own = _array(file, f"{name}.bias")
    if own is not None:
        return np.array_equal(own, values)
    prefix = name.rpartition(".")[0]
    joined = (_array(file, f"{prefix}.{joined}.bias") for joined in ("qkv_proj", "gate_up_proj"))
    return any(array is not None and values.tobytes() in array.tobytes() for array in joined)


def _operators(file: OnnxFile, model: Llama, form: str) -> Check:
    problems = []
    for operator, times in PER_LAYER[form].items():
        want, got = times * model.config.num_hidden_layers, file.operators[operator]
        if got != want:
            problems.append(f"{operator} called {got} times, expected {want}")
    domains = Counter(node.domain or "ai.onnx" for node in file.nodes)
    allowed = {"ai.onnx"} | ({"com.microsoft"} if form == "ort" else set())
    problems += [f"{count} operators of domain {d}" for d, count in domains.items() if d not in allowed]
    return check("structure.operators", not problems, value=len(file.nodes), detail="; ".join(problems[:3]))


def _attention(file: OnnxFile, model: Llama, form: str) -> Check:
    """Attention as the model has it, on its own layer's cache, with the lengths, tables and mask that it needs."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    scale = np.float32(config.head_dim**-0.5)
    problems = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        cache = (PAST_KEY.format(layer), PAST_VALUE.format(layer))
        present = (PRESENT_KEY.format(layer), PRESENT_VALUE.format(layer))
        want: dict[str, Any]
        if form == "ort":
            want = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, "rotary_interleaved": 0}
            inputs = {
                3: cache[0],
                4: cache[1],
                5: "seqlens_k",
                6: "total_sequence_length",
                7: "cos",
                8: "sin",
            }
        else:
            want = {"q_num_heads": heads, "kv_num_heads": kv_heads}
            inputs = {3: "visible", 4: cache[0], 5: cache[1]}
        node = file.by_name.get(name)
        if node is None:
            problems.append(f"{name} is missing")
            continue
        found = dict(node.attributes)
        if np.float32(found.pop("scale", 0)) != scale or found != want:
            problems.append(f"{name} has attributes {dict(node.attributes)}")
        wrong = [n for i, n in inputs.items() if i >= len(node.inputs) or node.inputs[i] != n]
        wrong += [extra for extra in node.inputs[max(inputs) + 1 :] if extra]
        if wrong or node.outputs[1:3] != present:
            problems.append(f"{name} reads or writes other values ({', '.join(wrong[:3]) or 'its cache'})")
        if form == "portable":
            problems += _rotations(file, node, heads, kv_heads)
    return _verdict("structure.attention", problems)


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


def _lengths(file: OnnxFile, form: str) -> Check:
    """What is made of the mask, for a first token, a prompt, a step and a chunk: run in onnx's own interpreter."""
    outputs = ["seqlens_k", "total_sequence_length"] if form == "ort" else ["visible", "position_ids"]
    problems = []
    try:
        part = _ancestors(file, outputs)
        for past, tokens in ((0, 1), (0, 5), (7, 1), (3, 4)):
            total = past + tokens
            ids, mask = np.zeros((1, tokens), np.int64), np.ones((1, total), np.int64)
            found = part.run(outputs, {INPUT_IDS: ids, ATTENTION_MASK: mask})
            positions = np.arange(past, total)
            want: list[Any] = (
                [np.array([total - 1]), np.array(total)]
                if form == "ort"
                else [np.arange(total) <= positions[:, None], positions[None]]
            )
            for name, got, expected in zip(outputs, found, want, strict=True):
                if not np.array_equal(got, expected):
                    problems.append(f"{name} of {tokens} tokens after {past} is {np.asarray(got).tolist()}")
    except _REFUSALS as error:
        problems.append(f"cannot be computed ({str(error).partition(chr(10))[0]:.100})")
    return _verdict("structure.lengths", problems)


def _ancestors(file: OnnxFile, outputs: list[str]) -> ReferenceEvaluator:
    """The part of the graph that makes `outputs`, as a model of its own."""
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


def _metadata(file: OnnxFile, model: Llama, identity: Identity) -> Check:
    want = {
        VOCAB_SIZE: str(model.config.vocab_size),
        CONTEXT_LENGTH: str(model.context_length),
        FORM: identity.recipe.onnx_form,
        SOURCE_SHA256: identity.source_sha256,
        MANIFEST_SHA256: identity.manifest_sha256,
    }
    problems = [
        f"{key} is {file.metadata.get(key)!r:.40}, expected {value!r:.40}"
        for key, value in want.items()
        if file.metadata.get(key) != value
    ]
    return _verdict("structure.metadata", problems, len(want))


def _clients(path: Path, file: OnnxFile, model: Llama) -> Check:
    """genai_config.json speaks of this model. Artifacts that were lowered without an export have none."""
    config = model.config
    try:
        data = json.loads((path / GENAI_FILE).read_text(encoding="utf-8"))
        found, decoder = data["model"], data["model"]["decoder"]
        want = {
            "context_length": (found["context_length"], model.context_length),
            "vocab_size": (found["vocab_size"], config.vocab_size),
            "eos_token_id": (found["eos_token_id"], list(config.eos_token_ids)),
            "num_hidden_layers": (decoder["num_hidden_layers"], config.num_hidden_layers),
            "num_key_value_heads": (decoder["num_key_value_heads"], config.num_key_value_heads),
            "head_size": (decoder["head_size"], config.head_dim),
            "filename": (decoder["filename"], file.path.name),
            "past_present_share_buffer": (
                data["search"]["past_present_share_buffer"],
                file.metadata.get(FORM) == "ort",
            ),
        }
        names = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    except FileNotFoundError:
        return check("structure.clients", False, detail=f"no {GENAI_FILE}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return check("structure.clients", False, detail=f"{GENAI_FILE}: {error!r:.80}")
    problems = [f"{key} is {got}, expected {value}" for key, (got, value) in want.items() if got != value]
    known = {value.name for value in (*file.inputs, *file.outputs)}
    problems += [f"no input or output {n!r}" for n in names if str(n).replace("%d", "0") not in known]
    return _verdict("structure.clients", problems, len(want) + len(names))


def _bytes(file: OnnxFile, model: Llama, identity: Identity) -> Check:
    planned = planned_bytes(model.config, identity.recipe, TARGETS["onnx"].storage, model.context_length)
    limit = max(int(planned * (1 + OVERHEAD)), planned + BYTES_PER_NODE * len(file.nodes))
    return below("structure.bytes", file.bytes, limit, detail=f"{planned} planned for the weights")
