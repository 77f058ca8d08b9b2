"""Quantized model -> .pte for the CPUs of Android and iOS, by ExecuTorch and its XNNPACK delegate.

The method is `forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, vocab_size]`, T from 1
to the context. ExecuTorch's own text runner and the Android and iOS LLM classes call it. The KV cache lives
in mutable buffers of the method, written by `llama::update_cache` and read by `llama::custom_sdpa`.

Everything between two attentions is one XNNPACK delegate (export/xnnpack/blocks.py), whose payload is written
directly (export/xnnpack/delegate.py). ExecuTorch traces and lowers only the short program around the
delegates. This program holds the look-up of embeddings, and per layer two updates of the cache, an attention
and a call.

A tied lm_head and embedding are stored twice (28 MB of SmolLM2's 117 MB). The look-up kernel reads its table
from the file, XNNPACK packs its own copy, and neither can read the other's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn

from edgellama.errors import LoweringError
from edgellama.export.xnnpack.blocks import Block, blocks
from edgellama.export.xnnpack.delegate import delegate, shape_program
from edgellama.export.xnnpack.modules import CACHES, ExecutorchEmbedding
from edgellama.export.xnnpack.spool import Spool, spool_beside
from edgellama.host.executorch_versions import proven
from edgellama.host.log_filters import ignored_deprecations
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.model.quantized import QuantizedEmbedding, codes_of, is_plain
from edgellama.targets.executorch import metadata_methods
from edgellama.targets.provenance import Provenance
from edgellama.targets.xnnpack.interface import longest_call
from edgellama.targets.xnnpack.numerics import norm_weight, wide_rope_tables
from edgellama.targets.xnnpack.structure import check_zero_points


def lower_to_xnnpack(model: Llama, path: Path, provenance: Provenance, *, progress: Progress) -> None:
    """Writes the quantized `model` as a .pte at `path`. The model does not change.

    provenance: its recipe gives the kind of KV cache. Of the rest, the file has the hash of the manifest.

    Raises LoweringError if a weight zero point is not 0, because XNNPACK would drop it without a warning.
    """
    zero_points = check_zero_points(model)
    if zero_points.verdict != "pass":
        raise LoweringError(
            f"{zero_points.name}: weight zero points are {zero_points.detail}; XNNPACK stores none",
            remedy="Use a symmetric scheme; edgellama's own recipes are.",
        )
    fast = proven()
    if not fast:
        _check_scales(model)
    with ignored_deprecations(), torch.no_grad(), spool_beside(path) as spool:
        with progress.stage("delegates"):
            parts = list(delegated(model, spool) if fast else blocks(model))
            method = RunnerMethod(model, parts, provenance.recipe.kv_cache)
        with progress.stage("trace"):
            program = traced(method)
        with progress.stage("lower"):
            options = {
                # The verifier does not know the operators of llama:: and quantized_decomposed::.
                "compile_config": EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                "constant_methods": metadata_methods(model, provenance, longest_call(model.context_length)),
            }
            if fast:  # nothing is left to partition; this saves a second run of decompositions
                edge = to_edge(program, **options)
            else:
                edge = to_edge_transform_and_lower(program, partitioner=[_LinearPartitioner()], **options)
        with progress.stage("write"):
            lowered = edge.to_executorch(
                ExecutorchBackendConfig(
                    extract_delegate_segments=True,
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                )
            )
            with path.open("wb") as file:
                lowered.write_to_file(spool.restored(file))
    # The programs hold copies of the weights in reference cycles, and the next steps need the memory.
    del method, program, edge, lowered
    gc.collect()


def _check_scales(model: Llama) -> None:
    """Raises LoweringError for scales that ExecuTorch's own way would round to bfloat16 without a word."""
    for name, module in model.named_modules():
        codes = codes_of(module) if isinstance(module, nn.Linear) else None
        if codes is not None and not is_plain(codes.scales):
            raise LoweringError(
                f"{name}: its scales are no positive bfloat16 numbers, and this version of executorch is not the one that "
                "edgellama writes delegates for",
                remedy="Install the version that edgellama asks for, or leave out target xnnpack.",
            )


def traced(method: RunnerMethod) -> torch.export.ExportedProgram:
    """Exported program of `method`, for calls of 1 to `longest_call` tokens."""
    longest = longest_call(method.context_length)
    return torch.export.export(
        method,
        (torch.zeros(1, min(8, longest), dtype=torch.int64), torch.tensor([0])),
        dynamic_shapes=({1: torch.export.Dim("tokens", max=longest)}, None),
        strict=False,
    )


class _LinearPartitioner(XnnpackPartitioner):  # type: ignore[misc]
    """One XNNPACK partition per linear, quantized or float, for versions of executorch other than `PROVEN`.

    It changes two slow defaults of XnnpackPartitioner through its public parts. Neither changes the
    delegates' bytes (tests/export/test_lower_xnnpack.py compares them):

    - The compile spec `dqlinear_partitioner` makes preprocessing run the one pass that a linear needs, not
      seventeen.
    - linear.default is the only operator to keep, which saves a whole run of decompositions.
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


class RunnerMethod(nn.Module):
    """The method `forward` that the runners call.

    blocks: those of `edgellama.export.xnnpack.blocks`, as modules or as calls of delegates. kv_cache: a
    recipe's.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Llama, blocks: Sequence[nn.Module], kv_cache: str = "float") -> None:
        super().__init__()
        config, decoder = model.config, model.model
        self.context_length = model.context_length
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        table = decoder.embed_tokens
        self.embedding = ExecutorchEmbedding(table) if isinstance(table, QuantizedEmbedding) else table
        self.blocks = nn.ModuleList(blocks)
        layers: list[Any] = list(decoder.layers)
        self.caches = nn.ModuleList(CACHES[kv_cache](layer.self_attn.cache) for layer in layers)
        cos, sin = wide_rope_tables(model)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.norms = nn.ParameterList(norm_weight(norm) for norm in (*norms, decoder.norm))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """tokens int64 [1, T], input_pos int64 [1] -> logits float32 [1, vocab_size]."""
        position: Any = input_pos[0].item()
        length, context = tokens.shape[1], self.context_length
        torch._check(position >= 0)
        torch._check(position < context)
        torch._check(position + length <= context)
        cos, sin = self.cos.narrow(0, position, length), self.sin.narrow(0, position, length)
        norms = iter(self.norms)
        x = self.embedding(tokens)
        q, k, v = self.blocks[0](x, cos, sin, next(norms))
        for number, cache in enumerate(self.caches, start=1):
            y = cache(
                q.view(1, length, self.heads, self.head_dim),
                k.view(1, length, self.kv_heads, self.head_dim),
                v.view(1, length, self.kv_heads, self.head_dim),
                position,
            ).view(1, length, self.heads * self.head_dim)
            if number < len(self.caches):
                x, q, k, v = self.blocks[number](x, y, cos, sin, next(norms), next(norms))
        logits: Tensor = self.blocks[-1](x[:, -1:], y[:, -1:], next(norms), next(norms))[0]
        return logits[:, 0]


def delegated(model: Llama, spool: Spool) -> Iterator[nn.Module]:
    """Yields the blocks of `model` as calls of delegates.

    Each is written to the spool at once, so that copies do not pile up.
    """
    shapes: dict[type[Block], torch.export.ExportedProgram] = {}
    longest = longest_call(model.context_length)
    for block in blocks(model):
        if type(block) not in shapes:
            shapes[type(block)] = shape_program(block, longest)
        yield delegate(block, longest, shapes[type(block)], spool)
