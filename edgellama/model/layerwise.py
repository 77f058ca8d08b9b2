"""Layer-by-layer forward pass over windows of text, with a callback at each input of a linear.

The arithmetic is the model's own, with activations quantized to int8 where the recipe says so. The order of
the sums differs from every artifact's, which changes only the last bits of the statistics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgellama.host.threads import Workers
from edgellama.model.activations import INT8_PER_TOKEN, NO_ROUNDING, ActivationRounding
from edgellama.model.config import LlamaConfig
from edgellama.model.layer_pass import States, causal_attention, dense, pass_layer
from edgellama.model.llama import DecoderLayer, Llama, rope_tables, rotate
from edgellama.model.quantized import codes_of
from edgellama.recipe import Recipe, Scheme

HEAD_ROWS = 8192  # of the head that are float32 at a time
Float = npt.NDArray[np.float64]
_scratch = threading.local()


@dataclass(frozen=True)
class SharedInput:
    """Linears of a decoder layer that read the same input, and the module that produces it.

    source: name of that module. Operations between it and the linears commute with scaling a channel.
    linears: names in the layer.
    """

    source: str
    linears: tuple[str, ...]


# In the order of the forward pass.
SHARED_INPUTS = (
    SharedInput("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    SharedInput("self_attn.v_proj", ("self_attn.o_proj",)),
    SharedInput("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    SharedInput("mlp.up_proj", ("mlp.down_proj",)),
)


Visit = Callable[[SharedInput, list[Tensor]], None]


def run_layer(
    layer: DecoderLayer,
    states: list[Tensor],
    config: LlamaConfig,
    schemes: Mapping[str, Scheme | None],
    pool: Workers,
    visit: Visit,
    rounding: ActivationRounding = INT8_PER_TOKEN,
) -> list[Tensor]:
    """Runs `layer` and returns the hidden states after it, float32 [T, hidden_size] per window.

    Args:
        layer: the decoder layer.
        states: hidden states before the layer, float32 [T, hidden_size], one for each window.
        config: of the model.
        schemes: schemes of the layer's linears, by name in the layer. A linear without a scheme reads float
            inputs.
        pool: threads. Each window is one work item.
        visit: called with each shared input and its values, before its linears read them. It may change these
            linears.
        rounding: activation rounding of the target. Linears that share an input are rounded by the first
            scheme.
    """
    attention_in, attention_out, mlp_in, mlp_out = SHARED_INPUTS
    cos, sin = rope_tables(config, max(map(len, states)))

    def read(
        reading: SharedInput, inputs: list[Tensor]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor | None]]]:
        chosen = [scheme for name in reading.linears if (scheme := schemes.get(name)) is not None]
        if chosen:
            inputs = list(pool.map(lambda x: rounding.inputs(x, chosen[0]), inputs))
        visit(reading, inputs)
        return inputs, [dense(layer.get_submodule(name)) for name in reading.linears]

    def attend(x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, *weights).view(1, len(x), -1, config.head_dim) for weights in qkv)
        angles = cos[: len(x)], sin[: len(x)]
        heads = (rounding.heads(head) for head in (rotate(q, *angles), rotate(k, *angles), v))
        return causal_attention(*heads).reshape(len(x), -1)

    inputs, qkv = read(attention_in, list(pool.map(layer.input_layernorm, states)))
    inputs, (output,) = read(attention_out, list(pool.map(attend, inputs)))
    states = list(
        pool.map(lambda pair: pair[0] + F.linear(pair[1], *output), zip(states, inputs, strict=True))
    )
    inputs, (gate, up) = read(mlp_in, list(pool.map(layer.post_attention_layernorm, states)))
    inputs, (down,) = read(
        mlp_out,
        list(pool.map(lambda x: layer.mlp.act_fn(F.linear(x, *gate)) * F.linear(x, *up), inputs)),
    )
    return list(pool.map(lambda pair: pair[0] + F.linear(pair[1], *down), zip(states, inputs, strict=True)))


def scratch(values: Tensor) -> Tensor:
    """Values of a matrix as float32, in memory of this thread that its next call overwrites.

    A new copy for each piece of a head would cost more in pages than in arithmetic.
    """
    memory: Tensor | None = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < values.numel():
        memory = _scratch.memory = torch.empty(values.numel())
    return memory[: values.numel()].view(values.shape).copy_(values)


def in_pieces(
    piece: Callable[[slice], Tensor], rows: int, vocabulary: int, pool: Workers, width: int = HEAD_ROWS
) -> Tensor:
    """Logits float32 [rows, vocabulary], each piece of `width` columns a work item that is written in place."""
    with torch.inference_mode(False):  # else other threads may not write into it
        logits = torch.empty(rows, vocabulary)

    def write(start: int) -> None:
        columns = slice(start, start + width)
        logits[:, columns] = piece(columns)

    list(pool.map(write, range(0, vocabulary, width)))
    return logits


def layer_of(model: Llama, index: int) -> DecoderLayer:
    """Decoder layer `index` of the model."""
    layer = model.model.layers[index]
    assert isinstance(layer, DecoderLayer)
    return layer


@dataclass(frozen=True)
class LayerwiseModel:
    """Forward pass of a model, one part at a time. Each part is dequantized once for all hidden states.

    schemes: schemes of the modules whose inputs are rounded, by name. Empty for float inputs.
    rounding: activation rounding of the target.
    """

    model: Llama
    schemes: Mapping[str, Scheme | None]
    pool: Workers
    rounding: ActivationRounding = NO_ROUNDING

    @staticmethod
    def as_target(
        model: Llama, recipe: Recipe, rounding: ActivationRounding | None, pool: Workers
    ) -> LayerwiseModel:
        """Wraps a quantized `model` with a target's activation rounding. None keeps activations in float."""
        if rounding is None:
            return LayerwiseModel(model, {}, pool)
        linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        return LayerwiseModel(model, recipe.assign([*linears, "model.embed_tokens"]), pool, rounding)

    def embed(self, sequences: Sequence[Sequence[int]]) -> States:
        """Hidden states before the first layer, float32 [T, hidden_size] per sequence of token ids."""
        return [self.model.model.embed_tokens(torch.tensor(tokens)) for tokens in sequences]

    def layer(self, index: int, variants: list[States]) -> list[States]:
        """Hidden states of all variants after layer `index`. Each variant has the same number of windows."""
        if not variants:
            return []
        prefix, count = f"model.layers.{index}.", len(variants[0])
        schemes = {n.removeprefix(prefix): s for n, s in self.schemes.items() if n.startswith(prefix)}
        flat = [x for states in variants for x in states]
        layer = layer_of(self.model, index)
        outputs = pass_layer(layer, flat, self.model.config, self.pool, schemes, self.rounding)
        return [outputs[i : i + count] for i in range(0, len(outputs), count)]

    def head(self) -> Callable[[Tensor], Tensor]:
        """Function from hidden states to logits: float32 [T, hidden_size] -> [T, vocab_size].

        It applies the final norm and the lm_head, which is dequantized once.
        """
        weight, bias = dense(self.model.lm_head)
        scheme = self.schemes.get("lm_head")

        def logits(states: Tensor) -> Tensor:
            x = self.model.model.norm(states)
            return F.linear(x if scheme is None else self.rounding.inputs(x, scheme), weight, bias)

        return logits

    def logits(self, states: Tensor) -> Tensor:
        """Logits of hidden states before the final norm: [T, hidden_size] -> float32 [T, vocab_size].

        The head is dequantized in pieces of rows, each a work item, and no whole copy is in memory.
        """
        x, head = self.model.model.norm(states), self.model.lm_head
        scheme, codes = self.schemes.get("lm_head"), codes_of(head)
        inputs = x if scheme is None else self.rounding.inputs(x, scheme)

        def piece(rows: slice) -> Tensor:
            if codes is None:
                return F.linear(inputs, head.get_parameter("weight")[rows])
            values, scales = codes.values[rows], codes.scales[rows]
            weight = scratch(values)
            weight.view(*scales.shape, -1).mul_(scales[..., None])
            return F.linear(inputs, weight)

        return in_pieces(piece, len(x), self.model.config.output_size, self.pool)

    def kl(self, variants: list[States], reference: list[Tensor]) -> list[list[Float]]:
        """KL in nats of each token's logits, for every variant: float64 [T] per window.

        reference: log-probabilities of the reference, float32 [T, vocab_size] per window.
        """
        logits = self.head()
        # Allocated before any logits. A small result between freed logits would pin their memory: 12 MB per
        # window and variant.
        kl_by_variant = [[np.empty(len(x)) for x in states] for states in variants]

        def window(item: tuple[Float, Tensor, Tensor]) -> None:
            into, states, logs = item
            into[:] = _kl(logs, logits(states).log_softmax(-1))

        for results, states in zip(kl_by_variant, variants, strict=True):
            list(self.pool.map(window, zip(results, states, reference, strict=True)))
        return kl_by_variant


def _kl(reference: Tensor, candidate: Tensor) -> Float:
    """KL of each token, from log-probabilities. Negative rounding errors become 0."""
    kl: Float = (reference.exp() * (reference - candidate)).double().sum(-1).clamp_min(0).numpy()
    return kl
