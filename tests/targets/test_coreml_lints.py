"""Faults of real conversions, each caught by the lint of that name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.optimize import coreml as cto
from torch import Tensor, nn

from edgellama.formats.mlpackage import read_mlpackage
from edgellama.host.log_filters import coremltools_quiet
from edgellama.runtimes.mil.interpreter import MilModel
from edgellama.targets.coreml.lints import LINTS, lint

HEADS, WIDTH, POSITIONS = 2, 64, 32


class Attention(nn.Module):
    """One layer with RoPE and a cache, written as Llama conversions are."""

    cache: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, *, positions: int = POSITIONS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH, bias=False)
        self.embed = nn.Embedding(100, HEADS * WIDTH)
        angles = torch.outer(torch.arange(positions).float(), 1e4 ** (-torch.arange(0, 1, 2 / WIDTH)))
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1))
        self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), -1))
        self.register_buffer("cache", torch.zeros(1, HEADS, positions, WIDTH))

    def rotate(self, x: Tensor, begin: Any, end: Any) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * self.cos[begin:end] + torch.cat((-high, low), -1) * self.sin[begin:end]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        end, count = mask.shape[-1], ids.shape[1]
        begin = end - count
        shape = (1, count, HEADS, WIDTH)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in self.qkv(self.embed(ids)).chunk(3, -1))
        self.cache[:, :, begin:end] = self.rotate(k, begin, end)
        keys = self.cache[:, :, :end]
        scores = self.rotate(q, begin, end) @ keys.transpose(-1, -2) / 8 + self.masked(mask)
        y: Tensor = torch.softmax(scores, -1) @ keys + v
        return y

    def masked(self, mask: Tensor) -> Tensor:
        return mask


class WrongMask(Attention):
    """The mask that older versions of transformers make."""

    def masked(self, mask: Tensor) -> Tensor:
        return (mask < 0).float() * torch.finfo(torch.float32).min


class DroppedWrite(Attention):
    """Write of the single position of a decode step, which coremltools drops (apple/coremltools #2188)."""

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        q, k, _ = (t.reshape(1, HEADS, 1, WIDTH) for t in self.qkv(self.embed(ids)).chunk(3, -1))
        self.cache[:, :, position] = k
        y: Tensor = q @ self.cache.transpose(-1, -2)
        return y


class LookedUp(nn.Module):
    """RoPE as in transformers, with position ids as an input, and a residual, a norm and a tied output.

    The embeddings take every part that they take in a Llama.
    """

    cos: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        angles = torch.outer(torch.arange(1, 129).float(), 1e4 ** (-torch.arange(0, 1, 1 / WIDTH)))
        self.register_buffer("cos", angles.cos())

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids)
        h = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        x = x + self.q(h) * self.cos[positions]
        y: Tensor = x @ self.embed.weight.T
        return y


