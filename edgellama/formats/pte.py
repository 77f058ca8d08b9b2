"""Reader of .pte files: methods, operators, constants, and every linear inside an XNNPACK delegate.

It reports the contents on disk, not the exporter's intent; `structure.py` of a target compares the two.
ExecuTorch 1.5.1 has no public reader, so its internal deserializers are used, all in this file. The program is
read at once. Weights stay in the file until somebody asks for their bytes.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
from executorch.exir._serialize._flatbuffer import _get_flatc_path
from executorch.exir._serialize._program import (
    _ExtendedHeader,
    _flatbuffer_to_program,
    _get_extended_header,
)
from executorch.exir.schema import (
    BackendDelegateDataReference,
    DataLocation,
    DelegateCall,
    KernelCall,
    Program,
)
from executorch.exir.schema import Tensor as SchemaTensor

from edgellama.errors import BundleError
from edgellama.formats.stored_bytes import Content, StoredBytes
from edgellama.host.executorch_versions import installed_executorch

WEIGHTS = {
    "xnn_datatype_qbint4": "int4",
    "xnn_datatype_qcint4": "int4",
    "xnn_datatype_qcint8": "int8",
    "xnn_datatype_fp32": "float32",
}
_DYNAMIC_INT8 = ("xnn_datatype_qdint8", "xnn_datatype_qpint8")


@dataclass(frozen=True)
class PteLinear:
    """One fully connected node of an XNNPACK delegate.

    Attributes:
        weight: `int4`, `int8` or `float32`.
        group_size: None for one scale per row.
        int8_activations: True if the input is quantized at run time. An integer weight without it is
            computed as if all scales were 1.
        less_data: scales of a second product with the same codes, which is subtracted from the first; empty
            without one.
    """

    weight: str
    shape: tuple[int, int]
    group_size: int | None
    int8_activations: bool
    data: Content = field(repr=False)
    scale_data: Content = field(repr=False)
    bias_data: Content = field(repr=False)
    less_data: Content = field(default=b"", repr=False)

    def values(self) -> npt.NDArray[Any]:
        """Integer codes as int8 [rows, columns], or the float32 weight."""
        data = bytes(self.data)
        if self.weight == "float32":
            return np.frombuffer(data, dtype=np.float32).reshape(self.shape)
        if self.weight == "int8":
            return np.frombuffer(data, dtype=np.int8).reshape(self.shape)
        packed = np.frombuffer(data, dtype=np.uint8)  # even columns in the low nibble, offset by 8
        codes = np.empty((len(packed), 2), np.int8)
        np.bitwise_and(packed, 15, out=codes[:, 0], casting="unsafe")
        np.right_shift(packed, 4, out=codes[:, 1], casting="unsafe")
        codes -= 8
        return codes.reshape(self.shape)

    def scales(self) -> npt.NDArray[np.float32]:
        """float32 [rows, groups]. Stored as bfloat16 for groups, and as float32 for rows."""
        scales = self._scales(self.scale_data)
        return scales - self._scales(self.less_data) if self.less_data else scales

    def _scales(self, data: Content) -> npt.NDArray[np.float32]:
        if self.group_size is None:
            return np.frombuffer(bytes(data), dtype=np.float32).reshape(self.shape[0], 1)
        halves = np.frombuffer(bytes(data), dtype=np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(self.shape[0], -1)

    def split(self, rows: Sequence[int]) -> list[PteLinear]:
        """Splits a product that computes several linears at once. `rows`: rows of each linear, in order."""
        parts, start = [], 0
        for count in rows:
            pieces = (
                data[len(data) * start // self.shape[0] : len(data) * (start + count) // self.shape[0]]
                for data in (self.data, self.scale_data, self.bias_data, self.less_data)
            )
            data, scale_data, bias_data, less_data = pieces
            shape = (count, self.shape[1])
            part = replace(self, shape=shape, data=data, scale_data=scale_data)
            parts.append(replace(part, bias_data=bias_data, less_data=less_data))
            start += count
        return parts

    @property
    def is_sum(self) -> bool:
        """True for one row of float32, which adds up squares."""
        return self.weight == "float32" and self.shape[0] == 1

    @property
    def nbytes(self) -> int:
        return len(self.data) + len(self.scale_data) + len(self.bias_data) + len(self.less_data)


@dataclass(frozen=True)
class PteConstant:
    """A constant tensor, read by ExecuTorch's own kernels."""

    dtype: str
    shape: tuple[int, ...]
    data: Content = field(repr=False)


