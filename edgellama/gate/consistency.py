"""Consistency of an artifact with itself: prefill and decode, calls of all lengths, reset, the end of the context.

These checks need no reference, so they run on every bundle. The limits are multiples of noise. Calls of another
length change the order of the sums, and int8 activations amplify the difference. Each call is followed by
single steps: the call's own row shows what it computed, the steps show what it left in the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellama.errors import ContextLengthError
from edgellama.gate.effort import WHOLE, Effort
from edgellama.gate.limits import ALWAYS_PASSES
from edgellama.gate.long_window import LongRun
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.noise import RUN, Noise, geometric_mean, worst
from edgellama.gate.parity import steps
from edgellama.gate.subject import Section
from edgellama.model.layerwise import Float
from edgellama.report import Check, below, check
from edgellama.runtimes.base import Runtime


@dataclass(frozen=True)
class _Fed:
    """KL of a text that was fed in calls, to the same text in single steps, nats.

    Attributes:
        calls: of the row of each call.
        steps: of the single steps after the last call, at most RUN.
        max_abs: largest difference of a logit in the rows of the calls.
    """

    calls: Float
    steps: Float
    max_abs: float


def measure_consistency(
    runtime: Runtime,
    tokens: Sequence[int],
    *,
    noise: Noise,
    always_passes: float = ALWAYS_PASSES,
    effort: Effort = WHOLE,
) -> tuple[dict[str, Any], list[Check]]:
    """Figures for the section `parity` of a report, and the checks named `consistency.*`.

    Args:
        runtime: the artifact.
        tokens: as many as the longest prompt and RUN more, or the whole context if it is shorter.
        noise: noise floor of parity; without a reference, an assumed one.
        always_passes: KL that always passes, nats.
        effort: lengths of the calls.
    """
    tokens = list(tokens[: min(max(effort.lengths) + RUN, runtime.context_length)])
    stepped = steps(runtime, tokens)
    prompts = [n for n in effort.lengths if n <= len(tokens)]
    pieces = [lengths for lengths in effort.pieces if sum(lengths) <= len(tokens)]
    fed = [_feed(runtime, tokens, [n], stepped, fill=effort.fills) for n in prompts]
    fed_in_pieces = [_feed(runtime, tokens, lengths, stepped, fill=effort.fills) for lengths in pieces]
    reset = _reset(runtime, tokens, stepped)
    prompt_kl = np.array([x.calls[-1] for x in fed])
    pieces_kl = np.array([kl for x in fed_in_pieces for kl in x.calls])
    after = [geometric_mean(x.steps) for x in (*fed, *fed_in_pieces) if len(x.steps) == RUN]
    figures = {
        "prefill_decode_kl": float(prompt_kl.mean()),
        "prefill_decode_kl_max": worst(prompt_kl),
        "prefill_decode_max_abs": worst([x.max_abs for x in fed]),
        "chunked_kl": float(pieces_kl.mean()) if len(pieces_kl) else 0.0,
        "chunked_kl_max": worst(pieces_kl),
        "after_calls_kl_max": worst(after),
    }
    allowed = noise.limits(always_passes)
    return figures, [
        below(
            "consistency.prefill_decode",
            figures["prefill_decode_kl_max"],
            allowed.position,
            detail=f"worst of {len(prompts)} prompts of {prompts[0]} to {prompts[-1]} tokens",
        ),
        below(
            "consistency.chunked_prefill",
            figures["chunked_kl_max"],
            allowed.position,
            detail=f"worst of {len(pieces_kl)} pieces",
        ),
        below(
            "consistency.after_calls",
            figures["after_calls_kl_max"],
            allowed.run,
            detail=f"geometric mean of the {RUN} steps after a call",
        ),
        reset,
    ]


def examine_consistency(
    runtime: Runtime,
    tokens: Sequence[int],
    *,
    noise: Noise,
    always_passes: float,
    effort: Effort = WHOLE,
) -> Section:
    """The section of `measure_consistency`, which takes the same arguments. Needs no reference."""
    figures, checks = measure_consistency(
        runtime, tokens, noise=noise, always_passes=always_passes, effort=effort
    )
    return Section(tuple(checks), {"parity": figures})


def examine_end(runtime: Runtime, run: LongRun, *, noise: Noise, always_passes: float) -> Section:
    """Checks of the end of the context: one prompt up to the last position but one, and one as long as it.

    runtime: the artifact, loaded anew. Its KV cache must not hold the right values already.
    run: the same text in shorter calls, with single steps at its end.
    """
    tokens, context = run.tokens, runtime.context_length
    expected = run.logits[-2:]  # of the last two positions
    runtime.reset()
    rows = [runtime.forward(tokens[:-1]).copy(), runtime.forward(tokens[-1:]).copy()]
    runtime.reset()
    rows.append(runtime.forward(tokens).copy())
    logits = torch.from_numpy(np.stack(rows))
    kl = worst(kl_divergence(torch.cat((expected, expected[-1:])), logits))
    limit = noise.limits(always_passes).position
    detail = f"prompts of {context - 1} and {context} tokens"
    checks = (below("consistency.last_position", kl, limit, detail=detail), examine_overflow(runtime))
    return Section(checks, {"parity": {"last_position_kl": kl}})


def _feed(
    runtime: Runtime, tokens: Sequence[int], lengths: Sequence[int], stepped: Tensor, *, fill: bool
) -> _Fed:
    """Feeds the beginning of `tokens` in calls of `lengths`, and then up to RUN single steps.

    fill: first fills these positions with other tokens. A value that a call fails to write would else be
    right already.
    """
    ends = list(accumulate(lengths))
    ends += range(ends[-1] + 1, min(ends[-1] + RUN, len(tokens)) + 1)
    runtime.reset()
    if fill:
        runtime.forward(tokens[::-1][: ends[-1]])
        runtime.reset()
    rows = torch.stack([torch.from_numpy(runtime.forward(x).copy()) for x in _split(tokens, ends)])
    expected, calls = stepped[[end - 1 for end in ends]], len(lengths)
    kl = kl_divergence(expected, rows)
    return _Fed(kl[:calls], kl[calls:], float((expected - rows)[:calls].abs().max()))


def _split(tokens: Sequence[int], ends: Sequence[int]) -> Iterator[Sequence[int]]:
    return (tokens[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _reset(runtime: Runtime, tokens: Sequence[int], stepped: Tensor) -> Check:
    """Checks that a reset after other tokens gives the same bits for the same tokens."""
    runtime.reset()
    runtime.forward(tokens[:64][::-1])
    again = steps(runtime, tokens[:16])
    difference = float((again - stepped[:16]).abs().max())
    return check("consistency.reset", torch.equal(again, stepped[:16]), value=difference, limit=0.0)


def examine_overflow(runtime: Runtime) -> Check:
    """Checks that a call beyond the context raises an error."""
    try:
        runtime.forward([0] * (runtime.context_length - runtime.position + 1))
    except ContextLengthError:
        return check("consistency.context_overflow", True)
    return check("consistency.context_overflow", False, detail="a token beyond the context was accepted")
