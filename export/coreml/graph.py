"""Quantized model -> MIL program: Core ML's graph, built operator by operator from the model's tensors.

coremltools' MIL builder makes the graph. It is not traced from torch, for two reasons:
- Every silent fault of traced packages comes from the tracing front end. Examples are a dropped cache write,
  a declared range that excludes decode, and an epsilon that the float16 pass raises.
- The codes stay as they are: one `constexpr_blockwise_shift_scale` per weight, named after it.

`parity` measures the difference between this graph and the torch model.

Everything is float16. Two places are arranged for that, both equal to the model's formula:
- RMSNorm divides by the largest magnitude first, because squares of a Llama's residual stream pass 65504.
- Query heads that share a key head are stacked along the positions, so that keys and values are never
  repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from coremltools import target
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
from torch import Tensor, nn

from edgellama.errors import LoweringError
from edgellama.model.llama import Attention, DecoderLayer, Llama, RMSNorm
from edgellama.model.quantized import Codes, codes_of
from edgellama.targets.coreml.interface import (
    INPUT_IDS,
    KEY_CACHE,
    LOGITS,
    MASK,
    NEW_KEYS,
    NEW_VALUES,
    POSITION,
    VALUE_CACHE,
    CoremlForm,
    cache_shape,
)

Var = Any  # a value of the graph; coremltools has no type for it
OPSET = target.iOS18
# Smallest divisor of RMSNorm: the square of a larger reciprocal would leave float16.
SMALLEST_DIVISOR = np.float16(2.0**-6)


def build_program(model: Llama, form: CoremlForm) -> Program:
    """`model` as the MIL function `main`, in the form `form`.

    Raises LoweringError if float16 cannot hold a weight or a scale.
    """
    tokens = form.tokens or get_new_symbol()
    span = form.mask_width(model.context_length) or get_new_symbol()
    shape = cache_shape(model.config, model.context_length)
    cache = mb.StateTensorSpec if form.stateful else mb.TensorSpec
    inputs = {
        INPUT_IDS: mb.TensorSpec((1, tokens), types.int32),
        MASK: mb.TensorSpec((1, 1, tokens, span), types.fp16),
        **({POSITION: mb.TensorSpec((1,), types.int32)} if form.tokens else {}),
        KEY_CACHE: cache(shape, types.fp16),
        VALUE_CACHE: cache(shape, types.fp16),
    }
    with Function(inputs, OPSET) as function:
        function.set_outputs(_Graph(model, form, function.inputs).outputs())
    program = Program()
    program.add_function("main", function)
    return program


class _Graph:
    """The function's operators, in order of the forward pass."""

    def __init__(self, model: Llama, form: CoremlForm, inputs: Mapping[str, Var]) -> None:
        self.model, self.form, self.inputs = model, form, inputs
        self.weights: dict[tuple[int, int], Var] = {}
        self.states = {
            name: mb.read_state(input=inputs[name]) for name in (KEY_CACHE, VALUE_CACHE) if form.stateful
        }
        config = model.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        if form.tokens:
            self.begin, self.count = inputs[POSITION], np.array([form.tokens], np.int32)
            self.end = mb.add(x=self.begin, y=self.count, name="end")
        else:
            # Read from the shapes, because no fixed-size input may stand beside flexible ones (coremltools
            # #2548).
            self.count = mb.slice_by_index(x=mb.shape(x=inputs[INPUT_IDS]), begin=[1], end=[2], name="count")
            self.end = mb.slice_by_index(x=mb.shape(x=inputs[MASK]), begin=[3], end=[4], name="end")
            self.begin = mb.sub(x=self.end, y=self.count, name="begin")

    def outputs(self) -> list[Var]:
        decoder = self.model.model
        self.cos, self.sin = self._angles("cos", decoder.cos), self._angles("sin", decoder.sin)
        # One row per query head of a group, in the stacking order of the queries.
        self.mask = mb.tile(x=self.inputs[MASK], reps=[1, 1, self.heads // self.kv_heads, 1], name="mask")
        table = self._weight(decoder.embed_tokens, "model.embed_tokens")
        x = mb.gather(x=table, indices=self.inputs[INPUT_IDS], axis=0, validate_indices=False, name="embed")
        new: list[tuple[Var, Var]] = []
        for index, layer in enumerate(decoder.layers):
            x, *rows = self._layer(x, layer, index)
            new.append((rows[0], rows[1]))
        x = self._norm(x, decoder.norm, "model.norm")
        logits = self._linear(x, self.model.lm_head, "lm_head", name=LOGITS)
        if self.form.stateful:
            return [logits]
        names = (NEW_KEYS, NEW_VALUES)
        stacked = [
            mb.stack(values=list(rows), axis=0, name=name)
            for name, rows in zip(names, zip(*new, strict=True), strict=True)
        ]
        return [logits, *stacked]

    def _layer(self, x: Var, layer: DecoderLayer | nn.Module, index: int) -> tuple[Var, Var, Var]:
        assert isinstance(layer, DecoderLayer)
        prefix, mlp = f"model.layers.{index}", layer.mlp
        h = self._norm(x, layer.input_layernorm, f"{prefix}.input_layernorm")
        y, k, v = self._attention(h, layer.self_attn, index, f"{prefix}.self_attn")
        x = mb.add(x=x, y=y)
        h = self._norm(x, layer.post_attention_layernorm, f"{prefix}.post_attention_layernorm")
        gate = mb.silu(x=self._linear(h, mlp.gate_proj, f"{prefix}.mlp.gate_proj"))
        up = self._linear(h, mlp.up_proj, f"{prefix}.mlp.up_proj")
        down = self._linear(mb.mul(x=gate, y=up), mlp.down_proj, f"{prefix}.mlp.down_proj")
        return mb.add(x=x, y=down), k, v

    def _attention(self, x: Var, attention: Attention, index: int, prefix: str) -> tuple[Var, Var, Var]:
        heads, kv_heads, width = self.heads, self.kv_heads, self.head_dim
        q = self._rotate(self._split(self._linear(x, attention.q_proj, f"{prefix}.q_proj"), heads))
        k = self._rotate(self._split(self._linear(x, attention.k_proj, f"{prefix}.k_proj"), kv_heads))
        v = self._split(self._linear(x, attention.v_proj, f"{prefix}.v_proj"), kv_heads)
        keys, values = self._remember(KEY_CACHE, k, index), self._remember(VALUE_CACHE, v, index)
        q = mb.reshape(x=q, shape=[1, kv_heads, -1, width])  # [1, G, H / G * T, D]
        y = mb.scaled_dot_product_attention(query=q, key=keys, value=values, attn_mask=self.mask)
        y = mb.transpose(x=mb.reshape(x=y, shape=[1, heads, -1, width]), perm=[0, 2, 1, 3])
        y = mb.reshape(x=y, shape=[1, -1, heads * width])
        return self._linear(y, attention.o_proj, f"{prefix}.o_proj"), k, v

    def _split(self, x: Var, heads: int) -> Var:
        """[1, T, heads * D] -> [1, heads, T, D]."""
        return mb.transpose(x=mb.reshape(x=x, shape=[1, -1, heads, self.head_dim]), perm=[0, 2, 1, 3])

    def _rotate(self, x: Var) -> Var:
        """`edgellama.model.llama.rotate`, heads before positions."""
        low, high = mb.split(x=x, num_splits=2, axis=-1)
        first = mb.sub(x=mb.mul(x=low, y=self.cos), y=mb.mul(x=high, y=self.sin))
        second = mb.add(x=mb.mul(x=high, y=self.cos), y=mb.mul(x=low, y=self.sin))
        return mb.concat(values=[first, second], axis=-1)

    def _remember(self, name: str, rows: Var, layer: int) -> Var:
        """Adds `rows` [1, G, T, D] to a layer's part of a cache and returns the part that attention reads."""
        cache, layer_end = (
            self.inputs[name],
            [layer + 1, 1, self.kv_heads, self.model.context_length, self.head_dim],
        )
        first, squeeze = [layer, 0, 0, 0, 0], [True, False, False, False, False]
        if not self.form.stateful:
            old = mb.slice_by_index(x=cache, begin=first, end=layer_end, squeeze_mask=squeeze)
            return mb.concat(values=[old, rows], axis=2)
        filled = self._at([layer + 1, 1, self.kv_heads], self.end, [self.head_dim])
        updated = mb.slice_update(
            x=self.states[name],
            update=mb.expand_dims(x=rows, axes=[0]),
            begin=self._at([layer, 0, 0], self.begin, [0]),
            end=filled,
        )
        # Written back here, not once at the end, so that the update can happen in place. Later reads start
        # from this value: coremltools takes every `read_state` of a function for the first one, which is
        # stale by then.
        state = self.states[name] = mb.coreml_update_state(state=cache, value=updated)
        end = layer_end if self.form.tokens else filled
        return mb.slice_by_index(x=state, begin=first, end=end, squeeze_mask=squeeze)

    def _angles(self, name: str, table: Tensor) -> Var:
        """Rows of a RoPE table [S, 1, D / 2] at the call's positions."""
        values = mb.const(val=_float16(f"RoPE {name}", table[:, 0]), name=name)
        begin, half = self._at([], self.begin, [0]), self.head_dim // 2
        if self.form.tokens:  # a constant size keeps the shape static
            return mb.slice_by_size(x=values, begin=begin, size=[self.form.tokens, half])
        return mb.slice_by_index(x=values, begin=begin, end=self._at([], self.end, [half]))

    def _at(self, before: list[int], index: Var, after: list[int]) -> Var:
        """Index vector with one entry that is known only at run time."""
        values = [np.array(before, np.int32), index, np.array(after, np.int32)]
        return mb.concat(values=[v for v in values if v.shape != (0,)], axis=0)

    def _norm(self, x: Var, norm: RMSNorm, name: str) -> Var:
        """x / m / sqrt(mean((x / m)²) + (sqrt(eps) / m)²) * weight, with m the row's largest magnitude."""
        largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
        divisor = mb.maximum(x=largest, y=SMALLEST_DIVISOR)
        x = mb.real_div(x=x, y=divisor)
        mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
        eps = mb.real_div(x=np.float16(norm.eps**0.5), y=divisor)
        # A square root and a division, because `rsqrt` adds an epsilon of its own.
        root = mb.sqrt(x=mb.add(x=mean, y=mb.mul(x=eps, y=eps)))
        weight = mb.const(val=_float16(name, norm.weight), name=f"{name}.weight")
        return mb.mul(x=mb.real_div(x=x, y=root), y=weight, name=name)

    def _linear(self, x: Var, module: nn.Linear, module_name: str, name: str | None = None) -> Var:
        weight = self._weight(module, module_name)
        bias = {}
        if module.bias is not None:
            bias["bias"] = mb.const(val=_float16(module_name, module.bias), name=f"{module_name}.bias")
        return mb.linear(x=x, weight=weight, name=name or module_name, **bias)

    def _weight(self, module: nn.Module, name: str) -> Var:
        """The module's weight. Modules that share their codes (a tied lm_head) share the value."""
        codes = codes_of(module)
        if codes is None:
            tensor = module.get_parameter("weight")
            key = (tensor.data_ptr(), 0)
            if key not in self.weights:
                self.weights[key] = mb.const(val=_float16(name, tensor), name=f"{name}.weight")
            return self.weights[key]
        key = (codes.values.data_ptr(), codes.scales.data_ptr())
        if key not in self.weights:
            self.weights[key] = _constexpr(codes, name)
        return self.weights[key]


def _constexpr(codes: Codes, name: str) -> Var:
    """weight = data * scale, one scale per block of the last axis. Codes and scales stay bit for bit."""
    scales = codes.scales.numpy()
    stored = scales.astype(np.float16)
    if not np.array_equal(stored.astype(np.float32), scales):
        raise LoweringError(
            f"{name}: its smallest scale is {scales.min():.3g} and its largest {scales.max():.3g}; float16, in which "
            "Core ML stores scales, does not hold them all exactly",
            remedy="Keep this module in float (a rule with scheme null), or export the other targets only.",
        )
    dtype = types.nptype_from_builtin(types.int4 if codes.scheme.bits == 4 else types.int8)
    return mb.constexpr_blockwise_shift_scale(
        data=codes.values.numpy().astype(dtype), scale=stored, name=f"{name}.weight"
    )


def _float16(name: str, tensor: Tensor) -> Any:
    """`tensor` as a float16 array. Raises LoweringError if float16 cannot hold its range."""
    array = tensor.detach().numpy().astype(np.float16)
    if not np.isfinite(array).all():
        raise LoweringError(
            f"{name}: a value of {float(tensor.abs().max()):.3g} is beyond float16, in which Core ML computes",
            remedy="Export this model to a target that computes in float32, such as xnnpack.",
        )
    return array