@dataclass(frozen=True)
class PteFile:
    """Contents of a .pte. Calls, linears, constants and buffers are of `forward`, or else the first method.

    Attributes:
        methods: Values of the constant methods by name; None for methods that compute.
        operators: Number of calls by operator name.
        backends: Number of delegate calls by backend name.
        linears: Products with the model's weights, in order of execution.
        sums: Linears with one row of float32, which add up squares.
        graphs: One string per XNNPACK delegate, in order of execution, for comparison. It has operators and
            shapes, but not the contents of constants or the schemes of integer weights.
        planned_bytes: Size of the planned buffers.
    """

    bytes: int
    methods: Mapping[str, Any]
    operators: Mapping[str, int]
    backends: Mapping[str, int]
    linears: tuple[PteLinear, ...]
    sums: tuple[PteLinear, ...]
    constants: tuple[PteConstant, ...]
    graphs: tuple[str, ...]
    planned_bytes: int


@dataclass(frozen=True)
class _Opened:
    """Program of a .pte, and the places of its weights.

    Attributes:
        segments: in the order of the program's list.
        size: bytes of the file.
    """

    program: Program
    segments: tuple[StoredBytes, ...]
    size: int

    def named(self) -> dict[str, StoredBytes]:
        """Named data by key."""
        return {entry.key: self.segments[entry.segment_index] for entry in self.program.named_data or ()}

    def delegate(self, place: BackendDelegateDataReference) -> bytes:
        """Payload of a delegate."""
        if place.location == DataLocation.SEGMENT:
            return bytes(self.segments[place.index])
        return bytes(self.program.backend_delegate_data[place.index].data)

    def constants(self) -> list[Content]:
        """Constant tensors by index, each with the padding behind it."""
        table = self.program.constant_segment
        if not table or not table.offsets:
            return [bytes(buffer.storage) for buffer in self.program.constant_buffer]
        segment = self.segments[table.segment_index]
        ends = [*table.offsets[1:], len(segment)]
        return [segment[start:end] for start, end in zip(table.offsets, ends, strict=True)]


def read_pte(path: Path) -> PteFile:
    """Reads the .pte at `path`. Raises BundleError if it is not readable."""
    with readable(path):
        return _describe(_opened(path))


def constant_methods(path: Path) -> dict[str, Any]:
    """Values of the methods that only return constants, by name. Raises BundleError as `read_pte` does."""
    with readable(path):
        methods = _constant_methods(_opened(path).program)
        return {name: x for name, x in methods.items() if x is not None}


def delegate_data(path: Path, backend: str) -> tuple[list[bytes], dict[str, bytes]]:
    """(blobs of the delegates of `backend` in all methods, named data by key).

    Raises BundleError if the file is not readable.
    """
    with readable(path):
        file = _opened(path)
        blobs = [
            file.delegate(delegate.processed)
            for plan in file.program.execution_plan
            for delegate in plan.delegates
            if delegate.id == backend
        ]
        return blobs, {key: bytes(value) for key, value in file.named().items()}


