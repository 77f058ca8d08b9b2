"""The section `scored` of a report: what was scored, window by window, for a later run to be paired with; and how the
KL is distributed, over tokens and over positions, for people to look at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellama.gate.metrics import Positions, clustered_mean
from edgellama.text.windows import Window

# Bins of the KL's histogram: four to a decade, from 1e-8 to 1e2 nats.
LOG10_LOW, LOG10_STEP, BINS = -8.0, 0.25, 40
POSITION_BINS = 16


def section(windows: Sequence[Window], scores: Sequence[Positions]) -> dict[str, Any]:
    """`windows`: a row for each, means per token, with a hash of its token ids. `kl_histogram`: counts of tokens by the
    logarithm of their KL; `below` and `above` lie outside of the bins. `by_position`: positions [from, to) of the windows.
    """
    return {
        "windows": [
            {
                "domain": window.domain,
                "tokens": len(found.kl),
                "sha256": window_sha256(window),
                "kl": float(found.kl.mean()),
                "top1": float(found.top1.mean()),
                "nll_reference": float(found.nll_reference.mean()),
                "nll_artifact": float(found.nll_candidate.mean()),
            }
            for window, found in zip(windows, scores, strict=True)
        ],
        "kl_histogram": _histogram(scores),
        "by_position": _by_position(scores),
    }


def window_sha256(window: Window) -> str:
    """Hash of a window's token ids and of those that come next."""
    return hashlib.sha256(json.dumps([window.tokens, window.targets]).encode()).hexdigest()


def _histogram(scores: Sequence[Positions]) -> dict[str, Any]:
    kl = np.concatenate([found.kl for found in scores])
    kl = kl[np.isfinite(kl)]
    place = np.floor((np.log10(np.maximum(kl, 1e-300)) - LOG10_LOW) / LOG10_STEP).astype(int)
    inside = place[(place >= 0) & (place < BINS)]
    return {
        "log10_low": LOG10_LOW,
        "log10_step": LOG10_STEP,
        "counts": np.bincount(inside, minlength=BINS).tolist(),
        "below": int((place < 0).sum()),
        "above": int((place >= BINS).sum()),
    }


def _by_position(scores: Sequence[Positions]) -> list[dict[str, Any]]:
    length = min(len(found.kl) for found in scores)
    width = max(1, -(-length // POSITION_BINS))
    rows = []
    for start in range(0, length, width):
        span = slice(start, min(start + width, length))
        kl, (low, high) = clustered_mean([found.kl[span] for found in scores])
        top1, (top_low, top_high) = clustered_mean([found.top1[span] for found in scores])
        rows.append(
            {
                "from": span.start,
                "to": span.stop,
                "kl_mean": kl,
                "kl_mean_ci95": [max(0.0, low), high],
                "top1_agreement": top1,
                "top1_agreement_ci95": [max(0.0, top_low), min(1.0, top_high)],
            }
        )
    return rows
