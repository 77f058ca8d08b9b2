"""The full-precision model over a few sequences, a part at a time: never all of its weights in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgellama.checkpoints.checkpoint import Checkpoint, layer_prefixes, load_weights
from edgellama.export.quantization.statistics import workers
from edgellama.model.layerwise import layer_of, run_layer
from edgellama.model.llama import Llama

_ROWS = 8192  # of the head that are floats at a time


@torch.inference_mode()
def streamed_logits(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], first: Sequence[int], context_length: int
) -> list[npt.NDArray[np.float32]]:
    """Logits of each sequence's positions from its `first` on: float32 [positions, vocab_size].

    context_length: of the KV cache, as long as the longest sequence.
    """
    with torch.device("meta"):
        model = Llama(checkpoint.config, context_length)
    load_weights(model, checkpoint, "model.norm.")
    decoder = model.model
    table = checkpoint.read("model.embed_tokens.weight")
    states = [table[torch.tensor(tokens)].float() for tokens in sequences]
    with workers() as pool:
        for index, prefix in enumerate(layer_prefixes(checkpoint)):
            load_weights(model, checkpoint, prefix)
            states = run_layer(layer_of(model, index), states, checkpoint.config, {}, pool, lambda *_: None)
            decoder.layers[index] = nn.Identity()  # its weights are not needed again
    states = [decoder.norm(x[start:]) for x, start in zip(states, first, strict=True)]
    head = table if checkpoint.config.tie_word_embeddings else checkpoint.read("lm_head.weight")
    pieces = [rows.float() @ torch.cat(states).T for rows in head.split(_ROWS)]
    logits = torch.cat(pieces).T.contiguous()
    return [rows.numpy() for rows in logits.split([len(x) for x in states])]