def _opened(path: Path) -> _Opened:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_ExtendedHeader.NUM_HEAD_BYTES)
        if head[4:6] != b"ET":
            raise ValueError("no ExecuTorch identifier at byte 4")
        header = _get_extended_header(head)
        segmented = header is not None and header.is_valid()
        file.seek(0)
        program = _flatbuffer_to_program(file.read(header.program_size if segmented else size))
    base = header.segment_base_offset if segmented else 0
    segments = program.segments if base else []
    for number, segment in enumerate(segments):
        if base + segment.offset + segment.size > size:
            raise ValueError(f"segment {number} ends behind the file")
    places = (StoredBytes(path, base + segment.offset, segment.size) for segment in segments)
    return _Opened(program, tuple(places), size)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Context for reading the .pte at `path`. Raises BundleError instead of any error inside."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}", remedy="Check the path.") from error
    except Exception as error:  # a damaged file can raise anything in the internal readers
        raise BundleError(
            f"{path}: not a readable .pte of ExecuTorch {installed_executorch()} ({type(error).__name__}: {error})",
            remedy="The file is damaged or of another version; export it again.",
        ) from error


def _describe(file: _Opened) -> PteFile:
    program = file.program
    forward = next((p for p in program.execution_plan if p.name == "forward"), program.execution_plan[0])
    operators: Counter[str] = Counter()
    backends: Counter[str] = Counter()
    delegates: list[int] = []
    for chain in forward.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if isinstance(call, KernelCall):
                operator = forward.operators[call.op_index]
                operators[operator.name + (f".{operator.overload}" if operator.overload else "")] += 1
            elif isinstance(call, DelegateCall):
                backends[forward.delegates[call.delegate_index].id] += 1
                delegates.append(call.delegate_index)
    payloads = [
        file.delegate(forward.delegates[i].processed)
        for i in delegates
        if forward.delegates[i].id == "XnnpackBackend"
    ]
    named = file.named()
    graphs = xnnpack_graphs(payloads)
    products = [linear for graph in graphs for linear in _linears(graph, named)]
    return PteFile(
        bytes=file.size,
        methods=_constant_methods(program),
        operators=dict(sorted(operators.items())),
        backends=dict(sorted(backends.items())),
        linears=tuple(linear for linear in products if not linear.is_sum),
        sums=tuple(linear for linear in products if linear.is_sum),
        constants=tuple(_constants(file, forward)),
        graphs=tuple(_without_content(graph) for graph in graphs),
        planned_bytes=sum(forward.non_const_buffer_sizes),
    )


def _constant_methods(program: Program) -> dict[str, Any]:
    """Values of methods that only return constants (`get_vocab_size`, …), None for those that compute."""
    methods: dict[str, Any] = {}
    for plan in program.execution_plan:
        values = [
            getattr(plan.values[i].val, _VALUE_FIELDS.get(type(plan.values[i].val).__name__, ""), None)
            for i in plan.outputs
        ]
        constant = not any(chain.instructions for chain in plan.chains)
        methods[plan.name] = (values[0] if len(values) == 1 else values) if constant else None
    return methods


_VALUE_FIELDS = {"Int": "int_val", "Bool": "bool_val", "Double": "double_val", "String": "string_val"}


def _constants(file: _Opened, plan: Any) -> Iterator[PteConstant]:
    seen: set[int] = set()
    constants = file.constants()
    for value in plan.values:
        tensor = value.val
        if (
            isinstance(tensor, SchemaTensor)
            and tensor.data_buffer_idx > 0
            and tensor.data_buffer_idx not in seen
        ):
            seen.add(tensor.data_buffer_idx)
            dtype, shape = tensor.scalar_type.name.lower(), tuple(tensor.sizes)
            storage = constants[tensor.data_buffer_idx]
            yield PteConstant(dtype, shape, _without_padding(storage, dtype, shape))


_ITEM_BYTES = {"byte": 1, "char": 1, "bool": 1, "short": 2, "half": 2, "bfloat16": 2, "int": 4, "float": 4}
_ALIGNMENT = 16  # bytes, of constants in a .pte


