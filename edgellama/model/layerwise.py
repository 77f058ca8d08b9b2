"""A decoder layer computed over windows of text, stopping wherever linears read an input.

The arithmetic is the model's own, with activations quantized to int8 where the recipe says so; sums run in another
order than in any artifact, which decides nothing but the last bits of the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.export.quantization.awq import READINGS, Reading
from edgellama.export.quantization.statistics import Workers
from edgellama.export.quantization.tensors import codes_of
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import DecoderLayer, KVCache, Llama, rope_tables, rotate
from edgellama.recipe import Scheme
from edgellama.targets.xnnpack.numerics import ROUNDING, Rounding

Visit = Callable[[Reading, list[Tensor]], None]


def run_layer(
    layer: DecoderLayer,
    states: list[Tensor],
    config: LlamaConfig,
    schemes: Mapping[str, Scheme | None],
    pool: Workers,
    visit: Visit,
    rounding: Rounding = ROUNDING,
) -> list[Tensor]:
    """Hidden states after `layer`, from those before it: float32 [T, hidden_size], one for each window.

    schemes: of the layer's linears, by their names in it; without one a linear reads float inputs. visit: called with
    each reading and the inputs that its linears are about to read; it may change these linears. rounding: the
    target's; linears that read the same are taken to have the first one's scheme.
    """
    attention_in, attention_out, mlp_in, mlp_out = READINGS
    cos, sin = rope_tables(config, max(map(len, states)))

    def read(
        reading: Reading, inputs: list[Tensor]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor | None]]]:
        chosen = [scheme for name in reading.linears if (scheme := schemes.get(name)) is not None]
        if chosen:
            inputs = list(pool.map(lambda x: rounding.inputs(x, chosen[0]), inputs))
        visit(reading, inputs)
        return inputs, [dense(layer.get_submodule(name)) for name in reading.linears]

    def attend(x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, *weights).view(1, len(x), -1, config.head_dim) for weights in qkv)
        cache = KVCache(config, len(x))
        angles = cos[: len(x)], sin[: len(x)]
        heads = (rounding.heads(head) for head in (rotate(q, *angles), rotate(k, *angles), v))
        return cache(*heads, 0).reshape(len(x), -1)  # type: ignore[no-any-return]

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


def layer_of(model: Llama, index: int) -> DecoderLayer:
    """Decoder layer `index` of the model."""
    layer = model.model.layers[index]
    assert isinstance(layer, DecoderLayer)
    return layer


def dense(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear, dequantized."""
    codes = codes_of(module)
    weight: Tensor = module.get_parameter("weight") if codes is None else codes.dequantize()
    bias = module.get_parameter("bias") if getattr(module, "bias", None) is not None else None
    return weight, bias
