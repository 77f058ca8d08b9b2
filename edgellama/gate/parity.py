"""Parity of the artifact with the quantized torch model.

Int8 activations make a deep model chaotic. One flipped rounding changes an activation by a whole step, and
the change spreads through layers and positions. SmolLM2-135M's 30 layers turn float32 rounding noise into a
KL of 0.02 between two *correct* runs, from the second token on.

The limit is therefore a multiple of a noise floor that is measured in the same run. It is the KL of the
quantized torch model to itself with noise (`edgellama.gate.references`). Errors below the floor are found by
the exact comparison of the file (`structure`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellama.gate.limits import MIN_TOP1, TIE, parity_limit
from edgellama.gate.metrics import Positions, compare
from edgellama.gate.references import QuantizedReference
from edgellama.gate.subject import Section
from edgellama.report import Check, above, below
from edgellama.runtimes.base import Runtime
from edgellama.text.windows import Window

TOKENS = 64  # positions of a window that are compared
WINDOWS = 4
FIRST = 8  # positions of a window that are judged on their own


def steps(runtime: Runtime, tokens: Sequence[int]) -> Tensor:
    """Logits after each of `tokens`, fed one at a time from position 0: float32 [T, vocab_size]."""
    runtime.reset()
    first = torch.from_numpy(runtime.forward(tokens[:1]))
    # Filled at once, because a list of rows would double the memory.
    rows = torch.empty(len(tokens), len(first))
    rows[0] = first
    for row, token in zip(rows[1:], tokens[1:], strict=True):
        row.copy_(torch.from_numpy(runtime.forward([token])))
    return rows


def measure_parity(
    artifact: Tensor, reference: QuantizedReference, window: Window
) -> tuple[Positions, Positions]:
    """Metrics of the artifact, and of the noise floor, against the quantized model.

    Args:
        artifact: logits float32 [T, vocab_size] of the first T positions of `window`, from decode steps.
        reference: the quantized model in the target's arithmetic.
        window: tokens, and those that came next.
    """
    count = artifact.shape[0]
    tokens = window.tokens[:count]
    targets = None if reference.model.config.is_classifier else window.targets[:count]
    expected, floor = reference.logits(tokens), reference.noisy_logits(tokens)
    return compare(expected, artifact, targets), compare(expected, floor, targets)


def summarize(artifact: Sequence[Positions], floor: Sequence[Positions]) -> dict[str, Any]:
    """The section `parity` of a report, without the figures that `consistency` adds."""
    kl, noise = np.concatenate([w.kl for w in artifact]), np.concatenate([w.kl for w in floor])
    return {
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "kl_first_positions": float(np.mean([w.kl[:FIRST].mean() for w in artifact])),
        "noise_floor_kl": float(noise.mean()),
        "noise_floor_kl_max": float(noise.max()),
        "noise_floor_kl_first_positions": float(np.mean([w.kl[:FIRST].mean() for w in floor])),
        "top1_agreement": float(np.concatenate([w.top1 for w in artifact]).mean()),
        "top1_agreement_without_ties": top1_without_ties(artifact),
    }


def examine_parity(
    artifact: Sequence[Positions], floor: Sequence[Positions], always_passes: float
) -> Section:
    """The section `parity` of a report with its checks.

    artifact, floor: metrics of the compared windows, as `measure_parity` returns them.
    always_passes: KL that always passes, nats.
    """
    parity = summarize(artifact, floor)
    return Section(tuple(checks(parity, always_passes)), {"parity": parity})


def checks(parity: dict[str, Any], always_passes: float) -> list[Check]:
    """The checks named `parity.*`. always_passes: KL that always passes, nats.

    Top tokens must agree as well if the noise floor is below `always_passes`. Above it, single
    tokens prove nothing.
    """
    top1 = parity["top1_agreement_without_ties"]
    floor, first = parity["noise_floor_kl"], parity["noise_floor_kl_first_positions"]
    return [
        below(
            "parity.kl",
            parity["kl_mean"],
            parity_limit(floor, always_passes),
            detail=f"noise floor {floor:.2e}",
        ),
        below(
            "parity.kl_first_positions",
            parity["kl_first_positions"],
            parity_limit(first, always_passes),
            detail=f"noise floor {first:.2e}",
        ),
        *([above("parity.top1", top1, MIN_TOP1, detail="ties left out")] if floor < always_passes else []),
    ]


def top1_without_ties(windows: Sequence[Positions]) -> float:
    """Share of positions whose top token agrees, where the reference's best two are at least TIE apart."""
    clear = np.concatenate([w.gap for w in windows]) >= TIE
    top1 = np.concatenate([w.top1 for w in windows])[clear]
    return float(top1.mean()) if len(top1) else 1.0
