"""Text from the model itself: what it would say, to be tuned on beside the calibration text.

Sequences begin with a few tokens of calibration text and go on at temperature 1. A batch is computed by one thread with a
seed of its own, so the same model gives the same text whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from edgellama.host.threads import Workers
from edgellama.model.llama import KVCache, Llama

BATCH = 16  # sequences that are computed together
BEGINNING = 8  # tokens taken over


def sampled(
    full: Llama, windows: Sequence[tuple[int, ...]], count: int, length: int, pool: Workers
) -> list[tuple[int, ...]]:
    """`count` sequences of `length` tokens from the float model, begun as windows spread over `windows` begin."""
    beginnings = [windows[i * len(windows) // count][: min(BEGINNING, length)] for i in range(count)]
    batches = [beginnings[i : i + BATCH] for i in range(0, count, BATCH)]

    def batch(item: tuple[int, list[tuple[int, ...]]]) -> Tensor:
        seed, begun = item
        model = _with_caches(full, length, len(begun))
        generator = torch.Generator().manual_seed(seed)
        given = tokens = torch.tensor(begun)
        while tokens.shape[1] < length:
            logits = model.last_logits(given, tokens.shape[1] - given.shape[1])
            given = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, given), 1)
        return tokens

    return [tuple(row) for tokens in pool.map(batch, enumerate(batches)) for row in tokens.tolist()]


def _with_caches(full: Llama, length: int, batch: int) -> Llama:
    """A model with the same weights in the same memory, and caches of its own."""
    with torch.device("meta"):
        model = Llama(full.config, length, partial(KVCache, batch=batch))
    model.load_state_dict(full.state_dict(), assign=True)
    return model
