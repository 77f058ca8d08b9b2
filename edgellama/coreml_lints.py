"""What is known to go wrong in Core ML language models, asked of any package: a named check for each.

The sources are issues of apple/coremltools; each check names its own. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgellama.coreml_profiles import STATE_MULTIPLE
from edgellama.mlpackage_file import Feature, Function, MlPackage
from edgellama.mlpackage_tensor import Tensor
from edgellama.mlpackage_weights import Operation
from edgellama.report import Check, check

FLOAT16_MAX = 65504.0
SMALLEST_NORMAL = 2.0**-14  # of float16
UNBOUNDED = 2**31 - 1
SMALL = 4096  # elements of a constant that a mask could be made of
# Argument through which an operator takes a weight.
_WEIGHT_ARGUMENTS = {"linear": "weight", "conv": "weight", "matmul": "y", "conv_transpose": "weight"}
_UPDATES = ("slice_update", "scatter", "scatter_nd", "scatter_along_axis", "select", "concat", "add", "where")
_OPSETS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}

Lint = Callable[[MlPackage, str], Iterator[str]]


def lint(package: MlPackage, *, profile: str) -> list[Check]:
    """The checks, in order. profile: `gpu` or `ane`, the hardware that the package is meant for."""
    results = []
    for name, question in LINTS.items():
        problems = list(question(package, profile))
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        detail = "; ".join(problems[:3]) + more
        results.append(check(f"structure.{name}", not problems, value=len(problems), limit=0, detail=detail))
    return results


def _state_dimensions(package: MlPackage, profile: str) -> Iterator[str]:
    """#2537: no flexible states. #2631: a state fails on the Neural Engine when its width is no multiple of 32."""
    for function in package.functions:
        for state in function.states:
            if _flexible(state):
                yield f"{state.name} in {function.name} has no fixed shape"
            elif profile == "ane":
                for size in state.shape[-2:]:
                    if isinstance(size, int) and size % STATE_MULTIPLE:
                        yield f"{state.name} in {function.name}: {size} is no multiple of {STATE_MULTIPLE}"


def _deployment_target(package: MlPackage, profile: str) -> Iterator[str]:
    """Every operator belongs to the opset that its function declares, and that to the specification version."""
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry  # internal in coremltools 9.0

    known = SSAOpRegistry.core_ops
    for function in package.functions:
        declared = _OPSETS.get(function.opset, UNBOUNDED)
        if declared > package.specification:
            yield f"{function.name} uses {function.opset}, the package declares version {package.specification}"
        for kind, name in sorted({op.type: op.name for op in function.operations}.items()):
            variants = known.get(kind)
            if not variants:
                continue
            first = min(_version(target) for target in variants)
            if first > declared:
                yield f"{name} ({kind}) needs specification version {first}, {function.opset} is declared"


def _version(target: object) -> int:
    return int(getattr(target, "value", 0))


def _masks(package: MlPackage, profile: str) -> Iterator[str]:
    """PR #2669: a mask made of finfo(float32).min. coremltools' check for overflow does not see it, float16 turns it
    into -inf, and -inf times the 0 of a token that is visible is NaN: every logit of the model."""
    for function in package.functions:
        for op in function.operations:
            for constant in _small_floats(op, function):
                values = np.asarray(constant.array(), dtype=np.float64)
                large = np.abs(values[np.isfinite(values)]).max(initial=0.0)
                if large > FLOAT16_MAX:
                    yield f"{op.name} in {function.name} reads {large:.3g}, beyond float16; a mask is -inf or -6e4 at least"
                if op.type in ("mul", "real_div") and np.isinf(values).any():
                    yield f"{op.name} in {function.name} multiplies by {values.min():.3g}, which makes NaN of zeros"


def _small_floats(op: Operation, function: Function) -> Iterator[Tensor]:
    """The constants that an operator reads and that a mask could be made of."""
    for argument in (a for group in op.inputs.values() for a in group):
        producer = function.producers.get(argument) if isinstance(argument, str) else None
        constant = producer.value if producer is not None else argument
        if not isinstance(constant, Tensor) or not constant.dtype.startswith("float"):
            continue
        stored = constant.offset is not None or isinstance(constant.data, np.ndarray)
        if stored and np.prod(constant.shape) <= SMALL:
            yield constant


