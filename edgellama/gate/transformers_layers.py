"""A checkpoint in transformers' own layers, one of which is in memory at a time.

transformers loads a model as a whole, which takes four bytes a parameter. Here its own config, decoder layers, norm
and rotary angles run as they are, and each layer gets its weights when it is reached. None of edgellama's readers
takes part: `edgellama.gate.transformers_files` opens the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD_ROWS = 8192  # of the head that are float32 at a time
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ForeignWeights(Protocol):
    """Weights by the names that transformers' model has, read when they are needed."""

    @property
    def names(self) -> frozenset[str]: ...

    def tensor(self, name: str) -> Tensor:
        """One weight, float32."""
        ...

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        """Rows of a matrix, float32 [rows, columns]."""
        ...


def empty_model(config: Any) -> Any:
    """transformers' Llama without weights."""
    from transformers import LlamaForCausalLM

    config._attn_implementation = "eager"
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits_and_angles(
    model: Any, weights: ForeignWeights, tokens: Sequence[int], positions: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits after each token, and cosines and sines of the rotary angles.

    Args:
        model: from `empty_model`. Its layers have weights while they run, and none afterwards.
        weights: those of the checkpoint.
        tokens: a text.
        positions: of the angles, int64 [positions].

    Returns float32 [tokens, vocab_size] and twice float32 [positions, head_dim], or None if the files do not hold
    exactly the weights that transformers' model has.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config, body = model.config, model.model
    expected = {name for name, _ in model.named_parameters()} | {TABLE}
    head = TABLE if config.tie_word_embeddings else HEAD
    if weights.names - {HEAD} != expected - {HEAD} or head not in weights.names:
        return None
    body.rotary_emb = LlamaRotaryEmbedding(config)
    _load(body.norm, (), weights=weights, prefix="model.norm.")
    for index, layer in enumerate(body.layers):
        prefix = f"model.layers.{index}."
        layer.register_forward_pre_hook(partial(_load, weights=weights, prefix=prefix))
        layer.register_forward_hook(_release)
    embedded = weights.rows(TABLE, torch.tensor(tokens))
    hidden = body(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]
    starts = range(0, config.vocab_size, _HEAD_ROWS)
    pieces = [F.linear(hidden, weights.rows(head, slice(start, start + _HEAD_ROWS))) for start in starts]
    cosines, sines = body.rotary_emb(torch.zeros(1, 1, 1), positions[None])
    return torch.cat(pieces, -1), cosines[0], sines[0]


def _load(module: nn.Module, _: object, *, weights: ForeignWeights, prefix: str) -> None:
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({name: weights.tensor(prefix + name) for name in names}, assign=True)


def _release(module: nn.Module, *_: object) -> None:
    module.load_state_dict({n: p.to("meta") for n, p in module.named_parameters()}, assign=True)
