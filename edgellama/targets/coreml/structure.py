"""Gate, part 1, for Core ML: exact comparison of the package on disk with the recipe.

Every code, scale, norm and RoPE table of every function is compared with the quantized model, bit for bit.
The lints look for known faults of Core ML packages from any exporter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgellama.formats.coreml_pte import extracted_package
from edgellama.formats.mlpackage import MlPackage, read_mlpackage
from edgellama.formats.mlpackage_weights import Weight
from edgellama.formats.pte import read_pte
from edgellama.model.llama import Llama, RMSNorm
from edgellama.model.quantized import Codes, codes_of
from edgellama.report import Check, below, check
from edgellama.targets.coreml.interface import (
    COREMLTOOLS,
    PREFILL_METHOD,
    PROFILES,
    PTE_METHODS,
    metadata_fields,
    user_defined,
)
from edgellama.targets.coreml.lints import lint
from edgellama.targets.coreml.storage import STORAGE
from edgellama.targets.executorch import check_metadata, metadata_methods
from edgellama.targets.provenance import Provenance

OVERHEAD = 0.03  # share of the planned bytes; in a small model the program itself counts for more
BYTES_PER_OPERATION = 300  # of model.mlmodel

# Operators of a layer and their number of calls. Parity judges the rest.
PER_LAYER = {"scaled_dot_product_attention": 1, "linear": 7, "silu": 1}


def check_structure(path: Path, model: Llama, provenance: Provenance) -> list[Check]:
    """The checks named `structure.*`: the .mlpackage at `path` against the quantized `model`."""
    package = read_mlpackage(path)
    forms = PROFILES[provenance.recipe.coreml_profile]
    return [
        *_exact(package, model, provenance, list(forms)),
        *lint(package, profile=provenance.recipe.coreml_profile),
    ]


def check_pte_structure(path: Path, model: Llama, provenance: Provenance) -> list[Check]:
    """`check_structure` for the package inside the .pte at `path`, with checks of the .pte's methods."""
    with extracted_package(path) as package_path:
        package = read_mlpackage(package_path)
        checks = _exact(package, model, provenance, list(PTE_METHODS))
        checks += lint(package, profile=provenance.recipe.coreml_profile)
    pte = read_pte(path)
    outside = [f"operator {name} outside the delegate" for name in pte.operators]
    outside += [f"backend {name}" for name in pte.backends if name != "CoreMLBackend"]
    states = [s.name for f in package.functions for s in f.states]
    methods = metadata_methods(model, provenance) | {PREFILL_METHOD: PTE_METHODS["prefill"].tokens}
    return [
        *checks,
        replace(check_metadata(pte, methods), name="structure.methods"),
        check("structure.delegated", not outside, value=len(outside), limit=0, detail="; ".join(outside[:3])),
        check("structure.no_states", not states, value=len(states), limit=0, detail=", ".join(states)),
    ]


