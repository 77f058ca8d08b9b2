"""Lints of Core ML language models for any package: one named check per known fault.

The sources are issues of apple/coremltools. Each check names its issue. No model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgellama.formats.mlpackage import OPSETS, Constant, Feature, Function, MlPackage, Operation, Weight
from edgellama.report import Check, check
from edgellama.targets.coreml.interface import CONTEXT_LENGTH
from edgellama.targets.coreml.limits import STATE_MULTIPLE

FLOAT16_MAX = 65504.0
SMALLEST_NORMAL = 2.0**-14  # of float16
UNBOUNDED = 2**31 - 1
SMALL = 4096  # elements
# Arguments through which an operator reads a weight.
_WEIGHT_ARGUMENTS = {
    "linear": ("weight",),
    "conv": ("weight",),
    "conv_transpose": ("weight",),
    "matmul": ("x", "y"),
    "gather": ("x",),
}
# Operators that pass values on unchanged, in another shape.
_SHAPING = frozenset(
    (
        *("cast", "concat", "expand_dims", "identity", "reshape", "slice_by_index", "slice_by_size"),
        *("split", "squeeze", "tile", "transpose"),
    )
)
# Arguments that give the place of a read or write, not its data.
_PLACES = frozenset(("begin", "end", "indices", "begin_mask", "end_mask", "squeeze_mask", "stride", "axis"))

Lint = Callable[[MlPackage, str], Iterator[str]]


def lint(package: MlPackage, *, profile: str) -> list[Check]:
    """Runs the checks of `LINTS`, in order. profile: `gpu` or `ane`, the hardware of the package."""
    results = []
    for name, question in LINTS.items():
        problems = list(question(package, profile))
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        detail = "; ".join(problems[:3]) + more
        results.append(check(f"structure.{name}", not problems, value=len(problems), limit=0, detail=detail))
    return results


def _state_dimensions(package: MlPackage, profile: str) -> Iterator[str]:
    """#2537: no flexible states. #2631: on the Neural Engine, a state's width must be a multiple of 32."""
    for function in package.functions:
        for state in function.states:
            if _flexible(state):
                yield f"{state.name} in {function.name} has no fixed shape"
            elif profile == "ane":
                for size in state.shape[-2:]:
                    if isinstance(size, int) and size % STATE_MULTIPLE:
                        yield f"{state.name} in {function.name}: {size} is no multiple of {STATE_MULTIPLE}"


def _deployment_target(package: MlPackage, profile: str) -> Iterator[str]:
    """Every operator belongs to its function's declared opset, and the opset to the specification version."""
    for function in package.functions:
        declared = OPSETS.get(function.opset, UNBOUNDED)
        if declared > package.specification:
            yield f"{function.name} uses {function.opset}, the package declares version {package.specification}"
        for op in function.operations:
            first = _first_version(op)
            if first > declared:
                yield (
                    f"{op.name} in {function.name} ({op.type}) needs specification version {first}, "
                    f"{function.opset} is declared"
                )


def _first_version(op: Operation) -> int:
    """Specification version that introduced the operator, or the arguments of this call. 0 if unknown."""
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry  # internal in coremltools 9.0

    # A package's write_state is the builder's coreml_update_state. It came with read_state.
    name = "read_state" if op.type == "write_state" else op.type
    variants = {int(target): variant for target, variant in SSAOpRegistry.core_ops.get(name, {}).items()}
    fitting = [v for v, form in variants.items() if op.inputs.keys() <= form.input_spec.input_types.keys()]
    return min(fitting or variants, default=0)


def _masks(package: MlPackage, profile: str) -> Iterator[str]:
    """PR #2669: a mask made of finfo(float32).min.

    coremltools' check for overflow does not see it, and float16 turns it into -inf. Times the 0 of a visible
    token, -inf is NaN, and so is every logit of the model.
    """
    for function in package.functions:
        for op in function.operations:
            for constant in _floats(op, function):
                values = constant.array()
                large = np.abs(values[np.isfinite(values)]).max(initial=0.0)
                if large > FLOAT16_MAX:
                    yield f"{op.name} in {function.name} reads {large:.3g}, beyond float16; a mask is -inf or -6e4 at least"
                if op.type in ("mul", "real_div") and np.isinf(values).any():
                    yield f"{op.name} in {function.name} multiplies by {values.min():.3g}, which makes NaN of zeros"


