"""Gate, part 3: score windows of text, artifact and reference side by side, until every limit is decided."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgellama.errors import UsageError
from edgellama.gate import metrics, parity
from edgellama.gate.metrics import Positions, clustered_mean
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.report import Check, above, below
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Window

GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_TOKENS = 4, 32, 24


@dataclass(frozen=True)
class Limits:
    """What quality must reach. max_kl: mean KL, nats per token; min_top1: share; max_ppl_ratio: artifact / reference."""

    max_kl: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("max_kl", 0.0, 100.0), ("min_top1", 0.0, 1.0), ("max_ppl_ratio", 0.0, 1e6)):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise UsageError(
                    f"{name} must lie in ({low:g}, {high:g}], got {value!r}", remedy="Correct the limit."
                )


@dataclass
class Scores:
    """What accumulates while windows are scored."""

    quality: list[Positions] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)  # what `quality` is about, in the same order
    domains: dict[str, list[Positions]] = field(default_factory=dict)
    parity: list[Positions] = field(default_factory=list)
    floor: list[Positions] = field(default_factory=list)
    samples: list[Window] = field(default_factory=list)  # the first few, for `consistency` and `greedy`


def score(
    source: Iterator[Window],
    artifact: Runtime,
    full: ReferenceRuntime,
    quantized: Llama,
    numerics: parity.Numerics,
    measured: Scores,
    count: int,
    limits: Limits,
    progress: Progress,
) -> dict[str, Any]:
    """Score windows until every limit is decided: the quality section. `count` windows first, then twice as many."""
    while True:
        with progress.bar("score", count - len(measured.quality), "window") as bar:
            exhausted = True
            for window in source:
                score_window(window, artifact, full, quantized, numerics, measured)
                bar.update(1)
                if len(measured.quality) == count:
                    exhausted = False
                    break
        quality = metrics.summarize(measured.quality)
        undecided = [c.name for c in quality_checks(quality, limits) if c.verdict == "inconclusive"]
        if exhausted or not undecided:
            return quality
        progress.say(
            f"{', '.join(undecided)}: the interval straddles the limit after {count} windows; reading more text"
        )
        count *= 2


def score_window(
    window: Window,
    artifact: Runtime,
    full: ReferenceRuntime,
    quantized: Llama,
    numerics: parity.Numerics,
    measured: Scores,
) -> None:
    artifact.reset()
    candidate = artifact.forward_all(window.tokens)
    full.reset()
    reference = full.forward_all(window.tokens)
    positions = metrics.compare(reference, candidate, window.targets)
    measured.quality.append(positions)
    measured.windows.append(window)
    measured.domains.setdefault(window.domain, []).append(positions)
    if len(measured.samples) < GREEDY_PROMPTS:
        measured.samples.append(window)
    if len(measured.parity) < parity.WINDOWS:
        compared, floor = parity.measure_parity(
            candidate[: parity.TOKENS],
            quantized,
            window,
            numerics=numerics,
            seed=len(measured.parity),
        )
        measured.parity.append(compared)
        measured.floor.append(floor)


def quality_checks(quality: dict[str, Any], limits: Limits) -> list[Check]:
    checks = []
    if limits.max_kl is not None:
        checks.append(
            below("quality.kl", quality["kl_mean"], limits.max_kl, interval=tuple(quality["kl_mean_ci95"]))
        )
    if limits.min_top1 is not None:
        interval = tuple(quality["top1_agreement_ci95"])
        checks.append(above("quality.top1", quality["top1_agreement"], limits.min_top1, interval=interval))
    if limits.max_ppl_ratio is not None:
        ratio = math.exp(quality["ln_ppl_ratio"])
        low, high = (math.exp(min(x, 700.0)) for x in quality["ln_ppl_ratio_ci95"])
        checks.append(below("quality.ppl_ratio", ratio, limits.max_ppl_ratio, interval=(low, high)))
    return checks


def greedy(
    artifact: Runtime, full: ReferenceRuntime, samples: Sequence[Window], tokenizer: Tokenizer
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy continuations of the samples' beginnings, side by side: how far they run together as a share of their
    length, for the quality section, and the texts themselves.
    """
    count = min(GREEDY_TOKENS, artifact.context_length - GREEDY_PROMPT_TOKENS)
    if count < 1:
        return {}, []
    rows: list[dict[str, Any]] = []
    for window in samples:
        prompt = window.tokens[:GREEDY_PROMPT_TOKENS]
        one, other = _continue(full, prompt, count), _continue(artifact, prompt, count)
        equal = metrics.common_prefix(one, other)
        shared, *texts = (tokenizer.decode(ids) for ids in (one[:equal], one, other))
        rows.append(
            {
                "domain": window.domain,
                "prompt": tokenizer.decode(prompt),
                "reference": texts[0],
                "artifact": texts[1],
                "tokens": count,
                "equal_tokens": equal,
                "equal_characters": min(metrics.common_prefix(shared, text) for text in texts),
            }
        )
    share = sum(row["equal_tokens"] / count for row in rows) / len(rows)
    return {"greedy_prefix_agreement": share, "greedy_tokens": count}, rows


def _continue(runtime: Runtime, prompt: Sequence[int], count: int) -> list[int]:
    runtime.reset()
    tokens: list[int] = []
    logits = runtime.forward(prompt)
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = runtime.forward(tokens[-1:])
    return tokens


# Bins of the KL's histogram: four to a decade, from 1e-8 to 1e2 nats.
LOG10_LOW, LOG10_STEP, BINS = -8.0, 0.25, 40


POSITION_BINS = 16


def scored_section(windows: Sequence[Window], scores: Sequence[Positions]) -> dict[str, Any]:
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
