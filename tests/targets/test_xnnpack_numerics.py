"""XNNPACK's arithmetic in torch, against the scalar formula and against XNNPACK itself."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.data import read_bytes
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.export.xnnpack.blocks import Normalize
from edgellama.export.xnnpack.function_programs import FUNCTIONS, program
from edgellama.export.xnnpack.lower import _LinearPartitioner
from edgellama.export.xnnpack.modules import DecomposedLinear
from edgellama.host import executorch_libraries
from edgellama.host.log_filters import ignored_deprecations
from edgellama.host.threads import one_thread
from edgellama.model.activations import quantize_activations
from edgellama.model.llama import RMSNorm, SiLU
from edgellama.model.quantized import Codes, apply_codes, codes_of
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Scheme
from edgellama.targets.xnnpack.functions import CHUNK, file_name, rsqrt, sigmoid
from edgellama.targets.xnnpack.numerics import (
    XnnpackLinear,
    XnnpackRMSNorm,
    XnnpackSiLU,
    norm_weight,
    xnnpack_numerics,
)
from tests.helpers.paths import ROOT

F32 = np.float32
COLUMNS, ROWS, TOKENS = 576, 40, 48


def activations() -> Tensor:
    """Rows of very different size, with outliers, constants of both signs, zeros, and one-sided values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, COLUMNS, generator=generator) * torch.logspace(-6, 4, TOKENS)[:, None]
    x[::4, 5] *= 100
    x[1] = 0
    x[2] = 3.25
    x[3] = -1e-3
    x[5], x[6] = x[5].abs(), -x[6].abs()
    x[7, 1:] = 0
    return x


def quantize_row(row: npt.NDArray[np.float32]) -> tuple[list[int], np.float32]:
    """Scalar xnn_f32_qd8_asymmetric_quantization_params, and the conversion after it."""
    low, high = min(F32(row.min()), F32(0)), max(F32(row.max()), F32(0))
    scale = F32(1) if low == high else F32(255) / F32(high - low)
    from_low, from_high = F32(low * scale), F32(high * scale)
    if F32(F32(-128) + from_low) + F32(F32(127) + from_high) > 0:
        zero_point = F32(-128) - from_low
    else:
        zero_point = F32(127) - from_high
    zero = round(float(min(max(zero_point, F32(-128)), F32(127))))  # ties to even, as nearbyint
    codes = [round(float(min(max(F32(v * scale), F32(-128 - zero)), F32(127 - zero)))) for v in row]
    return codes, F32(F32(1) / scale)


def test_activations_are_quantized_by_the_formula() -> None:
    x = activations()
    q, scales = quantize_activations(x)
    for row in range(TOKENS):
        codes, scale = quantize_row(x[row].numpy())
        assert q[row].tolist() == codes, row
        assert float(scales[row, 0]) == float(scale), row
    assert float(q.abs().max()) <= 255
    assert {len(set(q[row].tolist())) for row in (1, 2, 3)} == {1}


def test_rows_do_not_influence_one_another() -> None:
    x = activations()
    q, scales = quantize_activations(x[None])
    assert torch.equal(q[0, 9:10], quantize_activations(x[9:10])[0])
    assert torch.equal(scales[0, 9:10], quantize_activations(x[9:10])[1])


