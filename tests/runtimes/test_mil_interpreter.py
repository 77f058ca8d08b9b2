"""Reference interpreter on packages from other sources than edgellama, and its refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from coremltools.optimize import coreml as cto
from torch import Tensor, nn

from edgellama.errors import BundleError, UsageError
from edgellama.host.log_filters import coremltools_quiet
from edgellama.runtimes.mil import interpreter
from edgellama.runtimes.mil.interpreter import MilModel
from tests.helpers.mil_programs import save


class Block(nn.Module):
    """Attention and a gated MLP on [1, 6, 64]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(1, -1, 4, 16).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 64)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Convolutions(nn.Module):
    """Small image network with the usual layers of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, groups=4),
            nn.Hardtanh(-1.0, 2.0),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers(x), -1)


def convert(module: nn.Module, example: Tensor, **options: Any) -> Any:
    """Converts as in the documentation of coremltools."""
    with coremltools_quiet():
        program = torch.export.export(module.eval(), (example,)).run_decompositions({})
        return ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            **options,
        )


@pytest.fixture(scope="module")
def converted_block() -> tuple[Block, Any]:
    """`Block` in torch and converted to float32 Core ML."""
    return Block().eval(), convert(Block(), torch.zeros(1, 6, 64), compute_precision=ct.precision.FLOAT32)


Compress = Callable[[Any], Any]
COMPRESSIONS: dict[str, Compress] = {
    "none": lambda model: model,
    "int8 per channel": lambda model: cto.linear_quantize_weights(
        model, cto.OptimizationConfig(cto.OpLinearQuantizerConfig(mode="linear_symmetric"))
    ),
    "int8 with offsets": lambda model: cto.linear_quantize_weights(
        model, cto.OptimizationConfig(cto.OpLinearQuantizerConfig(mode="linear", dtype="uint8"))
    ),
    "int4 per block": lambda model: cto.linear_quantize_weights(
        model,
        cto.OptimizationConfig(
            cto.OpLinearQuantizerConfig(
                mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=16
            )
        ),
    ),
    "palettized 6 bit": lambda model: cto.palettize_weights(
        model, cto.OptimizationConfig(cto.OpPalettizerConfig(mode="kmeans", nbits=6, num_kmeans_workers=1))
    ),
    "palettized 4 bit in groups": lambda model: cto.palettize_weights(
        model,
        cto.OptimizationConfig(
            cto.OpPalettizerConfig(
                mode="kmeans", nbits=4, granularity="per_grouped_channel", group_size=8, num_kmeans_workers=1
            )
        ),
    ),
    "palettized in vectors": lambda model: cto.palettize_weights(
        model,
        cto.OptimizationConfig(
            cto.OpPalettizerConfig(mode="kmeans", nbits=4, cluster_dim=2, num_kmeans_workers=1)
        ),
    ),
    "pruned": lambda model: cto.prune_weights(
        model, cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.6))
    ),
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_packages_of_plain_coremltools_recipes(
    name: str, converted_block: tuple[Block, Any], tmp_path: Path
) -> None:
    """The package matches torch with the weights that coremltools itself decompresses."""
    module, model = converted_block
    with coremltools_quiet():
        compressed = COMPRESSIONS[name](model)
        compressed.save(str(tmp_path / "compressed.mlpackage"))
        uncompressed = cto.decompress_weights(compressed) if name != "none" else compressed
        uncompressed.save(str(tmp_path / "plain.mlpackage"))
    decompressed = with_weights(module, uncompressed)
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(3))
    interpreted = MilModel(tmp_path / "compressed.mlpackage")
    (y,) = interpreted.predict({"x": x}).values()
    with torch.no_grad():
        torch.testing.assert_close(y, decompressed(x), rtol=1e-4, atol=1e-4)
        distance = float((y - module(x)).abs().max())
    assert (distance < 1e-4) == (name == "none")  # compression is visible
    kinds = {op.type for op in interpreted.functions["main"].operations}
    assert any(kind.startswith("constexpr") for kind in kinds) == (name != "none")


def with_weights(module: nn.Module, model: Any) -> nn.Module:
    """Copy of `module` with the constants of a package's program, matched by shape and closeness."""
    consts = [
        op.outputs[0].val
        for op in model._mil_program.functions["main"].operations
        if op.op_type == "const" and isinstance(op.outputs[0].val, np.ndarray)
    ]
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        candidates = [c for c in consts if c.shape == tuple(parameter.shape)]
        array = parameter.detach().numpy()
        best = min(candidates, key=lambda c: float(np.abs(c - array).sum()))
        parameter.data = torch.from_numpy(np.array(best, dtype=np.float32))
    return copied


