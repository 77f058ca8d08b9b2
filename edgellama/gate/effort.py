"""Effort: amount of text that the gate feeds to an artifact.

A runtime that computes ten tokens a second cannot read what others read in the same time. Its gate reads less,
and says so: the report has the numbers of tokens, windows and positions. Comparisons of files are not reduced.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellama.targets import Target


@dataclass(frozen=True)
class Effort:
    """Amounts of text.

    Attributes:
        tokens: scored first, if nobody asks for another number; None for the caller's default.
        long_tokens: length of the long window; None for the whole context.
        lengths: of prompts whose calls are compared with single steps, in tokens.
        pieces: lengths of calls that feed one prompt.
        fills: the KV cache is filled with other tokens before each of these prompts.
        ends: the last position of the context is compared between calls.
        continuations: prompts that are continued greedily.
        pair_tokens: compared with each other artifact.
        golden_tokens: of a golden sequence that is fed again at most; None for no limit.
    """

    tokens: int | None
    long_tokens: int | None
    lengths: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    fills: bool
    ends: bool
    continuations: int
    pair_tokens: int
    golden_tokens: int | None

    def long_length(self, context_length: int) -> int:
        """Tokens of the long window of an artifact with this context."""
        return context_length if self.long_tokens is None else min(self.long_tokens, context_length)


WHOLE = Effort(
    tokens=None,
    long_tokens=None,
    # Around common tile widths of kernels and around powers of two.
    lengths=(1, 2, 3, 7, 8, 16, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 255, 257),
    # Many of one length, and long ones at odd offsets.
    pieces=((5,) * 12, (16,) * 4, (27, 27, 10), (1, 64), (3, 100), (37, 128), (2, 33, 129), (1, 127, 64)),
    fills=True,
    ends=True,
    continuations=4,
    pair_tokens=1024,
    golden_tokens=None,
)
# About 2,000 tokens. MLX on x86-64 takes 0.08 processor seconds for a token of SmolLM2-135M. Its
# caches are made anew by a reset and grow in steps of 256 positions. Nothing is allocated for the context's
# end.
REDUCED = Effort(
    tokens=1024,
    long_tokens=288,
    lengths=(1, 2, 7, 33, 64),
    pieces=((5, 5, 5), (1, 64)),
    fills=False,
    ends=False,
    continuations=2,
    pair_tokens=256,
    golden_tokens=48,
)


def effort_for(target: Target) -> Effort:
    """The effort that the gate of `target` takes on this machine."""
    return REDUCED if target.is_slow_here() else WHOLE
