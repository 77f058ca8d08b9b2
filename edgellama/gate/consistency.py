"""Consistency of an artifact with itself: prefill and decode, chunks, reset, and the end of the context.

These checks need no reference, so they run on every bundle. The limits are those of parity. Chunks of another
size change the order of the sums, and int8 activations amplify the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellama.errors import ContextLengthError
from edgellama.gate.limits import ALWAYS_PASSES, parity_limit
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.parity import steps
from edgellama.gate.subject import Section
from edgellama.report import Check, below, check
from edgellama.runtimes.base import Runtime

# Lengths of prompts in tokens, around common tile widths of kernels.
LENGTHS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 48, 63, 64)
CHUNKS = (5, 16, 27)  # tokens a chunk
# Single steps up to the last position of the context. The context has at least 8 positions (export/plan.py).
LAST_STEPS = 4


def measure_consistency(
    runtime: Runtime, tokens: Sequence[int], *, floor: float, always_passes: float = ALWAYS_PASSES
) -> tuple[dict[str, Any], list[Check]]:
    """Figures for the section `parity` of a report, and the checks named `consistency.*`.

    Args:
        runtime: the artifact.
        tokens: at least 64, or the whole context if it is shorter.
        floor: noise floor of parity, KL in nats; without a reference, an assumed one.
        always_passes: KL that always passes, nats.
    """
    allowed = parity_limit(floor, always_passes)
    tokens = list(tokens[: min(64, runtime.context_length)])
    stepped = steps(runtime, tokens)
    lengths = [n for n in LENGTHS if n <= len(tokens)]
    prefill = torch.stack([_prefill(runtime, tokens[:n], chunk=n) for n in lengths])
    expected = torch.stack([stepped[n - 1] for n in lengths])
    kl_prefill = float(kl_divergence(expected, prefill).mean())
    chunked = [_prefill(runtime, tokens, chunk=n) for n in CHUNKS if n < len(tokens)]
    kl_chunked = (
        float(np.mean([kl_divergence(stepped[-1:], c[None])[0] for c in chunked])) if chunked else 0.0
    )
    reset = _reset(runtime, tokens, stepped)
    last = _last_position(runtime, tokens)
    overflow = _overflow(runtime)
    figures = {
        "prefill_decode_kl": kl_prefill,
        "prefill_decode_max_abs": float((expected - prefill).abs().max()),
        "chunked_kl": kl_chunked,
        "last_position_kl": last,
    }
    return figures, [
        below(
            "consistency.prefill_decode",
            kl_prefill,
            allowed,
            detail=f"prompts of {lengths[0]} to {lengths[-1]} tokens",
        ),
        below(
            "consistency.chunked_prefill",
            kl_chunked,
            allowed,
            detail=f"in pieces of {', '.join(map(str, CHUNKS))}",
        ),
        reset,
        below("consistency.last_position", last, allowed, detail=f"position {runtime.context_length}"),
        overflow,
    ]


def examine_consistency(
    runtime: Runtime, tokens: Sequence[int], *, floor: float, always_passes: float
) -> Section:
    """The section of `measure_consistency`, which takes the same arguments. Needs no reference."""
    figures, checks = measure_consistency(runtime, tokens, floor=floor, always_passes=always_passes)
    return Section(tuple(checks), {"parity": figures})


def _prefill(runtime: Runtime, tokens: Sequence[int], *, chunk: int) -> Tensor:
    runtime.reset()
    for start in range(0, len(tokens), chunk):
        logits = runtime.forward(tokens[start : start + chunk])
    return torch.from_numpy(logits.copy())


def _reset(runtime: Runtime, tokens: Sequence[int], stepped: Tensor) -> Check:
    """Checks that a reset after other tokens gives the same bits for the same tokens."""
    runtime.reset()
    runtime.forward(tokens[::-1])
    again = steps(runtime, tokens[:16])
    difference = float((again - stepped[:16]).abs().max())
    return check("consistency.reset", torch.equal(again, stepped[:16]), value=difference, limit=0.0)


def _last_position(runtime: Runtime, tokens: Sequence[int]) -> float:
    """KL at the last position of the context, nats. Leaves the context full.

    Compares a prefill followed by LAST_STEPS single steps with one prefill.
    """
    context = runtime.context_length
    full = (list(tokens) * (context // len(tokens) + 1))[:context]
    runtime.reset()
    runtime.forward(full[:-LAST_STEPS])
    for token in full[-LAST_STEPS:]:
        logits = runtime.forward([token])
    stepped = torch.from_numpy(logits.copy())
    return float(kl_divergence(stepped[None], _prefill(runtime, full, chunk=context)[None])[0])


def _overflow(runtime: Runtime) -> Check:
    """Checks that a token beyond the context raises an error. Must be called with the context full."""
    try:
        runtime.forward([0])
    except ContextLengthError:
        return check("consistency.context_overflow", True)
    return check("consistency.context_overflow", False, detail="a token beyond the context was accepted")
