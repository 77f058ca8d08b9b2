"""Blocks of the Llama for XNNPACK: everything between two attentions is one delegate.

Attention and its cache are ExecuTorch's operators. One delegate holds the rest, from the attention of one
layer to that of the next: output projection, MLP, both norms, q, k, v and RoPE. A token then costs one call
per layer. No elementwise operator runs in the portable kernels, which have neither threads nor vectors.

    tokens -> embedding -> First -> attention -> Between -> attention -> … -> Last -> logits

Three things have a form of their own here, with the numbers of `edgellama.targets.xnnpack.numerics`:

- The mean of squares in RMSNorm is a linear with a weight of ones, because XNNPACK's means are for images.
  Its input is x * x, its output the sum plus n * eps. The remaining factor sqrt(n) is in the norm's weight.
- RoPE is x * cos + swapped halves * sin, with each table doubled in width and the sign of the first half in
  `sin`.
- Weights of norms are inputs of the delegate. XNNPACK packs copies of the weights of linears, but reads
  constants of elementwise operators in place. ExecuTorch 1.4 frees that memory once a file is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.export.xnnpack.modules import Projections
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Attention, DecoderLayer, Llama, RMSNorm
from edgellama.targets.xnnpack.numerics import sum_bias

Shape = tuple[int, ...]


class Normalize(nn.Module):
    """RMSNorm without its weight, which is an input: `edgellama.targets.xnnpack.numerics.norm_weight`."""

    ones: Tensor
    bias: Tensor

    def __init__(self, source: RMSNorm) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(1, source.weight.shape[0]))
        self.register_buffer("bias", sum_bias(source))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.ones, self.bias)) * weight


class BeforeAttention(nn.Module):
    """Norm, q, k, v and RoPE: x [1, T, hidden] -> q [T, H, D], k [T, G, D], v [1, T, G * D]."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        attention: Attention = layer.self_attn
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.norm = Normalize(layer.input_layernorm)
        self.qkv = Projections([attention.q_proj, attention.k_proj, attention.v_proj])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(x, weight))
        return self._rotate(q, self.heads, cos, sin), self._rotate(k, self.kv_heads, cos, sin), v

    def _rotate(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        x, half = x.view(-1, heads, self.head_dim), self.head_dim // 2
        swapped = torch.cat((x.narrow(-1, half, half), x.narrow(-1, 0, half)), -1)
        return x * cos + swapped * sin


class AfterAttention(nn.Module):
    """Output projection, residual, MLP, residual: x [1, T, hidden], y [1, T, H * D] -> [1, T, hidden]."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.o_proj = Projections([layer.self_attn.o_proj])
        self.norm = Normalize(layer.post_attention_layernorm)
        self.gate_up = Projections([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.down_proj = Projections([layer.mlp.down_proj])

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        x = x + self.o_proj(y)[0]
        gate, up = self.gate_up(self.norm(x, weight))
        out: Tensor = x + self.down_proj(gate * torch.sigmoid(gate) * up)[0]
        return out


class Block(nn.Module):
    """The content of one delegate.

    `forward` is plain operators, traced or read by export/xnnpack/delegate.py.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.hidden, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.output_size = config.output_size

    def inputs(self, tokens: int) -> list[Shape]:
        """Shapes of the inputs of `forward` for `tokens` tokens."""
        raise NotImplementedError

    def outputs(self, tokens: int) -> list[Shape]:
        """Shapes of the outputs of `forward` for `tokens` tokens."""
        raise NotImplementedError

    def _tables(self, tokens: int) -> list[Shape]:
        return [(tokens, 1, self.head_dim)] * 2

    def _qkv(self, tokens: int) -> list[Shape]:
        heads = [(tokens, self.heads, self.head_dim), (tokens, self.kv_heads, self.head_dim)]
        return [*heads, (1, tokens, self.kv_heads * self.head_dim)]


class First(Block):
    """Before the first attention."""

    def __init__(self, config: LlamaConfig, layer: DecoderLayer) -> None:
        super().__init__(config)
        self.before = BeforeAttention(layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return self.before(x, cos, sin, weight)  # type: ignore[no-any-return]

    def inputs(self, tokens: int) -> list[Shape]:
        return [(1, tokens, self.hidden), *self._tables(tokens), (self.hidden,)]

    def outputs(self, tokens: int) -> list[Shape]:
        return self._qkv(tokens)


class Between(Block):
    """From the attention of `layer` to that of `following`."""

    def __init__(self, config: LlamaConfig, layer: DecoderLayer, following: DecoderLayer) -> None:
        super().__init__(config)
        self.after, self.before = AfterAttention(layer), BeforeAttention(following)

    def forward(
        self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, after: Tensor, before: Tensor
    ) -> tuple[Tensor, ...]:
        """(x after `layer`, and q, k, v of `following`), in the shapes of `outputs`.

        Args:
            x: residual stream before the attention of `layer`, [1, T, hidden].
            y: output of that attention, [1, T, H * D].
            cos: wide RoPE table at the positions of the tokens, [T, 1, D].
            sin: the same for the sine.
            after: `norm_weight` of the norm after that attention, [hidden].
            before: `norm_weight` of the norm before the attention of `following`, [hidden].
        """
        x = self.after(x, y, after)
        return (x, *self.before(x, cos, sin, before))

    def inputs(self, tokens: int) -> list[Shape]:
        x, y = (1, tokens, self.hidden), (1, tokens, self.heads * self.head_dim)
        return [x, y, *self._tables(tokens), (self.hidden,), (self.hidden,)]

    def outputs(self, tokens: int) -> list[Shape]:
        return [(1, tokens, self.hidden), *self._qkv(tokens)]


class Last(Block):
    """From the last attention to the logits, for the last token only.

    The other tokens are not needed any more.
    """

    def __init__(self, config: LlamaConfig, layer: DecoderLayer, model: Llama) -> None:
        super().__init__(config)
        self.after, self.norm = AfterAttention(layer), Normalize(model.model.norm)
        self.lm_head = Projections([model.lm_head])

    def forward(self, x: Tensor, y: Tensor, after: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
        return (self.lm_head(self.norm(self.after(x, y, after), norm))[0],)

    def inputs(self, tokens: int) -> list[Shape]:
        return [(1, 1, self.hidden), (1, 1, self.heads * self.head_dim), (self.hidden,), (self.hidden,)]

    def outputs(self, tokens: int) -> list[Shape]:
        return [(1, 1, self.output_size)]


def blocks(model: Llama) -> Iterator[Block]:
    """Yields the blocks of `model` in their order of execution. Each is made on demand."""
    layers: Sequence[DecoderLayer] = list(model.model.layers)  # type: ignore[arg-type]
    yield First(model.config, layers[0])
    for layer, following in pairwise(layers):
        yield Between(model.config, layer, following)
    yield Last(model.config, layers[-1], model)
