"""Loading of a checkpoint's weights into a Llama, all at once or one layer at a time."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

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
    model: Llama,
    checkpoint: Checkpoint,
    prefix: str | tuple[str, ...] = "",
    *,
    copy: bool = False,
    checked: bool = False,
    stored: Collection[str] = (),
) -> None:
    """Loads into `model` the weights whose names begin with `prefix`, or with one of several.

    Args:
        model: the model.
        checkpoint: the checkpoint.
        prefix: of the names, or several of them.
        copy: loads copies that may be modified. Otherwise a weight may be a view of the mapped file.
        checked: the weights are known to be finite, because they were loaded before.
        stored: names of weights that keep the dtype of the file. The others become float32.
    """
    for name in checkpoint.config.tensor_shapes():
        if name.startswith(prefix):
            tensor = checkpoint.read(name) if checked else checkpoint.stored(name)
            tensor = tensor if name in stored else tensor.float()
            _assign(model, name, tensor.clone() if copy else tensor)
    if checkpoint.config.tie_word_embeddings and "model.embed_tokens.weight".startswith(prefix):
        model.lm_head.weight = model.model.embed_tokens.weight


def release_weights(model: Llama, prefix: str) -> None:
    """Frees the weights whose names begin with `prefix`. They can be loaded again."""
    for name, weight in list(model.named_parameters()):
        if name.startswith(prefix):
            _assign(model, name, weight.to("meta"))


def _assign(model: Llama, name: str, tensor: Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, nn.Parameter(tensor, requires_grad=False))