def _tables(package: MlPackage, profile: str) -> Iterator[str]:
    """A quantizer with a global configuration quantizes RoPE's cos and sin too: whatever is compressed is a weight
    of a matrix product, or the table in which token ids are looked up."""
    for function in package.functions:
        inputs = {feature.name for feature in function.inputs}
        for name in _compressed(function):
            for op in function.consumers(name):
                if op.type.startswith("constexpr") or name in op.inputs.get(
                    _WEIGHT_ARGUMENTS.get(op.type, ""), ()
                ):
                    continue
                if (
                    op.type == "gather"
                    and op.inputs["x"] == (name,)
                    and _reaches(function, op, "indices", inputs)
                ):
                    continue
                yield f"{name} in {function.name} is compressed and read by {op.name} ({op.type})"


def _compressed(function: Function) -> list[str]:
    return [name for name, weight in function.weights.items() if weight.type.startswith("constexpr")]


def _reaches(function: Function, op: Operation, argument: str, inputs: set[str]) -> bool:
    """The indices of a look-up are token ids: integers that come from an input with two dimensions."""
    two = {f.name for f in function.inputs if len(f.shape) == 2} & inputs
    pending = [a for a in op.inputs.get(argument, ()) if isinstance(a, str)]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in two:
            return True
        if name in seen or name not in function.producers:
            continue
        seen.add(name)
        pending += function.producers[name].arguments
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
        for feature in function.inputs:
            if _flexible(feature):
                yield f"{feature.name} in {function.name} is flexible"


def _shape_ranges(package: MlPackage, profile: str) -> Iterator[str]:
    """A package traced by torch.export declares lengths from 2 on, without a real upper bound."""
    for function in package.functions:
        for feature in (f for f in function.inputs if _flexible(f)):
            for size in feature.shape:
                if not isinstance(size, int) and not 0 < size[1] < UNBOUNDED:
                    yield f"{feature.name} in {function.name} has no upper bound"
    if not any(_decodes(function) for function in package.functions):
        declared = [f"{f.inputs[0].name} {list(f.inputs[0].shape)}" for f in package.functions if f.inputs]
        yield f"no function takes a single token ({', '.join(declared)})"


def _decodes(function: Function) -> bool:
    """Every flexible dimension may be 1, and the token ids, an integer input of two dimensions, are one token."""
    for feature in function.inputs:
        ids = feature.dtype == "int32" and len(feature.shape) == 2
        for axis, size in enumerate(feature.shape):
            low = size if isinstance(size, int) else size[0]
            if ((ids and axis == 1) or not isinstance(size, int)) and low > 1:
                return False
    return True


def _state_updates(package: MlPackage, profile: str) -> Iterator[str]:
    """#2188: the write of a traced cache is dropped without a word. And coremltools takes each read of a state for
    the first, so that a later write undoes an earlier one."""
    for function in package.functions:
        for state in function.states:
            reads = {
                o for op in function.consumers(state.name) if op.type == "read_state" for o in op.outputs
            }
            writes = [op for op in function.consumers(state.name) if op.type == "write_state"]
            if not reads:
                yield f"{state.name} in {function.name} is never read"
            if not any(_computed(function, op) for op in writes):
                yield f"{state.name} in {function.name} is read and never updated"
            else:
                yield from _stale(function, state.name)


def _computed(function: Function, write: Operation) -> bool:
    """The value that is stored depends on an update, and is not what was read."""
    pending, seen = [a for a in write.arguments], set[str]()
    while pending:
        name = pending.pop()
        op = function.producers.get(name)
        if op is None or name in seen:
            continue
        seen.add(name)
        if op.type in _UPDATES:
            return True
        pending += op.arguments
    return False


def _stale(function: Function, state: str) -> Iterator[str]:
    """Updates that start from a read which an earlier write has made old."""
    current: set[str] = set()
    for op in function.operations:
        if op.type == "write_state" and state in op.arguments:
            (value,) = op.inputs["data"]
            producer = function.producers.get(str(value))
            if producer is not None and producer.type == "slice_update":
                (source,) = producer.inputs["x"]
                origin = function.producers.get(str(source))
                if origin is not None and origin.type == "read_state" and str(source) not in current:
                    yield f"{producer.name} in {function.name} updates an old read of {state}, undoing what came between"
            current = set()
        elif op.type == "read_state" and state in op.arguments:
            current |= set(op.outputs)


def _scales(package: MlPackage, profile: str) -> Iterator[str]:
    """Scales that float16 hardware takes for what they are, and symmetric codes, as edgellama's recipes make them."""
    for weight in package.weights:
        scale = weight.parts.get("scale")
        if scale is None:
            continue
        values = np.abs(scale.array().astype(np.float64))
        if not np.isfinite(values).all() or (values < SMALLEST_NORMAL).any():
            yield f"{weight.name}: scales from {values.min():.3g} to {values.max():.3g}"
        offset = weight.parts.get("offset")
        if offset is not None and offset.array().any():
            yield f"{weight.name} has an offset"


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
