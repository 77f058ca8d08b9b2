"""Long window: the artifact over its whole context, compared at many depths with both torch models.

Short windows say nothing about later positions: a RoPE table that ends early, a window of attention, a layer
left out, a key that is not read. Nor do single steps say anything about longer calls. One pass covers both.
The artifact reads a text as long as the context in calls of uneven lengths, and the last positions one by
one. A row of logits after each call is compared, so depths and lengths of calls are covered at once.

The text begins with records that are dense in digits, and ends with the same records. Its last positions are
predicted from its first. GPU backends are known to corrupt digits at depth in fluent text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellama.gate.limits import LONGEST, TYPICAL_SHARE, long_kl_limit, parity_limit
from edgellama.gate.metrics import Positions, compare, kl_divergence
from edgellama.gate.noise import Noise, geometric_mean, geometric_spread, worst
from edgellama.gate.subject import Section, Subject
from edgellama.model.layerwise import Float
from edgellama.report import Check, below
from edgellama.runtimes.base import Runtime
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text

LAST = 64  # positions that are fed one by one at the end
# Lengths of the first calls, around tile widths and powers of two, at odd offsets. The apps' longest call and
# others at odd offsets follow in turn.
FIRST_CALLS = (1, 64, 2, 100, 34, 128, 65, 127, 129, 255, 257)
LATER_CALLS = (512, 64, 33, 100, 128)
NOISE_STEP = 8  # every eighth position takes part in the noise floor
NOISE_ROWS = 64  # whose logits are in memory at a time. Other pieces would round the last few rows otherwise
_SHARE_OF_RECORDS, _SHARE_OF_REPEATS = 8, 16  # parts of the text: one eighth, one sixteenth


@dataclass(frozen=True)
class LongRun:
    """Logits of an artifact at some positions of a text, ascending.

    Attributes:
        tokens: the text, as long as the context.
        positions: of the rows. The last two are the last two of the text.
        logits: float32 [positions, vocab_size].
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    logits: Tensor


def records(seed: int = 0) -> Iterator[str]:
    """Endless lines that are dense in digits: dates, numbers, identifiers. The same on every machine."""
    state = seed
    while True:
        fields = []
        for modulus in (90, 12, 28, 24, 60, 99_991, 9_973, 16**8):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            fields.append((state >> 33) % modulus)
        year, month, day, hour, minute, number, amount, code = fields
        yield (
            f"{1950 + year}-{month + 1:02}-{day + 1:02} {hour:02}:{minute:02} "
            f"no. {number} total {amount * 37 / 100:.2f} id {code:08x}\n"
        )