def _floats(op: Operation, function: Function) -> Iterator[Constant]:
    """Constants read by `op` that could be part of a mask. Weights are excluded.

    float16 cannot hold a value that is too large, so only float16 constants of up to SMALL elements are
    included.
    """
    weights = _WEIGHT_ARGUMENTS.get(op.type, ())
    for argument in (a for key, group in op.inputs.items() if key not in weights for a in group):
        producer = function.producers.get(argument) if isinstance(argument, str) else None
        constant = producer.value if producer is not None else argument
        if not isinstance(constant, Constant) or constant.dtype not in ("float16", "float32", "float64"):
            continue
        stored = constant.offset is not None or isinstance(constant.data, np.ndarray)
        if stored and (constant.dtype != "float16" or constant.size <= SMALL):
            yield constant


def _tables(package: MlPackage, profile: str) -> Iterator[str]:
    """A quantizer with a global configuration also quantizes RoPE's cos and sin.

    A compressed constant must be a weight of a matrix product, or a table in which token ids are looked up.
    The rows of such a table enter the model. They do not scale values inside it.
    """
    for function in package.functions:
        for name, weight in function.weights.items():
            if weight.type.startswith("constexpr"):
                op = _misused(function, name)
                if op is not None:
                    yield f"{name} in {function.name} is compressed and read by {op.name} ({op.type})"


def _misused(function: Function, name: str) -> Operation | None:
    """Returns an operator, if any, that reads the value `name`, in any shape, other than as a weight."""
    for op in function.consumers(name):
        weight = any(name in op.inputs.get(argument, ()) for argument in _WEIGHT_ARGUMENTS.get(op.type, ()))
        if weight and op.type != "gather":
            continue
        if weight and _reaches(function, op, "indices"):
            misuse = next((o for out in op.outputs for o in _multipliers(function, out)), None)
        elif op.type in ("transpose", "reshape", "expand_dims", "squeeze", "cast"):
            misuse = next(filter(None, (_misused(function, out) for out in op.outputs)), None)
        else:
            misuse = op
        if misuse is not None:
            return misuse
    return None


def _multipliers(function: Function, name: str) -> Iterator[Operation]:
    """Products of the value `name`, in any shape, with an operand neither constant nor derived from it.

    Rows of cos and sin have such products, embeddings do not.
    """
    for op in function.consumers(name):
        if op.type in _SHAPING:
            for output in op.outputs:
                yield from _multipliers(function, output)
        elif op.type == "mul":
            others = [a for a in op.arguments if a != name]
            if any(not _is_constant(function, o) and not _depends(function, o, {name}) for o in others):
                yield op


def _is_constant(function: Function, name: str) -> bool:
    producer = function.producers.get(name)
    return producer is not None and (producer.type == "const" or producer.type.startswith("constexpr"))


def _reaches(function: Function, op: Operation, argument: str) -> bool:
    """Returns True if `argument` depends on token ids or positions: on an input with two dimensions."""
    ids = {f.name for f in function.inputs if len(f.shape) == 2}
    return any(_depends(function, a, ids) for a in op.inputs.get(argument, ()) if isinstance(a, str))


def _depends(function: Function, name: str, targets: set[str], *, places: bool = True) -> bool:
    """Returns True if `name` is made from one of `targets`.

    places: count the places of reads and writes, too.
    """
    pending, seen = [name], set[str]()
    while pending:
        current = pending.pop()
        if current in targets:
            return True
        op = function.producers.get(current)
        if op is None or current in seen:
            continue
        seen.add(current)
        for key, group in op.inputs.items():
            if places or key not in _PLACES or op.type.startswith("gather"):
                pending += [a for a in group if isinstance(a, str)]
    return False


def _block_weights(package: MlPackage, profile: str) -> Iterator[str]:
    """#2510: the Neural Engine does not multiply weights with a scale for each block."""
    if profile != "ane":
        return
    for function in package.functions:
        for name, weight in function.weights.items():
            if weight.group_size is not None:
                yield f"{name} in {function.name} is {weight.scheme}"


def _static_shapes(package: MlPackage, profile: str) -> Iterator[str]:
    """#2600: with flexible shapes every operator falls from the Neural Engine to the CPU."""
    if profile != "ane":
        return
    for function in package.functions:
        flexible = [feature.name for feature in function.inputs if _flexible(feature)]
        yield from (f"{name} in {function.name} is flexible" for name in flexible)
        for op in () if flexible else function.operations:
            if any(None in shape for _, shape in op.outputs.values()):
                yield f"{op.name} in {function.name} ({op.type}) has a size that is only known when it runs"


