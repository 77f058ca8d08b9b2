"""Gate, part 3: score windows of text, artifact and reference side by side, until every limit is decided."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgellama.gate import metrics, parity
from edgellama.gate.limits import Limits
from edgellama.gate.metrics import Positions, kl_and_top1
from edgellama.gate.subject import Section, Subject
from edgellama.host.progress import Progress
from edgellama.report import Check, above, below
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Window

GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_TOKENS = 4, 32, 24


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
    subject: Subject, source: Iterator[Window], count: int, limits: Limits, progress: Progress
) -> Scores:
    """Score windows of `source`, artifact and reference side by side, until every limit is decided.

    count: windows that are scored first; then twice as many each time, until the text is used up.
    """
    scores = Scores()
    while True:
        with progress.bar("score", count - len(scores.quality), "window") as bar:
            exhausted = True
            for window in source:
                _score_window(subject, window, scores)
                bar.update(1)
                if len(scores.quality) == count:
                    exhausted = False
                    break
        checks = quality_checks(metrics.summarize(scores.quality), limits)
        undecided = [c.name for c in checks if c.verdict == "inconclusive"]
        if exhausted or not undecided:
            return scores
        progress.say(
            f"{', '.join(undecided)}: the interval straddles the limit after {count} windows; reading more text"
        )
        count *= 2


def _score_window(subject: Subject, window: Window, scores: Scores) -> None:
    subject.artifact.reset()
    candidate = subject.artifact.forward_all(window.tokens)
    subject.full.reset()
    reference = subject.full.forward_all(window.tokens)
    positions = metrics.compare(reference, candidate, window.targets)
    scores.quality.append(positions)
    scores.windows.append(window)
    scores.domains.setdefault(window.domain, []).append(positions)
    if len(scores.samples) < GREEDY_PROMPTS:
        scores.samples.append(window)
    if len(scores.parity) < parity.WINDOWS:
        compared, floor = parity.measure_parity(
            candidate[: parity.TOKENS],
            subject.quantized,
            window,
            numerics=subject.target.arithmetic_for(subject.bundle.recipe),
            seed=len(scores.parity),
        )
        scores.parity.append(compared)
        scores.floor.append(floor)


def examine_quality(subject: Subject, scores: Scores, limits: Limits, *, by_domain: bool) -> Section:
    """The section `quality` of a report and the fields that belong to it, with checks of the user's limits.

    by_domain: whether each text has a summary of its own as well.
    """
    figures, samples = greedy(subject.artifact, subject.full, scores.samples, subject.bundle.tokenizer)
    quality = metrics.summarize(scores.quality) | figures
    domains = {name: metrics.summarize(w) for name, w in sorted(scores.domains.items())} if by_domain else {}
    fields = {
        "tokens": sum(len(w.kl) for w in scores.quality),
        "windows": len(scores.quality),
        "quality": quality,
        "domains": domains,
        "scored": scored_section(scores.windows, scores.quality),
        "samples": tuple(samples),
    }
    return Section(tuple(quality_checks(quality, limits)), fields)


def quality_checks(quality: Mapping[str, Any], limits: Limits) -> list[Check]:
    """The checks named `quality.*`, one for each limit that was given."""
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
    spans = (slice(start, min(start + width, length)) for start in range(0, length, width))
    return [{"from": span.start, "to": span.stop, **kl_and_top1(scores, span)} for span in spans]
