"""Quantized model -> ONNX graph in the standard's own operators, for engines without ONNX Runtime's.

Opset 23 has Attention, RotaryEmbedding and RMSNormalization, which are also functions that an engine may
inline. Weights are DequantizeLinear on the recipe's codes, in blocks along the rows, [in, out] as MatMul
needs them. ONNX Runtime fuses each of these pairs to a MatMulNBits of its own. Its input stays float at the
accuracy level that edgellama.runtimes.onnx sets. Activations are float32 throughout.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from torch import nn

from edgellama.export.onnx.builder import GraphBuilder, pack_int4
from edgellama.export.onnx.graph_ort import block_scales
from edgellama.model.llama import DecoderLayer
from edgellama.model.quantized import Codes, codes_of
from edgellama.targets.onnx.interface import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    block_size,
)


class PortableGraph(GraphBuilder):
    """A graph in the ONNX standard's operators."""

    def build(self) -> None:
        """Adds the nodes and weights of the whole model."""
        decoder = self.llama.model
        self._positions()
        self.rope_tables()
        x = self._embed()
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            name = f"model.layers.{index}"
            h = self.rms_norm(x, layer.input_layernorm, f"{name}.input_layernorm")
            y = self._attention(h, index, f"{name}.self_attn")
            x = self.node("Add", [x, y], f"{name}.after_attention")
            h = self.rms_norm(x, layer.post_attention_layernorm, f"{name}.post_attention_layernorm")
            x = self.node("Add", [x, self._mlp(h, f"{name}.mlp")], f"{name}.after_mlp")
        x = self.node("Gather", [x, self.constant("last", np.array([-1]))], "last_token", axis=1)
        self._linear(self.rms_norm(x, decoder.norm, "model.norm"), "lm_head", output=LOGITS)

    def _positions(self) -> None:
        """Adds the positions of the call's tokens [1, T] and their visible keys, bool [T, E]."""
        zero, one = self.constant("zero", np.array(0)), self.constant("one", np.array(1))
        scalar = [
            self.node("Squeeze", [self.node("Shape", [x], f"{x}_width", start=1, end=2)], f"{x}_count")
            for x in (ATTENTION_MASK, INPUT_IDS)
        ]
        past = self.node("Sub", scalar, "past_count")
        tokens = self.node("Range", [past, scalar[0], one], "token_positions")
        keys = self.node("Range", [zero, scalar[0], one], "key_positions")
        first, second = (
            self.constant("first_axis", np.array([0])),
            self.constant("second_axis", np.array([1])),
        )
        self.node("Unsqueeze", [tokens, first], "position_ids")
        column = self.node("Unsqueeze", [tokens, second], "token_positions_column")
        causal = self.node("LessOrEqual", [keys, column], "causal_mask")
        given = self.node("Cast", [ATTENTION_MASK], "attention_mask_bool", to=TensorProto.BOOL)
        self.node("And", [causal, given], "visible")

    def _embed(self) -> str:
        embedding, name = self.llama.model.embed_tokens, "model.embed_tokens"
        codes = codes_of(embedding)
        if codes is None:
            table = self.weight(f"{name}.weight", embedding.weight.detach().t().numpy(), key=name)
            columns = self.node("Gather", [table, INPUT_IDS], f"{name}.columns", axis=1)
            return self.node("Transpose", [columns], name, perm=[1, 2, 0])
        # The table has the output layer's layout, [hidden_size, vocab_size]: columns are gathered, not rows.
        table = self._codes(codes, name)
        columns = self.node("Gather", [table, INPUT_IDS], f"{name}.columns", axis=1)
        rows = self.node("Transpose", [columns], f"{name}.rows", perm=[1, 2, 0])
        values = self.node("Cast", [rows], f"{name}.values", to=TensorProto.FLOAT)
        scales = self.constant(f"{name}.row_scales", codes.scales.float().numpy())
        scale = self.node("Gather", [scales, INPUT_IDS], f"{name}.scale")
        return self.node("Mul", [values, scale], name)

    def _attention(self, x: str, index: int, name: str) -> str:
        config = self.llama.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, k, v = (self._linear(x, f"{name}.{p}") for p in ("q_proj", "k_proj", "v_proj"))
        q, k = (
            self.node(
                "RotaryEmbedding", [value, "cos", "sin", "position_ids"], f"{value}.rotated", num_heads=count
            )
            for value, count in ((q, heads), (k, kv_heads))
        )
        y = self.node(
            "Attention",
            [q, k, v, "visible", PAST_KEY.format(index), PAST_VALUE.format(index)],
            name,
            outputs=[f"{name}.attention", PRESENT_KEY.format(index), PRESENT_VALUE.format(index)],
            q_num_heads=heads,
            kv_num_heads=kv_heads,
            scale=config.head_dim**-0.5,
        )
        return self._linear(y, f"{name}.o_proj")

    def _mlp(self, x: str, name: str) -> str:
        gate, up = self._linear(x, f"{name}.gate_proj"), self._linear(x, f"{name}.up_proj")
        return self._linear(self.swiglu(gate, up, name), f"{name}.down_proj")

    def _linear(self, x: str, name: str, *, output: str | None = None) -> str:
        """x times the weight of `name`, and the change of an adapter."""
        if self.adaptable([name]):
            y = self._product(x, name, output=f"{name}.base")
            return self.adapted(x, y, [name], name, output or name)
        return self._product(x, name, output=output)

    def _product(self, x: str, name: str, *, output: str | None = None) -> str:
        module = self.llama.get_submodule(name)
        assert isinstance(module, nn.Linear)
        codes = codes_of(module)
        result, has_bias = output or name, module.bias is not None
        if codes is None:
            tied = module.weight is getattr(self.llama.model.embed_tokens, "weight", None)
            own = "model.embed_tokens" if tied else name
            matrix = self.weight(f"{own}.weight", module.weight.detach().t().numpy(), key=own)
        else:
            block = block_size(codes.scheme, codes.values.shape[1])
            scales = self.weight(f"{name}.scales", np.ascontiguousarray(block_scales(codes).T))
            matrix = self.node(
                "DequantizeLinear",
                [self._codes(codes, name), scales],
                f"{name}.dequantized",
                axis=0,
                block_size=block,
            )
        product = f"{name}.matmul" if has_bias else result
        y = self.node("MatMul", [x, matrix], f"{name}.matmul", outputs=[product])
        if not has_bias:
            return y
        bias = self.constant(f"{name}.bias", module.bias.detach().numpy())
        return self.node("Add", [y, bias], f"{name}.add", outputs=[result])

    def _codes(self, codes: Codes, name: str) -> str:
        """Integers [in, out]. Modules that share their codes get the same tensor."""
        table = codes_of(self.llama.model.embed_tokens)
        shared = table is not None and table.values.data_ptr() == codes.values.data_ptr()
        own = "model.embed_tokens" if shared else name
        values = np.ascontiguousarray(codes.values.t().numpy())
        if codes.scheme.bits == 8:
            return self.weight(f"{own}.weight", values)
        return self.weight(
            f"{own}.weight", pack_int4(values, offset=0), shape=values.shape, dtype=TensorProto.INT4
        )
