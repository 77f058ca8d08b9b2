"""Text sampled from the full-precision model, as training text beside the calibration text.

Each sequence begins with a few tokens of calibration text and continues at temperature 1. One thread computes
each batch, with its own seed, so the number of threads does not change the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from edgellama.host.threads import Workers
from edgellama.model.llama import KVCache, Llama

BATCH = 16  # sequences
BEGINNING = 8  # tokens of calibration text


def sampled(
    full: Llama, windows: Sequence[tuple[int, ...]], count: int, length: int, pool: Workers
) -> list[tuple[int, ...]]:
    """Samples `count` sequences of `length` tokens from the float model.

    Their beginnings come from evenly spaced windows of `windows`.
    """
    beginnings = [windows[i * len(windows) // count][: min(BEGINNING, length)] for i in range(count)]
    batches = [beginnings[i : i + BATCH] for i in range(0, count, BATCH)]

    def batch(item: tuple[int, list[tuple[int, ...]]]) -> Tensor:
        seed, first_tokens = item
        model = _with_caches(full, length, len(first_tokens))
        generator = torch.Generator().manual_seed(seed)
        inputs = tokens = torch.tensor(first_tokens)
        while tokens.shape[1] < length:
            logits = model.last_logits(inputs, tokens.shape[1] - inputs.shape[1])
            inputs = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, inputs), 1)
        return tokens

    return [tuple(row) for tokens in pool.map(batch, enumerate(batches)) for row in tokens.tolist()]


def _with_caches(full: Llama, length: int, batch: int) -> Llama:
    """Model that shares the weights of `full` and has its own KV caches."""
    with torch.device("meta"):
        model = Llama(full.config, length, partial(KVCache, batch=batch))
    model.load_state_dict(full.state_dict(), assign=True)
    return model
