"""The full-precision model over a few sequences, a layer at a time: one layer's weights in memory, not all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgellama.checkpoint import OUTSIDE, Checkpoint, layer_prefixes, load_weights
from edgellama.llama import Llama


@torch.inference_mode()
def streamed_logits(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], first: Sequence[int], context_length: int
) -> list[npt.NDArray[np.float32]]:
    """Logits of each sequence's positions from its `first` on: float32 [positions, vocab_size].

    context_length: of the KV cache, as long as the longest sequence.
    """
    with torch.device("meta"):
        model = Llama(checkpoint.config, context_length)
    load_weights(model, checkpoint, OUTSIDE)
    decoder = model.model
    states = [decoder.embed_tokens(torch.tensor([list(tokens)])) for tokens in sequences]
    for index, prefix in enumerate(layer_prefixes(checkpoint)):
        load_weights(model, checkpoint, prefix)
        layer = decoder.layers[index]
        states = [layer(x, decoder.cos[: x.shape[1]], decoder.sin[: x.shape[1]], 0) for x in states]
        decoder.layers[index] = nn.Identity()  # its weights are not needed again
        del layer
    return [model.lm_head(decoder.norm(x[0, start:])).numpy() for x, start in zip(states, first, strict=True)]
