"""Gate, part 1, for ONNX: exact comparison of the model on disk with the recipe.

Every code, scale, norm, bias and RoPE table is compared with the quantized model, bit for bit. The graph
around them is checked in edgellama/targets/onnx/attention.py and measured by parity.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgellama.errors import BundleError
from edgellama.formats.onnx_model import OnnxFile, read_onnx
from edgellama.formats.onnx_weights import JOINED, StoredWeight, find_weight, weights_of
from edgellama.model.llama import Llama, RMSNorm
from edgellama.model.quantized import Codes, codes_of
from edgellama.report import Check, below, check
from edgellama.targets.onnx.attention import check_attention, check_lengths
from edgellama.targets.onnx.interface import (
    ACCURACY_LEVEL,
    FORM,
    GENAI_FILE,
    adapter_inputs,
    block_size,
    metadata,
)
from edgellama.targets.onnx.storage import STORAGE
from edgellama.targets.provenance import Provenance
from edgellama.targets.sizes import planned_bytes

OVERHEAD = 0.03  # share of the planned bytes; in a small model the graph itself counts for more
BYTES_PER_NODE = 800  # names and attributes of a node, small tensors, and the padding of large ones to a page

# Operators of a layer and their number of calls, by form. Norms, linears and glue are judged by name and by
# parity.
PER_LAYER = {
    "ort": {"com.microsoft::GroupQueryAttention": 1, "com.microsoft::SkipSimplifiedLayerNormalization": 2},
    "portable": {"Attention": 1, "RotaryEmbedding": 2},
}


def check_structure(path: Path, model: Llama, provenance: Provenance) -> list[Check]:
    """The checks named `structure.*`: the model in the directory `path` against the quantized `model`."""
    file = read_onnx(path)
    form = provenance.recipe.onnx_form
    weights = weights_of(file)
    return [
        _valid(file),
        _schemes(weights, model, form),
        _codes(file, weights, model),
        _constants(file, model),
        _operators(file, model, form),
        check_attention(file, model, form),
        check_lengths(file, form),
        _metadata(file, model, provenance),
        *_adapters(file, model, provenance),
        _clients(path, file, model),
        _bytes(file, model, provenance),
    ]


def stored_codes(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Integer weights in the directory `path`: int8 codes [rows, columns], float32 scales [rows, groups].

    A weight with repeated row scales comes a second time, with one scale per row as in the scheme.
    """
    file = read_onnx(path)
    for weight in weights_of(file).values():
        if weight.scales is not None:
            values, scales = (torch.from_numpy(np.array(part)) for part in weight.codes(file))
            yield values, scales
            if scales.shape[1] > 1 and bool((scales == scales[:, :1]).all()):
                yield values, scales[:, :1].contiguous()


def _verdict(name: str, problems: list[str], count: int | None = None) -> Check:
    value = len(problems) if count is None else count - len(problems)
    return check(
        name, not problems, value=value, limit=0 if count is None else count, detail="; ".join(problems[:3])
    )


def _valid(file: OnnxFile) -> Check:
    """The model passes onnx's own checker."""
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
    """Modules have their schemes and no zero points, linears the accuracy level of the numerics."""
    problems, count = [], 0
    for name, module in _modules(model):
        count += 1
        stored = find_weight(weights, name)
        codes = codes_of(module)
        expected, actual = _scheme(codes, lookup=name == "model.embed_tokens", form=form), "nothing"
        if stored is not None:
            weight, _ = stored
            actual = weight.scheme + (" with zero points" if weight.zero_points else "")
            if weight.node.operator == "MatMulNBits":
                level = weight.node.attributes.get("accuracy_level", 0)
                actual += "" if level == ACCURACY_LEVEL else f" at accuracy level {level}"
        if expected != actual:
            problems.append(f"{name}: expected {expected}, found {actual}")
    return _verdict("structure.schemes", problems, count)


def _scheme(codes: Codes | None, *, lookup: bool, form: str) -> str:
    if codes is None:
        return "float32"
    columns = codes.values.shape[1]
    group = columns if lookup and form == "portable" else block_size(codes.scheme, columns)
    return f"int{codes.scheme.bits} g{group}"