def test_a_network_of_convolutions(tmp_path: Path) -> None:
    module, x = Convolutions().eval(), torch.randn(2, 3, 32, 32)
    convert(module, x, compute_precision=ct.precision.FLOAT32).save(str(tmp_path / "c.mlpackage"))
    (y,) = MilModel(tmp_path / "c.mlpackage").predict({"x": x}).values()
    with torch.no_grad():
        torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)


class Accumulator(nn.Module):
    """Adds its input to a state and returns twice the sum."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 2


def stateful(length: int, path: Path) -> Path:
    """Writes a package of `Accumulator`."""
    with coremltools_quiet():
        traced = torch.jit.trace(Accumulator().eval(), torch.zeros(length, 4))
        state = ct.StateType(ct.TensorType(shape=(1, 4), dtype=np.float16), name="total")
        model = ct.convert(
            traced,
            inputs=[ct.TensorType(shape=(length, 4), name="x", dtype=np.float16)],
            outputs=[ct.TensorType(name="y", dtype=np.float16)],
            states=[state],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def test_a_state_lives_from_call_to_call_and_from_function_to_function(tmp_path: Path) -> None:
    parts = {name: stateful(1, tmp_path / f"{name}.mlpackage") for name in ("one", "two")}
    functions = ct.utils.MultiFunctionDescriptor()
    for name, part in parts.items():
        functions.add_function(str(part), "main", name)
    functions.default_function_name = "two"
    with coremltools_quiet():
        ct.utils.save_multifunction(functions, str(tmp_path / "both.mlpackage"))
    model = MilModel(tmp_path / "both.mlpackage")
    assert (model.default_function, sorted(model.functions)) == ("two", ["one", "two"])
    state, untouched_state, total = model.make_state(), model.make_state(), torch.zeros(1, 4)
    for step, function in enumerate(["one", None, "two", "one"]):
        x = torch.full((1, 4), float(step + 1)).half()
        total += x
        assert torch.equal(model.predict({"x": x}, function, state)["y"], (2 * total).half())
    assert torch.equal(state["total"], total)
    assert not untouched_state["total"].any()


def cache_program(*, keep_old: bool) -> Function:
    """Program that writes one row into a state. Outputs the state after, and before with `keep_old`."""
    specs = {
        "row": mb.TensorSpec((1, 4), types.fp16),
        "at": mb.TensorSpec((1,), types.int32),
        "cache": mb.StateTensorSpec((8, 4), types.fp16),
    }
    with Function(specs, ct.target.iOS18) as function:
        cache, at = function.inputs["cache"], function.inputs["at"]
        old = mb.read_state(input=cache)
        zero, four = np.array([0], np.int32), np.array([4], np.int32)
        begin = mb.concat(values=[at, zero], axis=0)
        end = mb.concat(values=[mb.add(x=at, y=np.array([1], np.int32)), four], axis=0)
        view = mb.transpose(x=old, perm=[1, 0])
        new = mb.slice_update(x=old, update=function.inputs["row"], begin=begin, end=end)
        after = mb.coreml_update_state(state=cache, value=new)
        outputs = [mb.mul(x=after, y=np.float16(1), name="after")]
        if keep_old:
            outputs.append(mb.mul(x=view, y=np.float16(1), name="before"))
        function.set_outputs(outputs)
    return function


@pytest.mark.parametrize("keep_old", [False, True])
def test_updates_happen_in_place_unless_the_old_value_is_used(keep_old: bool, tmp_path: Path) -> None:
    model = MilModel(save(cache_program(keep_old=keep_old), tmp_path / "cache.mlpackage"))
    state = model.make_state()
    memory = state["cache"].data_ptr()
    expected = torch.zeros(8, 4)
    for at in (3, 0, 3):
        row = torch.randn(1, 4).half()
        outputs = model.predict({"row": row, "at": torch.tensor([at], dtype=torch.int32)}, None, state)
        if keep_old:
            assert torch.equal(outputs["before"].float(), expected.T)
        expected[at] = row
        assert torch.equal(outputs["after"].float(), expected)
        assert torch.equal(state["cache"], expected)
    if not keep_old:
        assert state["cache"].data_ptr() == memory


def test_a_state_may_be_replaced_by_a_view_of_itself(tmp_path: Path) -> None:
    specs = {"x": mb.TensorSpec((1,), types.fp16), "square": mb.StateTensorSpec((3, 3), types.fp16)}
    with Function(specs, ct.target.iOS18) as function:
        transposed = mb.transpose(x=mb.read_state(input=function.inputs["square"]), perm=[1, 0])
        after = mb.coreml_update_state(state=function.inputs["square"], value=transposed)
        function.set_outputs([mb.add(x=after, y=function.inputs["x"])])
    model = MilModel(save(function, tmp_path / "square.mlpackage"))
    state = model.make_state()
    state["square"] += torch.arange(9.0).reshape(3, 3)
    model.predict({"x": torch.zeros(1).half()}, None, state)
    assert torch.equal(state["square"], torch.arange(9.0).reshape(3, 3).T)


def quantized_per_tensor(seed: int, path: Path) -> Path:
    """Package of a linear with int8 weights. Its single scale lies in the program, not in weight.bin."""
    codes = np.random.default_rng(seed).integers(-127, 127, (64, 64)).astype(np.int8)
    with Function({"x": mb.TensorSpec((1, 64), types.fp16)}, ct.target.iOS18) as function:
        scale = np.full((1, 1), 0.01, np.float16)
        weight = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name="weight")
        function.set_outputs([mb.linear(x=function.inputs["x"], weight=weight, name="y")])
    return save(function, path)


@pytest.mark.slow
def test_functions_share_weights_that_are_equal_and_no_others(tmp_path: Path) -> None:
    """Names do not identify weights: they stand for equal weights in `a` and `b`, and for others in `c`."""
    descriptor, x, expected = ct.utils.MultiFunctionDescriptor(), {"x": torch.randn(1, 64).half()}, {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        part = quantized_per_tensor(seed, tmp_path / f"{name}.mlpackage")
        descriptor.add_function(str(part), "main", name)
        expected[name] = MilModel(part).predict(x)["y"]
    descriptor.default_function_name = "a"
    with coremltools_quiet():
        ct.utils.save_multifunction(descriptor, str(tmp_path / "all.mlpackage"))
    model = MilModel(tmp_path / "all.mlpackage")
    assert len(model._weights) == 2
    for name, y in expected.items():
        assert torch.equal(model.predict(x, name)["y"], y)
    assert not torch.equal(expected["a"], expected["c"])


def test_a_table_in_float16_gives_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float16)
    with Function({"ids": mb.TensorSpec((1, 3), types.int32)}, ct.target.iOS18) as function:
        rows = mb.gather(x=table, indices=function.inputs["ids"], axis=0)
        function.set_outputs([mb.add(x=rows, y=np.float16(1), name="y")])
    monkeypatch.setattr(interpreter, "FLOAT32_BUDGET", 0)
    model = MilModel(save(function, tmp_path / "table.mlpackage"))
    (weight,) = model._weights.values()
    monkeypatch.setattr(weight, "tensor", lambda: pytest.fail("the whole table was widened"))
    ids = torch.tensor([[7, 0, 99]], dtype=torch.int32)
    assert torch.equal(model.predict({"ids": ids})["y"], torch.tensor(table)[ids.long()] + 1)


@pytest.mark.parametrize(("precision", "stored_dtype"), [("FLOAT16", torch.float16), ("FLOAT32", None)])
def test_weights_beyond_the_budget_are_held_in_less_memory(
    precision: str, stored_dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results stay the same, bit for bit."""
    package = tmp_path / "b.mlpackage"
    converted = convert(Block(), torch.zeros(1, 6, 64), compute_precision=ct.precision[precision])
    with coremltools_quiet():
        COMPRESSIONS["int8 per channel"](converted).save(str(package))
    x = {"x": torch.randn(1, 6, 64)}
    (expected,) = MilModel(package).predict(x).values()
    monkeypatch.setattr(interpreter, "FLOAT32_BUDGET", 0)
    narrow = MilModel(package)
    dtypes = {w._kept.dtype if w._kept is not None else None for w in narrow._weights.values()}
    assert dtypes == {stored_dtype}
    (actual,) = narrow.predict(x).values()
    assert torch.equal(expected, actual)


