"""Loading of a checkpoint's weights into a Llama, all at once or one layer at a time."""

from __future__ import annotations

import torch
from torch import nn

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.model.llama import CacheFactory, KVCache, Llama

OUTSIDE = ("model.embed_tokens.", "model.norm.", "lm_head.")  # prefixes of the weights outside the layers


def layer_prefixes(checkpoint: Checkpoint) -> list[str]:
    """Prefix of the tensor names of each layer."""
    return [f"model.layers.{index}." for index in range(checkpoint.config.num_hidden_layers)]


def load_llama(checkpoint: Checkpoint, context_length: int, cache: CacheFactory = KVCache) -> Llama:
    """The model in float32, ready to run. Tensors are read one by one, and a tied lm_head is shared."""
    with torch.device("meta"):
        model = Llama(checkpoint.config, context_length, cache)
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(
    model: Llama, checkpoint: Checkpoint, prefix: str | tuple[str, ...] = "", *, copy: bool = False
) -> None:
    """Loads into `model` the weights whose names begin with `prefix`, or with one of several.

    copy: Load copies that may be modified. Otherwise a weight may be a view of the mapped file.
    """
    for name in checkpoint.config.tensor_shapes():
        if name.startswith(prefix):
            module_name, _, attribute = name.rpartition(".")
            tensor = checkpoint.tensor(name)
            weight = nn.Parameter(tensor.clone() if copy else tensor, requires_grad=False)
            setattr(model.get_submodule(module_name), attribute, weight)
    if checkpoint.config.tie_word_embeddings and "model.embed_tokens.weight".startswith(prefix):
        model.lm_head.weight = model.model.embed_tokens.weight
