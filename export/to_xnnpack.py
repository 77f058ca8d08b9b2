"""Quantized model -> .pte for the CPUs of Android and iOS, by ExecuTorch and its XNNPACK delegate.

The method is `forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, vocab_size]`, T from 1 to the
context: what ExecuTorch's own text runner and the Android and iOS LLM classes call. The KV cache lives in mutable
buffers of the method, written by `llama::update_cache` and read by `llama::custom_sdpa`.

Linears go to XNNPACK, which multiplies int8 activations by int4 or int8 weights; the rest runs on ExecuTorch's own
kernels. A tied lm_head and embedding are stored twice: the look-up kernel reads its table from the file, XNNPACK
packs its own copy, and neither can read the other's (28 MB of SmolLM2's 117 MB).
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

import edgellama.executorch_libraries  # noqa: F401  registers llama::* and quantized_decomposed::*
from edgellama.errors import LoweringError
from edgellama.export.codes import INT4
from edgellama.export.quantize import QuantizedEmbedding
from edgellama.identity import Identity
from edgellama.llama import KVCache, Llama
from edgellama.progress import Progress
from edgellama.quiet import ignored_deprecations
from edgellama.structure_xnnpack import check_zero_points
from edgellama.xnnpack_artifact import metadata_methods


def lower_to_xnnpack(model: Llama, path: Path, identity: Identity, *, progress: Progress) -> None:
    """Write the quantized `model` as a .pte at `path`. The model itself is left as it was.

    identity: not in the file; a .pte has no room for descriptions.

    Raises LoweringError for a weight zero point, which XNNPACK would drop without a word.
    """
    zero_points = check_zero_points(model)
    if zero_points.verdict != "pass":
        raise LoweringError(
            f"{zero_points.name}: weight zero points are {zero_points.detail}; XNNPACK stores none",
            remedy="Use a symmetric scheme; edgellama's own recipes are.",
        )
    context = model.context_length
    tokens = torch.zeros(1, min(8, context), dtype=torch.int64)
    with ignored_deprecations():
        with progress.stage("trace"), torch.no_grad():
            program = torch.export.export(
                _Method(_for_xnnpack(model)),
                (tokens, torch.tensor([0])),
                dynamic_shapes=({1: torch.export.Dim("tokens", max=context)}, None),
                strict=False,
            )
        with progress.stage("lower"):
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[_LinearPartitioner()],
                # The verifier does not know the operators of llama:: and quantized_decomposed::.
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                constant_methods=metadata_methods(model),
            )
        with progress.stage("write"):
            lowered = edge.to_executorch(
                ExecutorchBackendConfig(
                    extract_delegate_segments=True,
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                )
            )
            with path.open("wb") as file:
                lowered.write_to_file(file)
    # The programs hold copies of the weights in reference cycles; what follows needs the memory.
    del program, edge, lowered
    gc.collect()


class _LinearPartitioner(XnnpackPartitioner):  # type: ignore[misc]
    """One XNNPACK partition a linear, quantized or float.

    Two settings that XnnpackPartitioner leaves at slow defaults, both through its public parts and both without
    effect on the delegates' bytes (tests/test_xnnpack.py compares): the compile spec `dqlinear_partitioner` makes
    preprocessing run the one pass that a linear needs instead of seventeen, and naming linear.default as the only
    operator to keep saves a whole run of decompositions.
    """

    def __init__(self) -> None:
        super().__init__(
            configs=[LinearConfig],
            config_precisions=[ConfigPrecisionType.DYNAMIC_QUANT, ConfigPrecisionType.FP32],
        )
        spec = CompileSpec("dqlinear_partitioner", b"")
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [spec])

    def ops_to_not_decompose(self, ep: torch.export.ExportedProgram) -> tuple[list[Any], None]:
        return [torch.ops.aten.linear.default], None


class _Method(nn.Module):
    """`forward` as the runners call it."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.llama = model

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        position: Any = input_pos[0].item()
        length, context = tokens.shape[1], self.llama.context_length
        torch._check(position >= 0)
        torch._check(position < context)
        torch._check(position + length <= context)
        return self.llama.last_logits(tokens, position)


def _for_xnnpack(model: Llama) -> Llama:
    """A copy of the module tree that shares the weights, with the modules that XNNPACK lowers in its own way."""
    weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
    lowered = copy.deepcopy(model, weights)
    for name, module in list(lowered.named_modules()):
        replacement = _replacement(module)
        if replacement is not None:
            lowered.set_submodule(name, replacement)
    return lowered


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, KVCache):
        return _ExecutorchCache(module)
    if isinstance(module, QuantizedEmbedding):
        return _ExecutorchEmbedding(module)
    if isinstance(module, nn.Linear) and isinstance(module.weight, IntxUnpackedToInt8Tensor):
        return _DecomposedLinear(module.weight, module.bias)
    return None


class _ExecutorchCache(nn.Module):
    """The cache and attention of `edgellama.llama.KVCache`, by ExecuTorch's operators."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, source: KVCache) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros_like(source.k_cache), persistent=False)
        self.register_buffer("v_cache", torch.zeros_like(source.v_cache), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        torch.ops.llama.update_cache(k, self.k_cache, position)
        torch.ops.llama.update_cache(v, self.v_cache, position)
        y: Tensor = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, position, None, 0, True)
        return y


class _ExecutorchEmbedding(nn.Module):
    """The look-up as its kernel's own operator, so that no fusion pass has to find it."""

    values: Tensor
    scales: Tensor

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        self.register_buffer("values", source.values)
        self.register_buffer("scales", source.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = torch.ops.quantized_decomposed.embedding_byte.dtype(
            self.values, self.scales, None, -128, 127, tokens, dtype=torch.float32
        )
        return rows


class _DecomposedLinear(nn.Module):
    """A quantized linear in the operators that XNNPACK's partitioner looks for.

    torchao's own tensor traces to the same .pte bytes, but through Python functions that are traced again by every
    pass; these are leaves with shape functions, which makes tracing three and lowering two times faster.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None) -> None:
        super().__init__()
        group = weight.block_size[1]
        self.group_size = group if group != weight.shape[1] else None
        self.code_range = (-8, 7) if weight.target_dtype == INT4 else (-128, 127)
        shape = weight.scale.shape if self.group_size else (-1,)
        self.register_buffer("values", weight.qdata)
        self.register_buffer("scales", weight.scale.reshape(shape))
        self.register_buffer("zeros", weight.zero_point.reshape(shape))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        ops, (low, high) = torch.ops.quantized_decomposed, self.code_range
        scales, zeros = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        q = ops.quantize_per_token.default(x, scales, zeros, -128, 127, torch.int8)
        x = ops.dequantize_per_token.default(q, scales, zeros, -128, 127, torch.int8, torch.float32)
        if self.group_size:
            weight = ops.dequantize_per_channel_group.default(
                self.values, self.scales, self.zeros, low, high, torch.int8, self.group_size, torch.float32
            )
        else:
            weight = ops.dequantize_per_channel.default(
                self.values, self.scales, self.zeros, 0, low, high, torch.int8
            )
        return F.linear(x, weight, self.bias)