def long_text(tokenizer: Tokenizer, texts: Sequence[Text], length: int) -> tuple[int, ...]:
    """Ids of a text of `length` tokens: records, prose from `texts` in turn, and the first records again."""
    start = tokenizer.encode("")  # bos, if the tokenizer adds it
    lines: list[int] = []
    for line in records():
        if len(lines) >= length // _SHARE_OF_RECORDS:
            break
        lines += tokenizer.encode(line, add_special_tokens=False)
    prose: list[int] = []
    for text in texts:
        share = -(-length // len(texts))
        prose += tokenizer.encode(text.content[: 16 * share], add_special_tokens=False)[:share]
    head, repeats = [*start, *lines][: length // 2], lines[: length // _SHARE_OF_REPEATS]
    gap = length - len(head) - len(repeats)
    filling = (prose * (gap // len(prose) + 1))[:gap]
    return (*head, *filling, *repeats)


def calls(length: int) -> list[int]:
    """Lengths of the calls that feed `length` tokens, without those that are fed one by one.

    >>> calls(448)
    [1, 64, 2, 100, 34, 128, 65, 54]
    """
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        turn = len(lengths)
        later = LATER_CALLS[(turn - len(FIRST_CALLS)) % len(LATER_CALLS)]
        lengths.append(min(left, FIRST_CALLS[turn] if turn < len(FIRST_CALLS) else later))
    return lengths


def run_long(artifact: Runtime, tokens: Sequence[int]) -> LongRun:
    """Feeds the whole text to the artifact, and leaves its context full.

    Beyond `LONGEST` tokens nothing is compared with a torch model. There the rest is fed in the same way, so
    that the end of the context can be compared with other calls (`consistency`).
    """
    compared = min(len(tokens), LONGEST)
    lengths = _with_steps(compared) + _with_steps(len(tokens) - compared)
    artifact.reset()
    positions, rows = [], []
    for length in lengths:
        start = artifact.position
        rows.append(torch.from_numpy(artifact.forward(tokens[start : start + length]).copy()))
        positions.append(artifact.position - 1)
    return LongRun(tuple(tokens), tuple(positions), torch.stack(rows))


def _with_steps(length: int) -> list[int]:
    last = min(LAST, length // 2)
    return [*calls(length - last), *[1] * last]


@torch.no_grad()
def examine_long_window(
    subject: Subject, run: LongRun, *, noise: Noise, kl_mean: float
) -> tuple[Section, Noise]:
    """Compares the run with both torch models.

    Returns also the noise floor of its positions.

    Args:
        subject: the target and its references.
        run: the artifact's logits.
        noise: of the short windows. The larger one of both decides.
        kl_mean: mean KL of the short windows to the full-precision model, nats.
    """
    tokens = run.tokens[:LONGEST]
    positions = [p for p in run.positions if p < len(tokens)]
    artifact = run.logits[: len(positions)]
    expected, floor = subject.expected.logits(tokens, positions), _noise_floor(subject, tokens, positions)
    reference = subject.full.logits(tokens, positions)
    parity, quality = (compare(logits, artifact, None) for logits in (expected, reference))
    steps = slice(-min(LAST, len(tokens) // 2), None)
    noise = noise.joined(Noise.of([floor]))
    figures = {
        "compared_to_position": len(tokens),
        "long_tokens": len(positions),
        "kl_long": float(parity.kl[steps].mean()),
        "kl_long_typical": geometric_mean(parity.kl),
        "kl_depths_max": worst(parity.kl),
        "noise_floor_kl_long": float(floor.mean()),
        "noise_floor_kl_long_spread": float(floor.std() / len(parity.kl[steps]) ** 0.5),
        "noise_floor_kl_long_typical": geometric_mean(floor),
        "noise_floor_kl_long_typical_spread": geometric_spread(floor) / len(parity.kl) ** 0.5,
        "noise_floor_kl_long_max": worst(floor),
        "reference_kl_long": float(quality.kl[steps].mean()),
    }
    checks = _checks(
        figures, parity, positions, noise, subject.target.parity_kl, kl_mean, subject.window_length
    )
    return Section(tuple(checks), {"parity": figures}), noise


def _checks(
    figures: dict[str, Any],
    parity: Positions,
    positions: Sequence[int],
    noise: Noise,
    always_passes: float,
    kl_mean: float,
    window_length: int,
) -> list[Check]:
    to = f"to position {figures['compared_to_position']}"
    deepest = int(np.argmax(parity.kl))
    floor, typical = figures["noise_floor_kl_long"], figures["noise_floor_kl_long_typical"]
    return [
        below(
            "parity.kl_long",
            figures["kl_long"],
            parity_limit(floor + 2 * figures["noise_floor_kl_long_spread"], always_passes),
            detail=f"{to}, noise floor {floor:.2e}",
        ),
        below(
            "parity.kl_long_typical",
            figures["kl_long_typical"],
            parity_limit(
                typical * math.exp(figures["noise_floor_kl_long_typical_spread"]),
                always_passes * TYPICAL_SHARE,
            ),
            detail=f"geometric mean, noise floor {typical:.2e}",
        ),
        below(
            "parity.depths",
            figures["kl_depths_max"],
            noise.limits(always_passes).position,
            detail=f"worst of {len(positions)} positions: {positions[deepest] + 1}",
        ),
        *_quality(figures, kl_mean, window_length, to),
    ]


def _quality(figures: dict[str, Any], kl_mean: float, window_length: int, to: str) -> list[Check]:
    """The check `quality.kl_long`; none if short windows, with their many positions, reach as far."""
    if figures["compared_to_position"] <= window_length:
        return []
    return [below("quality.kl_long", figures["reference_kl_long"], long_kl_limit(kl_mean), detail=to)]


def _noise_floor(subject: Subject, tokens: Sequence[int], positions: Sequence[int]) -> Float:
    """KL of the quantized model to itself with noise, at `positions` and at every eighth position."""
    wanted = sorted({*positions, *range(0, len(tokens), NOISE_STEP)})
    rows = [wanted[start : start + NOISE_ROWS] for start in range(0, len(wanted), NOISE_ROWS)]
    return np.concatenate(
        [
            kl_divergence(subject.expected.logits(tokens, part), subject.expected.noisy_logits(tokens, part))
            for part in rows
        ]
    )