def quantized_linear(scheme: Scheme, bias: bool) -> nn.Linear:
    """Linear with codes of a random weight with outliers."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Module()
    model.linear = nn.Linear(COLUMNS, ROWS, bias=bias)
    weight = 0.1 * torch.randn(ROWS, COLUMNS, generator=generator)
    weight[:, ::97] *= 10
    if bias:
        model.linear.bias = nn.Parameter(torch.randn(ROWS, generator=generator), requires_grad=False)
    apply_codes(model, "linear", round_to_grid(weight, scheme))  # type: ignore[arg-type]
    linear = model.linear
    assert isinstance(linear, nn.Linear)
    return linear


def decomposed(linear: nn.Linear) -> DecomposedLinear:
    """The same linear in the form that is lowered."""
    codes = codes_of(linear)
    assert codes is not None
    return DecomposedLinear(codes, linear.bias)


def run_in_executorch(module: nn.Module, x: Tensor, partitioner: XnnpackPartitioner | None = None) -> Tensor:
    """Lowers `module` with edgellama's partitioner or `partitioner`, and runs the .pte in ExecuTorch."""
    with ignored_deprecations(), torch.no_grad():
        dynamic = ({0: torch.export.Dim("tokens", max=TOKENS)},)
        program = torch.export.export(module, (x[:8],), dynamic_shapes=dynamic, strict=False)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[partitioner or _LinearPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        # From memory: a file's constants of elementwise operators are freed once it is loaded.
        loaded = executorch_libraries.runtime().load_program(edge.to_executorch().buffer)
    method = loaded.load_method("forward")
    assert method is not None
    y: Tensor = method.execute([x])[0]
    return y


@pytest.mark.parametrize(
    ("scheme", "bias"),
    [
        (Scheme(4, PerGroup(32)), False),
        (Scheme(4, PerGroup(64)), True),
        (Scheme(4, PerChannel()), True),
        (Scheme(8, PerChannel()), False),
        (Scheme(8, PerChannel()), True),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else "bias" if value else "",
)
@pytest.mark.slow
def test_a_linear_matches_xnnpack(scheme: Scheme, bias: bool) -> None:
    linear, x = quantized_linear(scheme, bias), activations()
    actual = XnnpackLinear(linear.weight, linear.bias)(x)
    expected = run_in_executorch(decomposed(linear), x)
    assert bool(torch.isfinite(expected).all())
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    assert float(error.max()) <= 1e-6
    # Unquantized activations differ far more, so these rows tell the two apart.
    plain = torch.nn.functional.linear(x, linear.weight.dequantize(), linear.bias)
    assert float(((plain - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).median()) > 1e-3


class _Norm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.normalize = Normalize(norm)
        self.register_buffer("weight", norm_weight(norm))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.normalize(x, self.weight)
        return y


@pytest.mark.slow
def test_a_norm_rounds_as_xnnpack_rounds() -> None:
    norm, x = RMSNorm(COLUMNS, 1e-5), activations()
    norm.weight.data = 1 + 0.1 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(2))
    norm.requires_grad_(False)
    expected = run_in_executorch(_Norm(norm), x, XnnpackPartitioner())
    assert torch.equal(XnnpackRMSNorm(norm)(x), expected)
    torch.testing.assert_close(expected, norm(x), rtol=3e-5, atol=1e-7)
    assert not torch.equal(norm(x), expected), "torch's own order of summing would not do"


def test_the_activation_function_rounds_as_xnnpack_rounds() -> None:
    x = activations()
    expected = run_in_executorch(SiLU(), x, XnnpackPartitioner())
    assert torch.equal(XnnpackSiLU(SiLU())(x), expected)
    torch.testing.assert_close(expected, SiLU()(x), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("shape", [(), (1, 1), (3, 5, 7), (2, CHUNK)])
def test_xnnpacks_functions_are_the_true_ones_within_a_few_ulp(shape: tuple[int, ...]) -> None:
    x = 10 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    positive = x.abs() + 1e-12
    for actual, exact in (
        (sigmoid(x), torch.sigmoid(x.double())),
        (rsqrt(positive), positive.double().rsqrt()),
    ):
        assert actual.shape == shape and actual.dtype == torch.float32
        assert float(((actual.double() - exact) / exact).abs().max()) < 6e-7  # 5 units in the last place


@pytest.mark.parametrize("name", FUNCTIONS)
def test_packaged_programs_equal_those_lowered_here(name: str) -> None:
    assert read_bytes(file_name(name)) == program(name)


@pytest.mark.slow
def test_running_a_program_needs_no_compiler() -> None:
    """The compilers of ExecuTorch and torch would add five seconds to every `edgellama run`.

    Both can be imported afterwards.
    """
    script = (
        "import sys\n"
        "from edgellama.host.executorch_libraries import runtime\n"
        "assert len(runtime().operator_registry.operator_names) >= 268\n"
        "assert not {'executorch.exir', 'torch._inductor'} & set(sys.modules)\n"
        "import executorch.exir._warnings as warnings\n"
        "from executorch.exir import to_edge\n"
        "import executorch\n"
        "assert executorch.exir._warnings is warnings\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=ROOT)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here")
def test_attention_sums_the_same_on_every_thread() -> None:
    """MKL's order of sums depends on its threads: one in ExecuTorch's pool, and in our own calls."""
    assert executorch_libraries.threads() >= 1
    count = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")).mkl_serv_get_max_threads
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.append(count()))
    thread.start()
    thread.join()
    assert counts == [1]
    assert count() == torch.get_num_threads()
    with one_thread():
        assert count() == 1


@pytest.mark.parametrize("columns", [512, 513, 2048])
def test_sums_are_exact_for_rows_of_any_length(columns: int) -> None:
    """Worst case: all products are largest and of one sign. float32 alone would lose the last bits."""
    values = torch.full((3, columns), 127, dtype=torch.int8)
    model = nn.Module()
    model.linear = nn.Linear(columns, 3, bias=False)
    apply_codes(model, "linear", Codes(values, torch.ones(3, 1), Scheme(8, PerChannel())))  # type: ignore[arg-type]
    x = torch.full((1, columns), 255.0)
    x[0, 0] = 254.0
    linear: Any = model.linear
    assert isinstance(linear.weight, IntxUnpackedToInt8Tensor)
    exact = 127 * (255 * (columns - 1) + 254)
    y = XnnpackLinear(linear.weight, None)(x)
    assert y.tolist() == [[float(F32(exact))] * 3]
    assert math.log2(exact) > 23


def test_the_model_is_left_as_it_was(tiny_checkpoint: Checkpoint) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), RECIPES["int4-fast"], 16)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises(RuntimeError, match="inside"), xnnpack_numerics(model):
            assert isinstance(model.lm_head, XnnpackLinear)
            assert not torch.equal(model(tokens), before)
            raise RuntimeError("inside")
        assert isinstance(model.lm_head, nn.Linear)
        assert torch.equal(model(tokens), before)
