"""Listing of a .pte: methods, instructions, arguments by value, nodes of delegates, and memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from edgellama.formats.coreml_pte import REFERENCE
from edgellama.formats.listing import Item, Listing, digest
from edgellama.formats.pte import readable, xnnpack_graphs
from edgellama.formats.pte_program import PteProgram

# Names of arguments, as far as messages name them. An operator's last argument is its output.
_ARGUMENTS = {
    "llama::update_cache.out": ("value", "cache", "start_pos"),
    "llama::custom_sdpa.out": (
        *("query", "key_cache", "value_cache", "start_pos", "attn_mask", "dropout_p", "is_causal", "scale"),
    ),
    "llama::custom_quantized_sdpa.out": (
        *("query", "key_cache", "value_cache", "start_pos", "attn_mask", "dropout_p", "is_causal", "scale"),
        *("q_zero_points", "q_scales", "k_zero_points", "k_scales", "v_zero_points", "v_scales"),
    ),
    "aten::slice_copy.Tensor_out": ("input", "dim", "start", "end", "step"),
}
_NO_VALUE = 2**32 - 1  # id of an absent value in an XNNPACK graph
_LITERALS = ("Int", "Bool", "Double", "String")


def list_pte(path: Path, names: Mapping[str, str] | None = None) -> Listing:
    """The listing of the .pte at `path`. Raises BundleError if it is not readable.

    names: names of constants by `digest` of their bytes, for messages.
    """
    with readable(path):
        program = PteProgram.read(path)
        data = program.data
        listing = [
            Item(
                "the file",
                "program",
                {"version": str(data.get("version")), "methods": ", ".join(p["name"] for p in _plans(data))},
            )
        ]
        with _Segments(program) as segments:
            for plan in _plans(data):
                listing += _Method(plan, segments, names or {}).items()
        return listing


def _plans(data: Mapping[str, Any]) -> list[Any]:
    return list(data["execution_plan"])


class _Segments:
    """Bytes behind the program: constants, delegates and named data."""

    def __init__(self, program: PteProgram) -> None:
        self._program = program
        data = program.data
        self._named = {entry["key"]: entry["segment_index"] for entry in data.get("named_data") or ()}
        self._digests: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._file = self._program.path.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, index: int, offset: int = 0, size: int | None = None) -> bytes:
        segment = self._program.data["segments"][index]
        rest = segment["size"] - offset
        self._file.seek(self._program.segments[0] + segment["offset"] + offset)
        return self._file.read(rest if size is None else min(size, rest))

    def named(self, key: str) -> str:
        """Digest of the named data `key`."""
        if key not in self._digests:
            self._digests[key] = digest(self.read(self._named[key]))
        return self._digests[key]

    def constant(self, index: int) -> bytes:
        table = self._program.data["constant_segment"]
        offsets = table["offsets"]
        end = offsets[index + 1] - offsets[index] if index + 1 < len(offsets) else None
        return self.read(table["segment_index"], offsets[index], end)

    def delegate(self, reference: Mapping[str, Any]) -> bytes:
        if reference["location"] == "SEGMENT":
            return self.read(reference["index"])
        return bytes(self._program.data["backend_delegate_data"][reference["index"]]["data"])


class _Method:
    """Entries of one execution plan. Values get numbers in order of their first use."""

    def __init__(self, plan: Mapping[str, Any], segments: _Segments, names: Mapping[str, str]) -> None:
        self.plan, self.segments, self.names = plan, segments, names
        self.name = plan["name"]
        self.numbers: dict[int, int] = {}
        self.digests: dict[int, str] = {}
        calls = (i["instr_args"] for chain in plan["chains"] for i in chain["instructions"])
        # Numbers that a kernel computes. The file holds a placeholder for each.
        self.computed = {call["args"][-1] for call in calls if "op_index" in call}

    def items(self) -> Iterator[Item]:
        plan = self.plan
        chains = plan["chains"]
        yield Item(
            f"method {self.name}",
            "method",
            {"inputs": self._texts(plan["inputs"]), "chains": str(len(chains))},
        )
        delegates = self._graphs()
        for instruction, number in ((i, n) for chain in chains for n, i in enumerate(chain["instructions"])):
            place = f"instruction {number} of {self.name}"
            kind, call = instruction["instr_args_type"], instruction["instr_args"]
            if kind == "KernelCall":
                operator = plan["operators"][call["op_index"]]
                full = operator["name"] + (f".{operator['overload']}" if operator.get("overload") else "")
                yield Item(place, full, self._arguments(full, call["args"]))
            elif kind == "DelegateCall":
                delegate = plan["delegates"][call["delegate_index"]]
                specs = {
                    f"compile spec {s['key']}": digest(bytes(s["value"])) for s in delegate["compile_specs"]
                }
                yield Item(
                    place,
                    f"delegate {delegate['id']}",
                    {**specs, "arguments": self._texts(call["args"])},
                )
                yield from self._delegate(place, call["delegate_index"], delegate, delegates)
            else:
                yield Item(place, kind, {key: str(value) for key, value in sorted(call.items())})
        yield Item(f"outputs of {self.name}", "outputs", {"values": self._texts(plan["outputs"])})
        yield from self._memory()

    def _arguments(self, operator: str, arguments: list[int]) -> dict[str, str]:
        names = _ARGUMENTS.get(operator, ())
        labels = [*names, *(f"argument {i}" for i in range(len(names), len(arguments)))]
        return {label: self._text(index) for label, index in zip(labels, arguments, strict=False)}

    def _texts(self, indices: list[int]) -> str:
        return ", ".join(self._text(index) for index in indices)

    def _text(self, index: int) -> str:
        """A value: a literal, a constant with its hash, or a number with type and largest shape."""
        if index < 0:
            return "none"
        value = self.plan["values"][index]
        kind, content = value.get("val_type", "NONE"), value.get("val", {})
        if kind in _LITERALS and index not in self.computed:
            return str(next(iter(content.values()), None))
        if kind in ("Null", "NONE"):
            return "none"
        if kind.endswith("List"):
            items = content["items"]
            literal = kind in ("DoubleList", "BoolList")
            return f"[{', '.join(map(str, items)) if literal else self._texts(items)}]"
        if kind != "Tensor":
            return self._number(index)
        shape = f"{content['scalar_type'].lower()}{content['sizes']}"
        if content["data_buffer_idx"] and not content.get("allocation_info"):
            return self._constant(index, content, shape)
        layout = "" if content["dim_order"] == sorted(content["dim_order"]) else f" {content['dim_order']}"
        start = (
            ""
            if not content["data_buffer_idx"]
            else f" from {digest(self.segments.constant(content['data_buffer_idx']))}"
        )
        return f"{self._number(index)} {shape}{layout}{start}"

    def _number(self, index: int) -> str:
        return f"%{self.numbers.setdefault(index, len(self.numbers))}"

    def _constant(self, index: int, tensor: Mapping[str, Any], shape: str) -> str:
        if index not in self.digests:
            stored = self.segments.constant(tensor["data_buffer_idx"])
            self.digests[index] = digest(stored[: _nbytes(tensor)])
        content = self.digests[index]
        return f"{self.names.get(content, f'constant {content}')} {shape}"

    def _graphs(self) -> dict[int, Any]:
        """XNNPACK graphs by index of their delegate."""
        delegates = self.plan["delegates"]
        own = [i for i, d in enumerate(delegates) if d["id"] == "XnnpackBackend"]
        graphs = xnnpack_graphs([self.segments.delegate(delegates[i]["processed"]) for i in own])
        return dict(zip(own, graphs, strict=True))

    def _delegate(
        self, place: str, index: int, delegate: Mapping[str, Any], graphs: Mapping[int, Any]
    ) -> Iterator[Item]:
        if index in graphs:
            yield from _Graph(graphs[index], self.segments, place).items()
            return
        payload = self.segments.delegate(delegate["processed"])
        text = digest(payload)
        if payload.startswith(REFERENCE):
            reference = json.loads(payload[len(REFERENCE) :])
            reference.pop("key", None)  # a hash of the package, which has a listing of its own
            text = json.dumps(reference, sort_keys=True)
        yield Item(f"{place}, its payload", delegate["id"], {"content": text})

    def _memory(self) -> Iterator[Item]:
        """Memory of each used value. Two values in one place would overwrite each other."""
        yield Item(f"memory of {self.name}", "memory", {"sizes": str(self.plan["non_const_buffer_sizes"])})
        for index, number in self.numbers.items():
            tensor = self.plan["values"][index]
            if tensor["val_type"] == "Tensor":
                place = tensor["val"].get("allocation_info")
                text = "none" if place is None else ", ".join(str(place[key]) for key in sorted(place))
                yield Item(f"memory of value %{number} of {self.name}", "place", {"place": text})


class _Graph:
    """Entries of one XNNPACK graph, with its constants by their content."""

    def __init__(self, graph: Mapping[str, Any], segments: _Segments, place: str) -> None:
        self.graph, self.segments, self.place = graph, segments, place
        self.values = {}
        for value in graph["xvalues"]:
            union = value["xvalue_union"]
            self.values[union.get("tensor_value", union)["id_out"]] = union
        self.numbers: dict[int, int] = {}

    def items(self) -> Iterator[Item]:
        graph = self.graph
        fields = {"inputs": self._texts(graph["input_ids"]), "external values": str(graph["num_externs"])}
        yield Item(f"{self.place}, its graph", "graph", fields)
        for number, node in enumerate(graph["xnodes"]):
            union = node["xnode_union"]
            fields = {
                key: self._text(value) if key.endswith("_id") else json.dumps(value)
                for key, value in union.items()
                if key != "debug_handle"
            }
            yield Item(f"{self.place}, node {number}", node["xnode_union_type"], fields)
        yield Item(f"{self.place}, its results", "graph", {"outputs": self._texts(graph["output_ids"])})

    def _texts(self, ids: list[int]) -> str:
        return ", ".join(map(self._text, ids))

    def _text(self, identifier: int) -> str:
        if identifier == _NO_VALUE or identifier not in self.values:
            return "none"
        union = self.values[identifier]
        tensor = union.get("tensor_value", union)
        constant = tensor["constant_buffer_idx"]
        known = f"constant {self._content(constant)}" if constant else self._number(identifier)
        scales = dict(union.get("quant_params") or {})
        if scales.get("scale_buffer_idx"):
            scales["scale_buffer_idx"] = self._content(scales["scale_buffer_idx"])
        dtype = tensor["datatype"].removeprefix("xnn_datatype_")
        external = "" if tensor["external_id"] == _NO_VALUE else f" external {tensor['external_id']}"
        quantization = f" {json.dumps(scales, sort_keys=True)}" if scales else ""
        return f"{known} {dtype}{tensor['dims']}{external} flags {tensor['flags']}{quantization}"

    def _number(self, identifier: int) -> str:
        return f"%{self.numbers.setdefault(identifier, len(self.numbers))}"

    def _content(self, index: int) -> str:
        entry = self.graph["constant_data"][index]
        key = entry.get("named_key")
        return self.segments.named(key) if key else f"at {entry['offset']} with {entry['size']} bytes"


def _nbytes(tensor: Mapping[str, Any]) -> int:
    count = 1
    for size in tensor["sizes"]:
        count *= size
    return count * _ITEM_BYTES.get(tensor["scalar_type"], 1)


_ITEM_BYTES = {"FLOAT": 4, "INT": 4, "LONG": 8, "DOUBLE": 8, "HALF": 2, "BFLOAT16": 2, "SHORT": 2}