def _shape_ranges(package: MlPackage, profile: str) -> Iterator[str]:
    """A package traced by torch.export declares lengths from 2 on, without a real upper bound.

    The right bound is the length of the cache. A lower one leaves its end unused, a higher one writes past
    it.
    """
    for function in package.functions:
        lengths = _cache_lengths(package, function)
        cache_length, longest_flexible = max(lengths, default=UNBOUNDED), 0
        for feature in function.inputs:
            longest = max((size[1] for size in feature.shape if not isinstance(size, int)), default=1)
            unbounded = any(not isinstance(size, int) and size[1] <= 0 for size in feature.shape)
            if unbounded or longest >= UNBOUNDED:
                yield f"{feature.name} in {function.name} has no upper bound"
            elif longest > cache_length:
                yield f"{feature.name} in {function.name} reaches to {longest}, beyond its states"
            if _flexible(feature):
                longest_flexible = max(longest_flexible, longest)
        if 0 < longest_flexible < cache_length and lengths and longest_flexible not in lengths:
            ends = " or ".join(map(str, sorted(lengths)))
            yield f"the shapes of {function.name} end at {longest_flexible}, its states at {ends}"
    if not any(_decodes(function) for function in package.functions):
        declared = [f"{f.inputs[0].name} {list(f.inputs[0].shape)}" for f in package.functions if f.inputs]
        yield f"no function takes a single token ({', '.join(declared)})"


def _cache_lengths(package: MlPackage, function: Function) -> set[int]:
    """Cache length from edgellama's metadata.

    Without it, the last two dimensions of each state, in either order.
    """
    own = package.user_defined.get(CONTEXT_LENGTH, "")
    if own.isdecimal():
        return {int(own)}
    return {n for s in function.states for n in s.shape[-2:] if isinstance(n, int)}


def _decodes(function: Function) -> bool:
    """Returns True if each flexible dimension and the token ids (int32, two dimensions) may have length 1."""
    for feature in function.inputs:
        ids = feature.dtype == "int32" and len(feature.shape) == 2
        for axis, size in enumerate(feature.shape):
            low = size if isinstance(size, int) else size[0]
            if ((ids and axis == 1) or not isinstance(size, int)) and low > 1:
                return False
    return True


def _state_updates(package: MlPackage, profile: str) -> Iterator[str]:
    """#2188: the write of a traced cache is dropped without a warning.

    Besides, coremltools takes each read of a state for the first one, so that a later write undoes an earlier
    one.
    """
    for function in package.functions:
        inputs = {feature.name for feature in function.inputs}
        for state in function.states:
            users = function.consumers(state.name)
            writes = [op for op in users if op.type == "write_state"]
            if not users:
                yield f"{state.name} in {function.name} is never used"
            elif not any(_computed(function, op, inputs) for op in writes):
                yield f"{state.name} in {function.name} is read and never updated"
            else:
                yield from _stale(function, state.name)


def _computed(function: Function, write: Operation, inputs: set[str]) -> bool:
    """Returns True if the stored data comes from an input, not from the old state or a constant alone."""
    data = [a for a in write.inputs.get("data", ()) if isinstance(a, str)]
    return any(_depends(function, name, inputs, places=False) for name in data)


def _stale(function: Function, state: str) -> Iterator[str]:
    """Updates that start from a read which an earlier write made stale."""
    current: set[str] = set()
    for op in function.operations:
        if op.type == "write_state" and state in op.arguments:
            for value in op.inputs.get("data", ()):
                producer = function.producers.get(str(value))
                if producer is None or producer.type != "slice_update":
                    continue
                for source in producer.inputs.get("x", ()):
                    origin = function.producers.get(str(source))
                    if origin is not None and origin.type == "read_state" and source not in current:
                        yield (
                            f"{producer.name} in {function.name} updates an old read of {state}, "
                            "undoing what came between"
                        )
            current = set()
        elif op.type == "read_state" and state in op.arguments:
            current |= set(op.outputs)


def _scales(package: MlPackage, profile: str) -> Iterator[str]:
    """Scales must be normal float16 numbers and zero points 0. Given codes may have negative scales."""
    for weight in package.weights:
        for scale in _parts(weight, "scale"):
            values = scale.array()
            if not np.isfinite(values).all() or (np.abs(values) < SMALLEST_NORMAL).any():
                yield f"{weight.name}: scales from {values.min():.3g} to {values.max():.3g}"
        for offset in (*_parts(weight, "offset"), *_parts(weight, "zero_point")):
            if offset.array().any():
                yield f"{weight.name} has an offset"


def _parts(weight: Weight, name: str) -> list[Constant]:
    """Parts called `name`: those of the weight and of the constexprs inside it."""
    return [tensor for key, tensor in weight.parts.items() if key.rpartition(".")[2] == name]


def _flexible(feature: Feature) -> bool:
    return any(not isinstance(size, int) for size in feature.shape)


LINTS: dict[str, Lint] = {
    "state_dimensions": _state_dimensions,
    "deployment_target": _deployment_target,
    "masks": _masks,
    "tables": _tables,
    "block_weights": _block_weights,
    "static_shapes": _static_shapes,
    "shape_ranges": _shape_ranges,
    "state_updates": _state_updates,
    "scales": _scales,
}