def test_overflow_is_counted_and_masks_are_not(tmp_path: Path) -> None:
    specs = {name: mb.TensorSpec((2, 2), types.fp16) for name in ("x", "mask")}
    with Function(specs, ct.target.iOS18) as function:
        squared = mb.mul(x=function.inputs["x"], y=function.inputs["x"], name="squared")
        masked = mb.softmax(x=mb.add(x=function.inputs["x"], y=function.inputs["mask"], name="sum"), axis=1)
        blocked = mb.fill(shape=np.array([2, 2], np.int32), value=np.float16(-np.inf), name="blocked")
        function.set_outputs([squared, masked, blocked])
    model = MilModel(save(function, tmp_path / "m.mlpackage"), observe=True)
    mask = torch.tensor([[0, -torch.inf], [0, 0]]).half()
    model.predict({"x": torch.full((2, 2), 10.0).half(), "mask": mask})
    assert (model.ranges["squared"].largest, model.ranges["squared"].nonfinite) == (100.0, 0)
    assert model.ranges["sum"].nonfinite == model.ranges["blocked"].nonfinite == 0
    assert model.ranges["sum"].largest == 10.0  # of unmasked values
    model.predict({"x": torch.tensor([[300.0, 2], [3, -400]]).half(), "mask": mask})
    assert model.ranges["squared"].nonfinite == 2