class ConstantUpdate(nn.Module):
    """Write of a constant. It happens, but its value was not computed."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, HEADS, POSITIONS, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        self.cache[:, :, 3:4] = torch.ones(1, HEADS, 1, WIDTH)
        return self.cache.sum(-1) + ids


def state(positions: int = POSITIONS) -> Any:
    """State of the cache for a conversion."""
    wrapped = ct.TensorType(shape=(1, HEADS, positions, WIDTH), dtype=np.float16)
    return ct.StateType(wrapped_type=wrapped, name="cache")


def convert(
    module: nn.Module, *, positions: int = POSITIONS, low: int = 1, high: int | None = None, **options: Any
) -> Any:
    """Converts with lengths from `low` to `high`, by default all positions of the cache."""
    length = ct.RangeDim(low, high or positions, default=low)
    inputs = [
        ct.TensorType(name="ids", shape=(1, length), dtype=np.int32),
        ct.TensorType(
            name="mask", shape=(1, 1, length, ct.RangeDim(low, high or positions)), dtype=np.float16
        ),
    ]
    with coremltools_quiet():
        traced = torch.jit.trace(
            module.eval(), (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 5)), check_trace=False
        )
        return ct.convert(
            traced,
            inputs=inputs,
            states=[state(positions)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            **options,
        )


FailedLints = dict[str, str]


def lints(model: Any, path: Path, profile: str = "gpu") -> FailedLints:
    """Name and detail of each failed lint, read from the saved file."""
    with coremltools_quiet():
        model.save(str(path))
    checks = lint(read_mlpackage(path), profile=profile)
    assert [c.name for c in checks] == [f"structure.{name}" for name in LINTS]
    return {c.name.removeprefix("structure."): c.detail for c in checks if c.verdict != "pass"}


@pytest.fixture(scope="module")
def healthy_model() -> Any:
    """Core ML model of `Attention`, without a fault."""
    return convert(Attention())


def test_a_healthy_model_passes(healthy_model: Any, tmp_path: Path) -> None:
    assert lints(healthy_model, tmp_path / "m.mlpackage") == {}


def test_a_cache_write_that_coremltools_drops(tmp_path: Path) -> None:
    with coremltools_quiet():
        traced = torch.jit.trace(
            DroppedWrite().eval(),
            (torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2])),
            check_trace=False,
        )
        model = ct.convert(
            traced,
            inputs=[
                ct.TensorType(name="ids", shape=(1, 1), dtype=np.int32),
                ct.TensorType(name="position", shape=(1,), dtype=np.int32),
            ],
            states=[state()],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    failed = lints(model, tmp_path / "m.mlpackage")
    assert failed == {"state_updates": "cache in main is read and never updated"}


def quantized(model: Any, **options: Any) -> Any:
    """Linear quantization of every weight of 512 or more values, as a global configuration."""
    with coremltools_quiet():
        config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=512, **options)
        return cto.linear_quantize_weights(model, cto.OptimizationConfig(config))


def test_rope_tables_that_a_global_configuration_quantizes(healthy_model: Any, tmp_path: Path) -> None:
    failed = lints(quantized(healthy_model, dtype="int8"), tmp_path / "m.mlpackage")
    assert list(failed) == ["tables", "scales"]  # a sine of position 0 has a scale of 0
    assert "cos" in failed["tables"] and "sin" in failed["tables"]
    assert "qkv" not in failed["tables"] and "embed" not in failed["tables"]


def test_rope_tables_in_which_positions_are_looked_up(tmp_path: Path) -> None:
    """Embeddings are looked up too, without a fault."""
    tokens = torch.zeros(1, 3, dtype=torch.int32)
    with coremltools_quiet():
        program = torch.export.export(LookedUp().eval(), (tokens, tokens)).run_decompositions({})
        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    failed = lints(quantized(model, dtype="int8"), tmp_path / "m.mlpackage")
    assert "cos" in failed["tables"] and "(mul)" in failed["tables"]
    assert "embed" not in failed["tables"] and ";" not in failed["tables"]
    by_name = read_mlpackage(tmp_path / "m.mlpackage").functions[0].weights
    assert {name: w.scheme for name, w in by_name.items() if "embed" in name} == {
        "p_embed_weight_to_fp16_quantized": "int8 channel"
    }


def test_a_cache_write_of_a_constant(tmp_path: Path) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int32)
    with coremltools_quiet():
        traced = torch.jit.trace(ConstantUpdate().eval(), (ids,), check_trace=False)
        model = ct.convert(
            traced,
            inputs=[ct.TensorType(name="ids", shape=(1, 1), dtype=np.int32)],
            states=[state()],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    path = tmp_path / "m.mlpackage"
    assert lints(model, path) == {"state_updates": "cache in main is read and never updated"}
    assert read_mlpackage(path).operators["write_state"] == 1  # unlike the dropped write


@pytest.mark.parametrize(
    ("precision", "detail"), [("FLOAT16", "multiplies by -inf"), ("FLOAT32", "reads 3.4e+38, beyond float16")]
)
@pytest.mark.slow
def test_a_mask_of_the_smallest_float32(precision: str, detail: str, tmp_path: Path) -> None:
    failed = lints(convert(WrongMask(), compute_precision=ct.precision[precision]), tmp_path / "m.mlpackage")
    assert list(failed) == ["masks"]
    assert detail in failed["masks"]
    if precision == "FLOAT16":  # the interpreter shows NaN, as a phone would
        model = MilModel(tmp_path / "m.mlpackage")
        mask = torch.zeros(1, 1, 1, 1).half()
        ids = torch.tensor([[1]], dtype=torch.int32)
        (y,) = model.predict({"ids": ids, "mask": mask}, None, model.make_state()).values()
        assert y.isnan().all()


@pytest.mark.parametrize(
    ("granularity", "expected"), [("per_block", ["block_weights"]), ("per_channel", []), ("per_tensor", [])]
)
@pytest.mark.slow
def test_weights_with_a_scale_for_each_block_on_the_neural_engine(
    granularity: str, expected: list[str], tmp_path: Path
) -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.SiLU())
    with coremltools_quiet():
        program = torch.export.export(module.eval(), (torch.zeros(1, 64),)).run_decompositions({})
        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    model = quantized(model, dtype="int4", granularity=granularity, block_size=32)
    assert list(lints(model, tmp_path / "m.mlpackage", "ane")) == expected
    assert list(lints(model, tmp_path / "n.mlpackage", "gpu")) == []


def test_flexible_shapes_and_odd_states_on_the_neural_engine(healthy_model: Any, tmp_path: Path) -> None:
    assert list(lints(healthy_model, tmp_path / "m.mlpackage", "ane")) == ["static_shapes"]
    odd = convert(Attention(positions=270), positions=270)
    failed = lints(odd, tmp_path / "n.mlpackage", "ane")
    assert sorted(failed) == ["state_dimensions", "static_shapes"]
    assert failed["state_dimensions"] == "cache in main: 270 is no multiple of 32"
    assert lints(odd, tmp_path / "o.mlpackage", "gpu") == {}


@pytest.mark.slow
def test_a_declared_range_without_decode(tmp_path: Path) -> None:
    """Dim.AUTO of torch.export gives lengths from 2 on, without an upper bound."""
    length, span = torch.export.Dim.AUTO, torch.export.Dim.AUTO
    with coremltools_quiet():
        program = torch.export.export(
            Attention().eval(),
            (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 5)),
            dynamic_shapes=({1: length}, {2: length, 3: span}),
            strict=False,
        ).run_decompositions({})
        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    failed = lints(model, tmp_path / "m.mlpackage")
    assert "no function takes a single token" in failed["shape_ranges"]
    assert "has no upper bound" in failed["shape_ranges"]
    assert list(lints(convert(Attention(), low=2), tmp_path / "n.mlpackage")) == ["shape_ranges"]


def test_a_declared_range_beyond_the_cache(tmp_path: Path) -> None:
    failed = lints(convert(Attention(), high=128), tmp_path / "m.mlpackage")
    assert list(failed) == ["shape_ranges"]
    assert "mask in main reaches to 128, beyond its states" in failed["shape_ranges"]


def test_a_declared_range_that_ends_before_the_cache(tmp_path: Path) -> None:
    failed = lints(convert(Attention(), high=POSITIONS // 2), tmp_path / "m.mlpackage")
    assert failed == {"shape_ranges": "the shapes of main end at 16, its states at 32 or 64"}


def test_a_size_that_depends_on_a_value_on_the_neural_engine(tmp_path: Path) -> None:
    spec = [mb.TensorSpec((8, 32), types.fp16), mb.TensorSpec((2,), types.int32)]

    @mb.program(input_specs=spec, opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(x: Any, end: Any) -> Any:
        return mb.reduce_sum(x=mb.slice_by_index(x=x, begin=[0, 0], end=end, name="filled"), axes=[0, 1])

    with coremltools_quiet():
        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    detail = lints(model, tmp_path / "m.mlpackage", "ane")["static_shapes"]
    assert (
        detail.startswith("filled")
        and "(slice_by_index) has a size that is only known when it runs" in detail
    )
    assert "static_shapes" not in lints(model, tmp_path / "n.mlpackage")


Change = Callable[[Any], None]


def declare_older(spec: Any) -> None:
    """Declares iOS 17 for operators of iOS 18, as in a hand-edited package."""
    function = spec.mlProgram.functions["main"]
    function.block_specializations["CoreML7"].CopyFrom(function.block_specializations["CoreML8"])
    del function.block_specializations["CoreML8"]
    function.opset = "CoreML7"
    spec.specificationVersion = 8


def declare_older_than_an_argument(spec: Any) -> None:
    """Declares iOS 15, which knows the operator but not all of its arguments here."""
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations["CoreML8"]
    gather = next(op for op in block.operations if op.type == "gather")
    assert {"batch_dims", "validate_indices"} & gather.inputs.keys()
    serialized = [gather.SerializeToString()]
    needed = {a.name for x in gather.inputs.values() for a in x.arguments}
    for op in reversed(list(block.operations)):
        if any(output.name in needed for output in op.outputs):
            serialized.append(op.SerializeToString())
            needed |= {a.name for x in op.inputs.values() for a in x.arguments}
    operation_type = type(gather)
    del block.operations[:]
    block.operations.extend(operation_type.FromString(data) for data in reversed(serialized))
    declare_older(spec)
    function.block_specializations["CoreML5"].CopyFrom(function.block_specializations["CoreML7"])
    del function.block_specializations["CoreML7"]
    function.opset = "CoreML5"


def read_stale(spec: Any) -> None:
    """Adds a second state update from the value that the first one read, which undoes the first."""
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    position = next(i for i, op in enumerate(block.operations) if op.type == "write_state")
    again = [block.operations[i] for i in range(position + 1)]
    update = next(op for op in again if op.type == "slice_update")
    copies = []
    for op in (update, again[-1]):
        copied = type(op)()
        copied.CopyFrom(op)
        copies.append(copied)
    copies[0].outputs[0].name = "second"
    copies[1].inputs["data"].arguments[0].name = "second"
    rest = [type(op).FromString(op.SerializeToString()) for op in block.operations]
    del block.operations[:]
    block.operations.extend([*rest[: position + 1], *copies, *rest[position + 1 :]])


@pytest.mark.parametrize(
    ("change", "name", "detail"),
    [
        (declare_older, "deployment_target", "needs specification version 9, CoreML7 is declared"),
        (declare_older_than_an_argument, "deployment_target", "(gather) needs specification version"),
        (read_stale, "state_updates", "updates an old read of cache, undoing what came between"),
    ],
    ids=["older", "older argument", "stale"],
)
def test_altered_programs(change: Change, name: str, detail: str, healthy_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage"
    healthy_model.save(str(path))
    spec = ct.utils.load_spec(str(path))
    change(spec)
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())
    failed = {c.name: c.detail for c in lint(read_mlpackage(path), profile="gpu") if c.verdict != "pass"}
    assert detail in failed[f"structure.{name}"]


def test_attention_of_the_healthy_model_matches_torch() -> None:
    """The module for planted faults matches torch's own attention."""
    module, ids = Attention().eval(), torch.randint(0, 100, (1, 5))
    mask = torch.full((1, 1, 5, 5), -torch.inf).triu(1)
    with torch.no_grad():
        y = module(ids, mask)
        q, k, v = (
            t.reshape(1, 5, HEADS, WIDTH).transpose(1, 2) for t in module.qkv(module.embed(ids)).chunk(3, -1)
        )
        keys = module.rotate(k, 0, 5)
        expected = F.scaled_dot_product_attention(module.rotate(q, 0, 5), keys, keys, attn_mask=mask) + v
    torch.testing.assert_close(y, expected)