def _codes(file: OnnxFile, weights: dict[str, StoredWeight], model: Llama) -> Check:
    """Codes and scales are equal, bit for bit. A tensor that several modules share is read once for each."""
    rows = {name: _rows(module) for name, module in _modules(model)}
    different = []
    for name, module in _modules(model):
        stored = find_weight(weights, name)
        try:
            if stored is None or not _same(file, *stored, name, module, rows):
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
    expected_scales = codes.scales.float().numpy()
    return np.array_equal(values, codes.values.numpy()) and np.array_equal(
        scales, np.repeat(expected_scales, scales.shape[1] // expected_scales.shape[1], axis=1)
    )


def _constants(file: OnnxFile, model: Llama) -> Check:
    """Norms with their epsilon, biases and RoPE tables equal the model's."""
    wrong, count = [], 0
    rows = {name: _rows(module) for name, module in _modules(model)}
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
            if not _has_bias(file, name, bias.detach().numpy(), rows):
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


def _has_bias(file: OnnxFile, name: str, values: np.ndarray, rows: dict[str, int]) -> bool:
    """Returns True if the module's bias, or its part of the bias of joined modules, equals `values`."""
    own = _array(file, f"{name}.bias")
    if own is not None:
        return np.array_equal(own, values)
    prefix, _, last = name.rpartition(".")
    for joined, members in JOINED.items():
        shared = _array(file, f"{prefix}.{joined}.bias") if last in members else None
        if shared is not None:
            first = sum(rows[f"{prefix}.{member}"] for member in members[: members.index(last)])
            return np.array_equal(shared[first : first + len(values)], values)
    return False


def _operators(file: OnnxFile, model: Llama, form: str) -> Check:
    problems = []
    for operator, times in PER_LAYER[form].items():
        expected, actual = times * model.config.num_hidden_layers, file.operators[operator]
        if actual != expected:
            problems.append(f"{operator} called {actual} times, expected {expected}")
    domains = Counter(node.domain or "ai.onnx" for node in file.nodes)
    allowed = {"ai.onnx"} | ({"com.microsoft"} if form == "ort" else set())
    problems += [f"{count} operators of domain {d}" for d, count in domains.items() if d not in allowed]
    return check("structure.operators", not problems, value=len(file.nodes), detail="; ".join(problems[:3]))


def _metadata(file: OnnxFile, model: Llama, provenance: Provenance) -> Check:
    expected, actual = metadata(model, provenance), file.metadata
    problems = [
        f"{key} is {actual.get(key)!r:.40}, expected {value!r:.40}"
        for key, value in expected.items()
        if actual.get(key) != value
    ]
    keys = [entry.key for entry in file.proto.metadata_props]
    problems += [f"{key} is not expected" for key in keys if key not in expected]
    problems += [f"{key} is given twice" for key in expected if keys.count(key) > 1]
    return _verdict("structure.metadata", problems, len(expected))


def _adapters(file: OnnxFile, model: Llama, provenance: Provenance) -> list[Check]:
    """The optional inputs are those of the manifest's adapters. No check for a model without any."""
    expected = adapter_inputs(model, provenance)
    actual = {value.name: value.shape for value in file.optional_inputs}
    if not expected and not actual:
        return []
    names = sorted({*expected, *actual})
    problems = [f"{name} is {actual.get(name)}, expected {expected.get(name)}" for name in names]
    problems = [p for name, p in zip(names, problems, strict=True) if actual.get(name) != expected.get(name)]
    return [_verdict("structure.adapters", problems, len(expected))]


def _clients(path: Path, file: OnnxFile, model: Llama) -> Check:
    """genai_config.json describes this model. Artifacts that were lowered without an export have none.

    A classifier has none either: ONNX Runtime GenAI generates text.
    """
    config = model.config
    if config.is_classifier:
        there = (path / GENAI_FILE).exists()
        return check("structure.clients", not there, detail=f"{GENAI_FILE} of a classifier" if there else "")
    try:
        data = json.loads((path / GENAI_FILE).read_text(encoding="utf-8"))
        genai_model, decoder = data["model"], data["model"]["decoder"]
        values = {
            "context_length": (genai_model["context_length"], model.context_length),
            "vocab_size": (genai_model["vocab_size"], config.vocab_size),
            "eos_token_id": (genai_model["eos_token_id"], list(config.eos_token_ids)),
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
    problems = [
        f"{key} is {actual}, expected {value}" for key, (actual, value) in values.items() if actual != value
    ]
    graph_names = {value.name for value in (*file.inputs, *file.outputs)}
    problems += [f"no input or output {n!r}" for n in names if str(n).replace("%d", "0") not in graph_names]
    return _verdict("structure.clients", problems, len(values) + len(names))


def _bytes(file: OnnxFile, model: Llama, provenance: Provenance) -> Check:
    planned = planned_bytes(model.config, provenance.recipe, STORAGE, model.context_length)
    limit = max(int(planned * (1 + OVERHEAD)), planned + BYTES_PER_NODE * len(file.nodes))
    return below("structure.bytes", file.bytes, limit, detail=f"{planned} planned for the weights")
