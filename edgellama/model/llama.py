"""The Llama in torch. Attribute names are the checkpoint's weight names, so no mapping table is needed.

Only one attribute differs between backends: `Attention.cache`, the KV cache with its attention. The rest of
the model is the same in the reference and in every artifact.

Shapes: B batch (always 1 with a cache), T tokens, H query heads, G key/value heads, D head_dim, S context.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.model.config import LlamaConfig, RopeScaling


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Rotary frequencies in radians per position, float32 [D / 2], after the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "frequency_factors":
        return frequencies / torch.tensor(scaling.factors, device="cpu")
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies under Llama 3.1's rope_scaling.

    Those of long wavelengths are divided by `factor`, those of short ones are kept, and those between are
    blended.
    """
    wavelengths = 2 * math.pi / frequencies
    original, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_tables(config: LlamaConfig, context_length: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the rotary angles of every position, each float32 [S, 1, D / 2]."""
    positions = torch.arange(context_length, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, inverse_frequencies(config))[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to [B, T, heads, D], in Hugging Face's half-split layout: pairs are (i, i + D / 2)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class KVCache(nn.Module):
    """KV cache and attention over it, in plain torch, for any T up to the context.

    k_cache, v_cache: float32 [B, S, G, D], the same layout as in ExecuTorch's operators.

    A call reads only its own positions and those before them. A restart at position 0 therefore needs no
    reset.
    """

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, config: LlamaConfig, context_length: int, batch: int = 1) -> None:
        super().__init__()
        # Explicitly on the CPU: models are built on the meta device, and loading fills only parameters.
        shape = (batch, context_length, config.num_key_value_heads, config.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, device="cpu"), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, device="cpu"), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        """Writes k, v [B, T, G, D] at `position`; returns causal attention of q [B, T, H, D], same shape."""
        end = position + q.shape[1]
        self.k_cache[:, position:end] = k
        self.v_cache[:, position:end] = v
        keys, values = self.k_cache[:, :end], self.v_cache[:, :end]
        groups = q.shape[2] // k.shape[2]
        visible = torch.ones(q.shape[1], end, dtype=torch.bool, device=q.device).tril(diagonal=position)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys.repeat_interleave(groups, dim=2).transpose(1, 2),
            values.repeat_interleave(groups, dim=2).transpose(1, 2),
            attn_mask=visible,
        )
        return y.transpose(1, 2)


CacheFactory = Callable[[LlamaConfig, int], nn.Module]


class Attention(nn.Module):
    """Grouped-query attention with RoPE. `cache` builds the module that stores k, v and attends to them."""

    def __init__(self, config: LlamaConfig, context_length: int, cache: CacheFactory) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=bias)
        self.cache = cache(config, context_length)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
        """Hidden states [B, T, hidden_size] -> [B, T, hidden_size]."""
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, self.heads, self.head_dim)
        k = self.k_proj(x).view(batch, tokens, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.head_dim)
        y = self.cache(rotate(q, cos, sin), rotate(k, cos, sin), v, position)
        return self.o_proj(y.reshape(batch, tokens, self.heads * self.head_dim))  # type: ignore[no-any-return]


class SiLU(nn.Module):
    """x * sigmoid(x), in the same two steps as in artifacts, so that both sides round alike."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class MLP(nn.Module):
    """Gated feed-forward network (SwiGLU): down_proj(SiLU(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: LlamaConfig, context_length: int, cache: CacheFactory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, context_length, cache)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
        """Hidden states [B, T, hidden_size] -> [B, T, hidden_size]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, position)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, layers and final norm, named `model` in the checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, context_length: int, cache: CacheFactory) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, context_length, cache) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = rope_tables(config, context_length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        """Hidden states after the last layer, before the final norm: [B, T, hidden_size]."""
        length = tokens.shape[1]
        cos, sin = self.cos.narrow(0, position, length), self.sin.narrow(0, position, length)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, position)
        return x  # type: ignore[no-any-return]


class Llama(nn.Module):
    """A Llama with a KV cache of `context_length` positions. Weights are uninitialized until loaded.

    folds: scales that calibration moved between two linears, by the name of the one whose rows it divided. The input
        columns of the linear after it were multiplied, float32 [columns]. Empty without such folds.
    """

    def __init__(self, config: LlamaConfig, context_length: int, cache: CacheFactory = KVCache) -> None:
        super().__init__()
        self.config = config
        self.context_length = context_length
        self.model = Decoder(config, context_length, cache)
        self.lm_head = nn.Linear(config.hidden_size, config.output_size, bias=False)
        self.folds: dict[str, Tensor] = {}

    def forward(self, tokens: Tensor, position: int = 0) -> Tensor:
        """Logits of every position: tokens int64 [B, T] -> float32 [B, T, output_size]."""
        return self.lm_head(self.model.norm(self.model(tokens, position)))  # type: ignore[no-any-return]

    def last_logits(self, tokens: Tensor, position: int) -> Tensor:
        """Logits after the last token, as in artifacts: tokens int64 [B, T] -> float32 [B, output_size]."""
        x = self.model(tokens, position)[:, -1]
        return self.lm_head(self.model.norm(x))  # type: ignore[no-any-return]