@pytest.mark.parametrize(("size", "count"), [(1.0, 0), (300.0, 9)])
def test_products_inside_of_fused_attention_are_seen(size: float, count: int, tmp_path: Path) -> None:
    """300 * 300 is beyond float16, although the output of the attention is not."""
    specs = {name: mb.TensorSpec((1, 1, 3, 8), types.fp16) for name in ("q", "k", "v")}
    with Function(specs, ct.target.iOS18) as function:
        q, k, v = (function.inputs[name] for name in ("q", "k", "v"))
        function.set_outputs([mb.scaled_dot_product_attention(query=q, key=k, value=v, name="y")])
    model = MilModel(save(function, tmp_path / "a.mlpackage"), observe=True)
    large = torch.full((1, 1, 3, 8), size).half()
    model.predict({"q": large, "k": large, "v": torch.ones(1, 1, 3, 8).half()})
    assert model.ranges["y"].nonfinite == 0
    assert model.ranges.get("y.scores", interpreter.Range()).nonfinite == count


def test_inputs_that_core_ml_refuses_are_refused_by_name(tmp_path: Path) -> None:
    package = save(cache_program(keep_old=False), tmp_path / "cache.mlpackage")
    model = MilModel(package)
    good = {"row": torch.zeros(1, 4).half(), "at": torch.tensor([0], dtype=torch.int32)}
    state = model.make_state()
    for inputs, message in (
        ({"at": good["at"]}, "input 'row' is missing"),
        ({**good, "mask": good["row"]}, "input 'mask' is not declared"),
        (
            {**good, "row": torch.zeros(2, 4).half()},
            r"'row' has the shape \[2, 4\], the package declares \[1, 4\]",
        ),
        ({**good, "row": torch.zeros(4).half()}, r"'row' has the shape \[4\]"),
        ({**good, "row": torch.zeros(1, 4)}, "'row' is torch.float32, the package declares float16"),
    ):
        with pytest.raises(UsageError, match=message):
            model.predict(inputs, None, state)
    with pytest.raises(UsageError, match="keeps a state"):
        model.predict(good)
    with pytest.raises(UsageError, match=r"'cache' has the shape \[9, 4\], the package declares \[8, 4\]"):
        model.predict(good, None, {"cache": torch.zeros(9, 4)})
    with pytest.raises(UsageError, match="'cache' is missing"):
        model.predict(good, None, {})
    with pytest.raises(BundleError, match=r"\(slice_update\) cannot be computed"):
        model.predict({**good, "at": torch.tensor([8], dtype=torch.int32)}, None, state)
    with pytest.raises(UsageError, match="no function 'prefill'"):
        model.predict(good, "prefill", state)


@pytest.mark.slow
def test_an_unknown_operator_is_refused_at_load(tmp_path: Path) -> None:
    with Function({"x": mb.TensorSpec((4,), types.fp32)}, ct.target.iOS18) as function:
        function.set_outputs([mb.acos(x=function.inputs["x"], name="angle")])
    package = save(function, tmp_path / "acos.mlpackage")
    with pytest.raises(BundleError, match=r"does not know operator acos \('angle'\)"):
        MilModel(package)


@pytest.mark.slow
def test_flexible_shapes_are_held_to_their_ranges(tmp_path: Path) -> None:
    with coremltools_quiet():
        traced = torch.jit.trace(nn.Linear(4, 3).eval(), torch.zeros(2, 4))
        model = ct.convert(
            traced,
            inputs=[ct.TensorType(shape=(ct.RangeDim(2, 5, default=2), 4), name="x", dtype=np.float16)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "range.mlpackage"))
    interpreted = MilModel(tmp_path / "range.mlpackage")
    for length in range(1, 8):
        x = {"x": torch.zeros(length, 4).half()}
        if 2 <= length <= 5:
            assert [tuple(y.shape) for y in interpreted.predict(x).values()] == [(length, 3)]
        else:
            with pytest.raises(UsageError, match=r"the package declares \[2\.\.5, 4\]"):
                interpreted.predict(x)


@pytest.mark.slow
def test_enumerated_shapes_are_the_only_ones(tmp_path: Path) -> None:
    with coremltools_quiet():
        model = ct.convert(
            torch.jit.trace(nn.Linear(4, 3).eval(), torch.zeros(1, 4)),
            inputs=[ct.TensorType(shape=ct.EnumeratedShapes([(1, 4), (5, 4)]), name="x", dtype=np.float16)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "shapes.mlpackage"))
    interpreted = MilModel(tmp_path / "shapes.mlpackage")
    for length in (1, 5):
        assert len(interpreted.predict({"x": torch.zeros(length, 4).half()})) == 1
    with pytest.raises(UsageError, match=r"\[3, 4\], the package declares \[1, 4\] or \[5, 4\]"):
        interpreted.predict({"x": torch.zeros(3, 4).half()})