def stored_codes(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Integer weights in the package at `path`: int8 codes [rows, columns], float32 scales [rows, groups]."""
    for weight in read_mlpackage(path).weights:
        data, scale = weight.parts.get("data"), weight.parts.get("scale")
        if data is not None and scale is not None and len(weight.shape) == 2:
            yield (
                torch.from_numpy(data.array().astype(np.int8)),
                torch.from_numpy(scale.array().astype(np.float32)),
            )


def stored_pte_codes(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """`stored_codes` of the package inside the .pte at `path`."""
    with extracted_package(path) as package:
        yield from stored_codes(package)


def _exact(package: MlPackage, model: Llama, provenance: Provenance, names: list[str]) -> list[Check]:
    functions = sorted(f.name for f in package.functions)
    if functions != sorted(names):
        detail = f"functions {', '.join(functions)}, expected {', '.join(sorted(names))}"
        return [check("structure.functions", False, value=len(functions), limit=len(names), detail=detail)]
    return [
        check(
            "structure.functions", True, value=len(functions), limit=len(names), detail=", ".join(functions)
        ),
        _schemes(package, model),
        _codes(package, model),
        _constants(package, model),
        _operators(package, model),
        _metadata(package, model, provenance),
        _bytes(package, model, provenance),
    ]


def _mil_name(name: str) -> str:
    """Name in the package: coremltools writes names with underscores only."""
    return name.replace(".", "_")


def _modules(model: Llama) -> Iterator[tuple[str, str, nn.Module]]:
    """(module name, name of its weight in the package, module). A tied lm_head has the embedding's weight."""
    table = codes_of(model.model.embed_tokens)
    for name, module in model.named_modules():
        if name != "model.embed_tokens" and not isinstance(module, nn.Linear):
            continue
        codes, owner = codes_of(module), name
        if name == "lm_head":
            shared = (
                codes.values.data_ptr() == table.values.data_ptr()
                if codes is not None and table is not None
                else codes is table and model.lm_head.weight is model.model.embed_tokens.weight
            )
            owner = "model.embed_tokens" if shared else name
        yield name, _mil_name(f"{owner}.weight"), module


def _schemes(package: MlPackage, model: Llama) -> Check:
    problems, count = [], 0
    for function in package.functions:
        for name, weight, module in _modules(model):
            count += 1
            codes, stored = codes_of(module), function.weights.get(weight)
            expected = "float16" if codes is None else _scheme(codes)
            actual = stored.scheme if stored else "nothing"
            if expected != actual:
                problems.append(f"{name} in {function.name}: expected {expected}, found {actual}")
    return check(
        "structure.schemes",
        not problems,
        value=count - len(problems),
        limit=count,
        detail="; ".join(problems[:3]),
    )


def _scheme(codes: Codes) -> str:
    group = codes.scheme.group_size
    return f"int{codes.scheme.bits} {f'g{group}' if group else 'channel'}"


def _codes(package: MlPackage, model: Llama) -> Check:
    """Codes and scales are equal, bit for bit, in every function.

    Weights that functions share are read once.
    """
    compared: set[tuple[int | None, str]] = set()
    different = []
    for function in package.functions:
        for name, weight, module in _modules(model):
            stored = function.weights.get(weight)
            place = next(iter(stored.parts.values())).offset if stored else None
            if (place, name) in compared:
                continue
            compared.add((place, name))
            if stored is None or not _same(stored, codes_of(module), module):
                different.append(name)
    detail = f"differ in {', '.join(different[:3])}" if different else ""
    return check("structure.codes", not different, value=len(different), limit=0, detail=detail)


def _same(found: Weight, codes: Codes | None, module: nn.Module) -> bool:
    if codes is None:
        weight = module.get_parameter("weight").detach()
        return "val" in found.parts and np.array_equal(found.parts["val"].array(), _float16(weight))
    if "data" not in found.parts or "scale" not in found.parts or "offset" in found.parts:
        return False
    scales = found.parts["scale"].array()
    return (
        np.array_equal(found.parts["data"].array(), codes.values.numpy())
        and scales.shape == tuple(codes.scales.shape)
        and np.array_equal(scales.astype(np.float32), codes.scales.numpy())
    )


def _constants(package: MlPackage, model: Llama) -> Check:
    """Norms, biases and RoPE tables equal the model's in float16, in every function."""
    wrong, count = [], 0
    for function in package.functions:
        for name, tensor in _expected_constants(model):
            count += 1
            op, expected = function.producers.get(_mil_name(name)), _float16(tensor)
            if op is None and name.endswith("norm.weight") and bool((expected == 1).all()):
                continue  # coremltools leaves out a product with ones
            if (
                op is None
                or op.value is None
                or op.value.dtype != "float16"
                or not np.array_equal(op.value.array(), expected)
            ):
                wrong.append(f"{name} in {function.name}")
    detail = f"missing or altered: {', '.join(wrong[:3])}" if wrong else ""
    return check("structure.constants", not wrong, value=count - len(wrong), limit=count, detail=detail)


def _expected_constants(model: Llama) -> Iterator[tuple[str, Tensor]]:
    yield "cos", model.model.cos[:, 0]
    yield "sin", model.model.sin[:, 0]
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            yield f"{name}.weight", module.weight
        if isinstance(module, nn.Linear) and module.bias is not None:
            yield f"{name}.bias", module.bias


def _float16(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy().astype(np.float16)
    return array


def _operators(package: MlPackage, model: Llama) -> Check:
    problems = []
    layers = model.config.num_hidden_layers
    for function in package.functions:
        calls = Counter(op.type for op in function.operations)
        updates = {"slice_update": 2 if function.states else 0}  # keys and values, none lost
        for operator, times in (PER_LAYER | updates).items():
            expected = times * layers + (operator == "linear")
            if calls[operator] != expected:
                problems.append(
                    f"{operator} called {calls[operator]} times in {function.name}, expected {expected}"
                )
    count = sum(len(f.operations) for f in package.functions)
    return check("structure.operators", not problems, value=count, detail="; ".join(problems[:3]))


def _metadata(package: MlPackage, model: Llama, provenance: Provenance) -> Check:
    expected = user_defined(model, provenance)
    actual = {key: value for key, value in package.user_defined.items() if key != COREMLTOOLS}
    pairs = [
        *((key, actual.get(key), expected.get(key)) for key in sorted({*expected, *actual})),
        *((key, package.metadata[key], value) for key, value in metadata_fields(provenance).items()),
    ]
    problems = [
        f"{key} is {value!r:.40}, expected {wanted!r:.40}" for key, value, wanted in pairs if value != wanted
    ]
    return check("structure.metadata", not problems, value=len(expected), detail="; ".join(problems[:3]))


def _bytes(package: MlPackage, model: Llama, provenance: Provenance) -> Check:
    from edgellama.targets.sizes import planned_bytes

    planned = planned_bytes(model.config, provenance.recipe, STORAGE, model.context_length)
    operations = sum(len(f.operations) for f in package.functions)
    limit = max(int(planned * (1 + OVERHEAD)), planned + BYTES_PER_OPERATION * operations)
    return below("structure.bytes", package.bytes, limit, detail=f"{planned} planned for the weights")
