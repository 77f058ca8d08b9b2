"""Gate, part 1, for XNNPACK: exact comparison of the .pte on disk with the recipe, without tolerances.

Every code, scale, norm, RoPE table and constant in the .pte is compared with the quantized model, bit for
bit. The checks name a layer left in float, a scale that is not applied or a wrong epsilon. Even a fault with
a small effect on the logits of a deep model is found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.formats.listing import digest
from edgellama.formats.pte import PteConstant, PteFile, PteLinear, read_pte
from edgellama.host.executorch_versions import proven
from edgellama.model.llama import Llama, RMSNorm
from edgellama.model.quantized import INT4, QuantizedEmbedding
from edgellama.report import Check, below, check
from edgellama.report.checks import listed
from edgellama.targets.executorch import check_metadata, metadata_methods
from edgellama.targets.provenance import Provenance
from edgellama.targets.xnnpack.interface import longest_call
from edgellama.targets.xnnpack.numerics import norm_weight, sum_bias, wide_rope_tables
from edgellama.targets.xnnpack.scales import pair

# Operators allowed outside the delegate. Any other means that a quantized linear was not delegated, or that a
# dependency changed the graph.
OPERATORS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::embedding.out",
        "aten::select_copy.int_out",
        "aten::slice_copy.Tensor_out",
        "aten::sym_size.int",
        "executorch_prim::add.Scalar",
        "executorch_prim::et_view.default",
        "quantized_decomposed::embedding_byte.dtype_out",
    }
)
# Operators of attention and its cache, with their calls per layer, by the recipe's `kv_cache`.
ATTENTION = {
    "float": {"llama::custom_sdpa.out": 1, "llama::update_cache.out": 2},
    "int8": {
        "llama::custom_quantized_sdpa.out": 1,
        "llama::update_cache.out": 6,  # codes, scales and zero points of keys and values
        "quantized_decomposed::choose_qparams_per_token_asymmetric.out": 3,
        "quantized_decomposed::quantize_per_token.out": 3,
        "aten::_to_copy.out": 6,
    },
}
# Operators allowed if delegates hold linears only (see export/xnnpack/delegate.py).
PORTABLE_OPERATORS = OPERATORS | {
    "aten::add.out",
    "aten::cat.out",
    "aten::mul.out",
    "aten::rsqrt.out",
    "aten::sigmoid.out",
    "aten::split_with_sizes_copy.out",
}
# Linears with the same group 1 read the same input.
_INPUT = re.compile(r"(.*)\.(?:[qkv]_proj|gate_proj|up_proj)$")
_BEFORE_ATTENTION, _IN_LAYER = 3, 7  # numbers of linears: q, k and v; those with o, gate, up and down
OVERHEAD = 0.02  # share of the planned bytes, plus OVERHEAD_BYTES: program, metadata, alignment
OVERHEAD_BYTES = 256 * 1024
DELEGATE_BYTES = 8 * 1024  # program of one delegate


@dataclass(frozen=True)
class _Linear:
    """Expected properties of a linear in the file."""

    name: str
    weight: str
    shape: tuple[int, int]
    group_size: int | None
    int8_activations: bool
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None

    @property
    def paired(self) -> bool:
        """True if the file holds two scales for one (edgellama.targets.xnnpack.scales)."""
        grouped = self.group_size is not None
        return self.scales is not None and pair(self.scales, self.name, grouped=grouped) is not None


_PIECE = 1 << 22  # values of a weight that are compared at a time


@dataclass(frozen=True)
class _Pair:
    """A linear and what the file holds in its place. same: bit for bit."""

    expected: _Linear
    stored: PteLinear
    same: bool


def check_structure(path: Path, model: Llama, provenance: Provenance) -> list[Check]:
    """The checks named `structure.*`: the .pte at `path` against the quantized `model`."""
    pte = read_pte(path)
    linears = list(_expected_linears(model))
    pairs = list(_paired(linears, pte.linears))
    return [
        _schemes(len(pte.linears), linears, pairs),
        _codes(pairs),
        _sums(pte.sums, model),
        _graphs(pte, linears),
        check_zero_points(model),
        _constants(pte, model),
        _operators(pte, model, provenance.recipe.kv_cache),
        check_metadata(pte, metadata_methods(model, provenance, longest_call(model.context_length))),
        _bytes(pte, linears, model),
    ]


def stored_codes(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Integer weights in the .pte at `path`: int8 codes [rows, columns], float32 scales [rows, groups]."""
    pte = read_pte(path)
    for linear in pte.linears:
        if linear.weight != "float32":
            yield torch.from_numpy(linear.values().copy()), torch.from_numpy(linear.scales().copy())
    scales = [c for c in pte.constants if c.dtype == "float" and len(c.shape) == 1]
    for table in pte.constants:
        if table.dtype == "char" and len(table.shape) == 2:
            values = torch.frombuffer(bytearray(bytes(table.data)), dtype=torch.int8).reshape(table.shape)
            for rows in scales:
                if rows.shape[0] == table.shape[0]:
                    yield values, torch.frombuffer(bytearray(bytes(rows.data)), dtype=torch.float32)[:, None]