def _without_padding(storage: Content, dtype: str, shape: tuple[int, ...]) -> Content:
    """`storage` without the zeros that align the next constant."""
    size = math.prod(shape) * _ITEM_BYTES.get(dtype, 8)
    padding = storage[size:]
    return storage[:size] if len(padding) < _ALIGNMENT and not any(bytes(padding)) else storage


def xnnpack_graphs(payloads: list[bytes]) -> list[dict[str, Any]]:
    """XNNPACK graphs of delegate payloads, as JSON from one run of flatc."""
    if not payloads:
        return []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        schema = folder / "schema.fbs"
        schema.write_bytes(_get_schema_bytes())
        binaries = []
        for number, payload in enumerate(payloads):
            header = XNNHeader.from_bytes(bytes(payload[: XNNHeader.EXPECTED_LENGTH]))
            binaries.append(folder / f"{number}.bin")
            start = header.flatbuffer_offset
            binaries[-1].write_bytes(payload[start : start + header.flatbuffer_size])
        options = ["--json", "--defaults-json", "--strict-json", "--raw-binary", "-o", str(folder)]
        command = [_get_flatc_path(), *options, str(schema), "--", *map(str, binaries)]
        completed = subprocess.run(command, capture_output=True, check=False)
        if completed.returncode:  # flatc prints the reason on its last line, below its options
            reason = completed.stderr.decode(errors="replace").strip().rpartition("\n")[2].strip()
            raise ValueError(f"an XNNPACK delegate cannot be decoded: {reason}")
        return [json.loads(binary.with_suffix(".json").read_bytes()) for binary in binaries]


def _without_content(graph: dict[str, Any]) -> str:
    values = []
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value")
        if tensor is not None and tensor["constant_buffer_idx"]:
            union = {"tensor_value": {**tensor, "datatype": "integer"}}
        values.append(union)
    return json.dumps(
        {**graph, "xvalues": values, "constant_data": len(graph["constant_data"])}, sort_keys=True
    )


def _linears(graph: dict[str, Any], named: Mapping[str, StoredBytes]) -> Iterator[PteLinear]:
    values = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        values[tensor["id_out"]] = (tensor, union.get("quant_params") or {})

    def constant(index: int) -> StoredBytes:
        return named[graph["constant_data"][index]["named_key"]]

    def product(node: dict[str, Any]) -> PteLinear:
        tensor, quantization = values[node["filter_id"]]
        source, _ = values[node["input1_id"]]
        rows, columns = tensor["dims"]
        scale_index = quantization.get("scale_buffer_idx", 0)
        bias = values.get(node["bias_id"])
        return PteLinear(
            weight=WEIGHTS[tensor["datatype"]],
            shape=(rows, columns),
            group_size=quantization.get("group_size"),
            int8_activations=source["datatype"] in _DYNAMIC_INT8,
            data=constant(tensor["constant_buffer_idx"]),
            scale_data=constant(scale_index) if scale_index else b"",
            bias_data=constant(bias[0]["constant_buffer_idx"]) if bias else b"",
        )

    nodes = [(node["xnode_union_type"], node["xnode_union"]) for node in graph["xnodes"]]
    products = {
        n["output_id"]: (n["input1_id"], product(n)) for kind, n in nodes if kind == "XNNFullyConnected"
    }
    for kind, node in nodes:
        if kind == "XNNSubtract" and {node["input1_id"], node["input2_id"]} <= products.keys():
            (source, first), (other, second) = products[node["input1_id"]], products[node["input2_id"]]
            if source == other and _is_pair(first, second):
                products[node["input1_id"]] = source, replace(first, less_data=second.scale_data)
                del products[node["input2_id"]]
    for _, linear in products.values():
        yield linear


def _is_pair(first: PteLinear, second: PteLinear) -> bool:
    """Returns True for two products with the same codes, of which the second adds no bias."""
    alike = replace(second, scale_data=first.scale_data, bias_data=first.bias_data) == first
    return alike and bool(first.scale_data) and not any(bytes(second.bias_data))
