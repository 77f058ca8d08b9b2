"""Quantized model -> ONNX graph for ONNX Runtime, in its own operators (domain com.microsoft).

One graph serves prefill and decode. Every quantized linear is a MatMulNBits on the recipe's own codes. If
their schemes are equal, q, k and v form one node, with their rows one below the other. So do gate and up.
This saves some launches per token.

GroupQueryAttention rotates, appends to the cache and attends. SkipSimplifiedLayerNormalization is the
residual sum and the norm after it. The tied table lies in the data file once, under the two shapes that its
two kernels need.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto
from torch import nn

from edgellama.export.onnx.builder import CONTRIB, GraphBuilder, pack_int4
from edgellama.model.llama import DecoderLayer, RMSNorm
from edgellama.model.quantized import Codes, codes_of
from edgellama.targets.onnx.interface import (
    ACCURACY_LEVEL,
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    block_size,
)


class OrtGraph(GraphBuilder):
    """A graph in ONNX Runtime's operators."""

    def build(self) -> None:
        """Adds the nodes and weights of the whole model."""
        decoder = self.llama.model
        self._lengths()
        self.rope_tables()
        x = self._embed()
        layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        first = layers[0].input_layernorm
        h = self.rms_norm(x, first, "model.layers.0.input_layernorm")
        for index, layer in enumerate(layers):
            name = f"model.layers.{index}"
            y = self._attention(h, layer, index)
            h, x = self._skip_norm(x, y, layer.post_attention_layernorm, f"{name}.post_attention_layernorm")
            y = self._mlp(h, layer, f"{name}.mlp")
            last = index + 1 == len(layers)
            after = decoder.norm if last else layers[index + 1].input_layernorm
            following = "model.norm" if last else f"model.layers.{index + 1}.input_layernorm"
            h, x = self._skip_norm(x, y, after, following, keep=not last)
        minus_one = self.constant("last", np.array([-1], np.int64))
        h = self.node("Gather", [h, minus_one], "last_token", axis=1)  # [1, 1, hidden_size]
        self._linear(h, ["lm_head"], "lm_head", output=LOGITS)

    def _lengths(self) -> None:
        """Lengths for GroupQueryAttention, computed from the mask: E - 1 of each sequence, and E."""
        axis, one = self.constant("axis", np.array([1])), self.constant("one", np.array([1], np.int64))
        total = self.node("ReduceSum", [ATTENTION_MASK, axis], "mask_sum", keepdims=0)
        before = self.node("Sub", [total, one], "mask_sum_minus_one")
        self.node("Cast", [before], "seqlens_k", to=TensorProto.INT32)
        width = self.node("Shape", [ATTENTION_MASK], "mask_width", start=1, end=2)
        scalar = self.node("Squeeze", [width], "mask_width_scalar")
        self.node("Cast", [scalar], "total_sequence_length", to=TensorProto.INT32)

    def _embed(self) -> str:
        embedding, name = self.llama.model.embed_tokens, "model.embed_tokens"
        codes = codes_of(embedding)
        if codes is None:
            table = self.weight(f"{name}.weight", embedding.weight.detach().numpy(), key=name)
            return self.node("Gather", [table, INPUT_IDS], name)
        block = block_size(codes.scheme, codes.values.shape[1])
        data = self.weight(f"{name}.weight", packed(codes), shape=codes.values.shape, key=_key(codes))
        scales = self.weight(f"{name}.scales", block_scales(codes), key=(_key(codes), "scales"))
        return self.node(
            "GatherBlockQuantized",
            [data, INPUT_IDS, scales],
            name,
            domain=CONTRIB,
            bits=8,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )

    def _attention(self, x: str, layer: DecoderLayer, index: int) -> str:
        config, name = self.llama.config, f"model.layers.{index}.self_attn"
        projections = [f"{name}.{p}" for p in ("q_proj", "k_proj", "v_proj")]
        if self._joinable(projections):
            rows = [self._linear(x, projections, f"{name}.qkv_proj"), "", ""]
        else:
            rows = [self._linear(x, [projection], projection) for projection in projections]
        y = self.node(
            "GroupQueryAttention",
            [
                *rows,
                PAST_KEY.format(index),
                PAST_VALUE.format(index),
                "seqlens_k",
                "total_sequence_length",
                "cos",
                "sin",
            ],
            name,
            outputs=[f"{name}.attention", PRESENT_KEY.format(index), PRESENT_VALUE.format(index)],
            domain=CONTRIB,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=config.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return self._linear(y, [f"{name}.o_proj"], f"{name}.o_proj")

    def _mlp(self, x: str, layer: DecoderLayer, name: str) -> str:
        projections = [f"{name}.gate_proj", f"{name}.up_proj"]
        if self._joinable(projections):
            both = self._linear(x, projections, f"{name}.gate_up_proj")
            gate, up = f"{name}.gate", f"{name}.up"
            self.node("Split", [both], f"{name}.split", outputs=[gate, up], axis=-1, num_outputs=2)
        else:
            gate, up = (self._linear(x, [projection], projection) for projection in projections)
        return self._linear(self.swiglu(gate, up, name), [f"{name}.down_proj"], f"{name}.down_proj")

    def _skip_norm(self, x: str, y: str, norm: RMSNorm, name: str, *, keep: bool = True) -> tuple[str, str]:
        """(norm of x + y, x + y)."""
        total = f"{name}.input" if keep else ""
        self.node(
            "SkipSimplifiedLayerNormalization",
            [x, y, self.gamma(norm, name)],
            name,
            outputs=[name, "", "", total] if keep else [name],
            domain=CONTRIB,
            epsilon=norm.eps,
        )
        return name, total

    def _module(self, name: str) -> nn.Linear:
        module = self.llama.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def _joinable(self, names: Sequence[str]) -> bool:
        """Returns True if these linears can be one node: all quantized, with the same scheme."""
        members = [codes_of(self._module(name)) for name in names]
        schemes = {codes and codes.scheme for codes in members}
        return len(schemes) == 1 and None not in schemes

    def _linear(self, x: str, names: Sequence[str], name: str, *, output: str | None = None) -> str:
        """x times the weights of `names`, with their rows one below the other, and the change of an adapter."""
        if self.adaptable(names):
            y = self._product(x, names, name, output=f"{name}.base")
            return self.adapted(x, y, names, name, output or name)
        return self._product(x, names, name, output=output)

    def _product(self, x: str, names: Sequence[str], name: str, *, output: str | None = None) -> str:
        modules = [self._module(n) for n in names]
        codes_or_none = [codes_of(module) for module in modules]
        outputs = [output or name]
        bias = None
        if any(module.bias is not None for module in modules):
            biases = [
                np.zeros(m.out_features, np.float32) if m.bias is None else m.bias.detach().numpy()
                for m in modules
            ]
            bias = self.constant(f"{name}.bias", np.concatenate(biases))
        if codes_or_none[0] is None:
            return self._float_linear(x, modules[0], name, outputs[0], bias)
        codes = [c for c in codes_or_none if c is not None]
        row_count, columns = sum(c.values.shape[0] for c in codes), codes[0].values.shape[1]
        scheme = codes[0].scheme
        block = block_size(scheme, columns)
        key = _key(codes[0]) if len(codes) == 1 else name
        weight = self.weight(
            f"{name}.weight",
            stacked([packed(c) for c in codes]),
            shape=(row_count, columns // block, block * scheme.bits // 8),
            key=key,
        )
        scales = self.weight(f"{name}.scales", stacked([block_scales(c) for c in codes]), key=(key, "scales"))
        return self.node(
            "MatMulNBits",
            [x, weight, scales, *(["", "", bias] if bias else [])],
            name,
            outputs=outputs,
            domain=CONTRIB,
            K=columns,
            N=row_count,
            bits=scheme.bits,
            block_size=block,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _float_linear(self, x: str, module: nn.Linear, name: str, output: str, bias: str | None) -> str:
        tied = module.weight is getattr(self.llama.model.embed_tokens, "weight", None)
        own = "model.embed_tokens" if tied else name
        weight = self.weight(f"{own}.weight", module.weight.detach().numpy(), key=own)
        product = f"{name}.product" if bias else output
        y = self.node("FusedMatMul", [x, weight], name, outputs=[product], domain=CONTRIB, transB=1)
        return y if bias is None else self.node("Add", [y, bias], f"{name}.add", outputs=[output])


def packed(codes: Codes) -> np.ndarray:
    """Codes in the layout of MatMulNBits, uint8 [rows, columns * bits / 8].

    8 or 128 means 0, without a zero point.
    """
    values = codes.values.numpy()
    if codes.scheme.bits == 4:
        return pack_int4(values, offset=8)
    shifted: np.ndarray = values.view(np.uint8) ^ np.uint8(128)  # adds 128, with no wider copy
    return shifted


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays one below the other. A single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def block_scales(codes: Codes) -> np.ndarray:
    """The scheme's scales, float32 [rows, columns / block].

    A row's scale is repeated for each of its blocks.
    """
    columns = codes.values.shape[1]
    blocks = columns // block_size(codes.scheme, columns)
    scales = codes.scales.float().numpy()
    repeated: np.ndarray = np.repeat(scales, blocks // scales.shape[1], axis=1)
    return repeated


def _key(codes: Codes) -> int:
    """Key of the codes, the same for modules that share them."""
    return codes.values.data_ptr()