def check_zero_points(model: Llama) -> Check:
    """Weight zero points are 0. XNNPACK's file format has none and would drop others without a warning."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and isinstance(module.weight, IntxUnpackedToInt8Tensor)
        and bool(module.weight.zero_point.any())
    ]
    return check(
        "structure.zero_points", not names, value=len(names), limit=0, detail=listed("nonzero in", names)
    )


def _expected_linears(model: Llama) -> Iterator[_Linear]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        w, shape = module.weight, (module.out_features, module.in_features)
        if isinstance(w, IntxUnpackedToInt8Tensor):
            weight = "int4" if w.target_dtype == INT4 else "int8"
            group = w.block_size[1] if w.block_size[1] != w.shape[1] else None
            yield _Linear(
                name,
                weight,
                shape,
                group,
                w.activation_quantization is not None,
                w.qdata,
                w.scale,
                module.bias,
            )
        else:
            yield _Linear(name, "float32", shape, None, False, w.detach(), None, module.bias)


def _sums(found: Sequence[PteLinear], model: Llama) -> Check:
    """Every norm adds each of its squares once to n * eps."""
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, RMSNorm)]
    wrong_names = [
        name
        for (name, norm), linear in zip(norms, found, strict=False)
        if not (linear.values() == np.ones((1, norm.weight.shape[0]), dtype=np.float32)).all()
        or linear.bias_data != _bytes_of(sum_bias(norm))
    ]
    complete = len(found) == len(norms)
    detail = listed("wrong in", wrong_names) or ("" if complete else "of another number of norms")
    return check(
        "structure.norms", complete and not wrong_names, value=len(found), limit=len(norms), detail=detail
    )


def _graphs(pte: PteFile, linears: Sequence[_Linear]) -> Check:
    """All layers compute in the same way.

    Graphs between the first delegate and the last are equal if their layers leave the same linears in float
    and join the same linears.
    """
    inner_graphs = pte.graphs[1:-1] if proven() else ()
    starts = range(_BEFORE_ATTENTION, len(linears), _IN_LAYER)  # first linear after each attention
    arrangements = [_arrangement(linears[i : i + _IN_LAYER]) for i in starts]
    different = len({*zip(arrangements, inner_graphs, strict=False)}) - len(
        {*arrangements[: len(inner_graphs)]}
    )
    return check("structure.graphs", different == 0, value=different, limit=0)


def _arrangement(linears: Sequence[_Linear]) -> tuple[tuple[bool, bool, bool], ...]:
    """For each linear: (is float, has the scheme of the preceding linear with the same input, has paired scales)."""
    before = zip(linears, [None, *linears], strict=False)
    return tuple(
        (
            linear.weight == "float32",
            last is not None
            and _INPUT.sub(r"\1", linear.name) == _INPUT.sub(r"\1", last.name)
            and (linear.weight, linear.group_size) == (last.weight, last.group_size),
            linear.paired,
        )
        for linear, last in before
    )


def _schemes(found: int, linears: list[_Linear], pairs: list[_Pair]) -> Check:
    name = "structure.schemes"
    if len(pairs) != len(linears):
        summary = f"{found} linears in delegates, which hold {len(pairs)} of the model's {len(linears)}"
        return check(name, False, value=len(pairs), limit=len(linears), detail=summary)
    for both in pairs:
        expected_scheme, actual_scheme = _describe(both.expected), _describe(both.stored)
        if expected_scheme != actual_scheme:
            detail = f"{both.expected.name}: expected {expected_scheme}, found {actual_scheme}"
            return check(name, False, value=len(pairs), limit=len(linears), detail=detail)
    summary = f"{len(pairs)} of {len(linears)} linears delegated, in {found} products"
    return check(name, True, value=len(pairs), limit=len(linears), detail=summary)


def _paired(linears: list[_Linear], found: Sequence[PteLinear]) -> Iterator[_Pair]:
    """Pairs each expected linear with a stored one, as far as both reach.

    Linears run in the model's order. Those that read the same input (q, k and v; gate and up) may be one
    product, with the rows of all in order. As separate products they may come in any order. Each expected
    linear then takes the most similar one.
    """
    remaining = list(found)
    for _, group in groupby(linears, key=lambda linear: _INPUT.sub(r"\1", linear.name)):
        members = list(group)
        if remaining and remaining[0].shape[0] == sum(linear.shape[0] for linear in members):
            candidates = remaining.pop(0).split([linear.shape[0] for linear in members])
        else:
            candidates, remaining = remaining[: len(members)], remaining[len(members) :]
        for linear in members[: len(candidates)]:
            equal = next((i for i, c in enumerate(candidates) if _same(linear, c)), None)
            alike = (i for i, c in enumerate(candidates) if _describe(linear) == _describe(c))
            chosen = next(alike, 0) if equal is None else equal
            yield _Pair(linear, candidates.pop(chosen), equal is not None)


def _same(expected: _Linear, found: PteLinear) -> bool:
    """Scheme, codes, scales and bias are equal, bit for bit."""
    return (
        _describe(expected) == _describe(found)
        and _same_values(expected, found)
        and (expected.scales is None or np.array_equal(found.scales(), expected.scales.numpy()))
        and found.bias_data == (b"" if expected.bias is None else _bytes_of(expected.bias))
    )


def _same_values(expected: _Linear, found: PteLinear) -> bool:
    """Codes, or floats, are equal. They are compared in pieces of rows, so that no whole copy is in memory."""
    rows, columns = expected.shape
    count = max(1, _PIECE // columns)
    lengths = [min(count, rows - start) for start in range(0, rows, count)]
    pieces = zip(found.split(lengths), expected.values.split(count), strict=True)
    return all(np.array_equal(stored.values(), values.numpy()) for stored, values in pieces)


def _describe(linear: _Linear | PteLinear) -> str:
    group = (
        ""
        if linear.weight == "float32"
        else " channel"
        if linear.group_size is None
        else f" g{linear.group_size}"
    )
    activations = " with int8 activations" if linear.int8_activations else ""
    return f"{linear.weight}{group}{activations} {list(linear.shape)}"


def _codes(pairs: list[_Pair]) -> Check:
    different = [both.expected.name for both in pairs if not both.same]
    return check(
        "structure.codes", not different, value=len(different), limit=0, detail=listed("differ in", different)
    )


def _constants(pte: PteFile, model: Llama) -> Check:
    """Every tensor outside the delegates, by content: none missing, none unknown."""
    expected = {_key(t): name for name, t in _expected_constants(model)}
    stored = {_constant_key(c): c for c in pte.constants}
    missing = sorted(name for key, name in expected.items() if key not in stored)
    unknown = [f"{c.dtype}{list(c.shape)}" for key, c in stored.items() if key not in expected]
    detail = "; ".join(filter(None, (listed("missing or altered:", missing), listed("unknown:", unknown))))
    return check(
        "structure.constants",
        not missing and not unknown,
        value=len(stored),
        limit=len(expected),
        detail=detail,
    )


def _expected_constants(model: Llama) -> Iterator[tuple[str, Tensor]]:
    cos, sin = wide_rope_tables(model)
    yield "RoPE cos", cos
    yield "RoPE sin", sin
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantizedEmbedding):
        yield "model.embed_tokens codes", embedding.values
        yield "model.embed_tokens scales", embedding.scales
    else:
        yield "model.embed_tokens", embedding.weight
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            yield name, norm_weight(module)


def constant_names(model: Llama) -> dict[str, str]:
    """Names of the constants outside the delegates, by `edgellama.formats.listing.digest` of their bytes."""
    return {digest(_bytes_of(tensor)): name for name, tensor in _expected_constants(model)}


def _key(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _constant_key(constant: PteConstant) -> tuple[tuple[int, ...], str]:
    data = constant.data
    return constant.shape, hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else data.sha256


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def _operators(pte: PteFile, model: Llama, kv_cache: str) -> Check:
    attention = {o: n * model.config.num_hidden_layers for o, n in ATTENTION[kv_cache].items()}
    allowed = (OPERATORS if proven() else PORTABLE_OPERATORS) | attention.keys()
    problems = [f"unknown operator {o}" for o in sorted(set(pte.operators) - allowed)]
    for operator, count in attention.items():
        if pte.operators.get(operator, 0) != count:
            problems.append(f"{operator} called {pte.operators.get(operator, 0)} times, expected {count}")
    problems += [f"unknown backend {b}" for b in sorted(set(pte.backends) - {"XnnpackBackend"})]
    return check("structure.operators", not problems, value=len(pte.operators), detail=listed("", problems))


def _bytes(pte: PteFile, linears: list[_Linear], model: Llama) -> Check:
    planned = sum(_planned_bytes(linear) for linear in linears)
    planned += DELEGATE_BYTES * pte.backends.get("XnnpackBackend", 0)
    planned += sum({_key(t): t.numel() * t.element_size() for _, t in _expected_constants(model)}.values())
    limit = int(planned * (1 + OVERHEAD)) + OVERHEAD_BYTES
    return below("structure.bytes", pte.bytes, limit, detail=f"{planned} planned")


def _planned_bytes(linear: _Linear) -> int:
    rows, columns = linear.shape
    if linear.scales is None:
        return rows * columns * 4
    bits, scale_bytes = (4 if linear.weight == "int4" else 8), (4 if linear.group_size is None else 2)
    if linear.paired:
        scale_bytes *= 2
    return rows * columns * bits // 8 + linear.scales.numel() * scale_bytes
