"""Tensors of a Llama in GGUF: their names, and the order of the rows of q and k."""

from __future__ import annotations

from torch import Tensor

GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
ROTATED = ("q_proj", "k_proj")  # linears whose rows RoPE rotates in pairs

_GLOBAL = {hf: name for name, hf in GLOBAL_TENSORS.items()}
_LAYER = {hf: name for name, hf in LAYER_TENSORS.items()}


def ggml_name(tensor: str) -> str:
    """Name in GGUF of a tensor with a Hugging Face name.

    >>> ggml_name("model.layers.3.self_attn.q_proj.bias")
    'blk.3.attn_q.bias'
    """
    if tensor in _GLOBAL:
        return _GLOBAL[tensor]
    layer, _, rest = tensor.removeprefix("model.layers.").partition(".")
    module, _, attribute = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER[module]}.{attribute}"


def is_rotated(tensor: str) -> bool:
    """Returns True for a weight or bias, or a module, whose rows GGUF stores in another order."""
    return any(f".{name}" in tensor for name in ROTATED)


def permute(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q_proj or k_proj (codes or scales [H * D, ...], bias [H * D]) in GGUF's order.

    RoPE rotates neighbours (2i, 2i + 1) of a head in llama.cpp, and halves (i, i + D / 2) in Hugging Face.
    Hence convert_hf_to_gguf.py (`LlamaModel.permute`) interleaves the halves of every head.
    """
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])  # [H, 2, D / 2, ...]
    return halves.transpose(1, 2).reshape(weight.shape)


def unpermute(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q_proj or k_proj in Hugging Face's order: the inverse of `permute`."""
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])  # [H, D / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(weight.shape)
