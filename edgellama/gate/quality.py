"""Quality of the artifact against the full-precision model: windows scored until each limit is decided."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.gate import metrics, parity
from edgellama.gate.effort import WHOLE, effort_for
from edgellama.gate.greedy import greedy
from edgellama.gate.limits import ERROR, Limits
from edgellama.gate.looks import Look, plan_looks
from edgellama.gate.metrics import Positions, kl_and_top1
from edgellama.gate.quality_families import check_unscored
from edgellama.gate.references import QuantizedReference
from edgellama.gate.subject import Section, Subject
from edgellama.host.progress import Progress
from edgellama.report import Check, above, below
from edgellama.runtimes.base import Runtime
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Window, WindowedText, in_turn


@dataclass
class Scores:
    """Metrics accumulated over the scored windows.

    Attributes:
        quality: artifact against the full-precision model, for each window.
        windows: the scored windows, in the order of `quality`.
        domains: `quality` by text.
        parity: artifact against the quantized model, for the first `parity.WINDOWS` windows.
        floor: noise floor of the same windows.
        samples: the first windows, for `consistency` and `greedy`.
        look: the last look at the windows, which decides.
        texts: number of windows of each text, and of those that repeat earlier text.
        families: as `quality`, of the replica for each family of processors that rounds otherwise.
    """

    quality: list[Positions] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    domains: dict[str, list[Positions]] = field(default_factory=dict)
    parity: list[Positions] = field(default_factory=list)
    floor: list[Positions] = field(default_factory=list)
    samples: list[Window] = field(default_factory=list)
    look: Look = field(default_factory=lambda: Look(1, 1, 0, ERROR))
    texts: list[dict[str, Any]] = field(default_factory=list)
    families: dict[str, list[Positions]] = field(default_factory=dict)

    def summary(self, family: str | None = None) -> dict[str, Any]:
        """Figures of all windows, and `decided_on`: the intervals of the last look.

        family: name in `families`; None for the artifact.
        """
        strata = [window.domain for window in self.windows]
        positions = self.quality if family is None else self.families[family]
        bounds = metrics.means(positions, strata, error=self.look.error)
        return {
            **metrics.summarize(positions, strata),
            "decided_on": {
                "look": self.look.number,
                "looks": self.look.planned,
                "confidence": 1 - 2 * self.look.error,
                **{name: [estimate.low, estimate.high] for name, estimate in bounds.items()},
            },
        }


def score(
    subject: Subject,
    texts: Sequence[WindowedText],
    count: int,
    limits: Limits,
    progress: Progress,
    families: Mapping[str, QuantizedReference] | None = None,
) -> Scores:
    """Scores windows of `texts`, artifact and reference side by side, until every limit is decided.

    Args:
        subject: the target and its references.
        texts: windows of evaluation text.
        count: number of windows to score first. It doubles while a limit is undecided and text is left.
        limits: limits of quality.
        progress: reporter of stages.
        families: replicas of other processors, by the name of their family, to be scored too.
    """
    families = families or {}
    return _scored(
        (subject.full, *families.values()),
        texts,
        count,
        limits,
        progress,
        partial(_score_window, subject, families),
    )


def score_quality(
    artifact: Runtime,
    full: StreamedLlama,
    texts: Sequence[WindowedText],
    count: int,
    limits: Limits,
    progress: Progress,
) -> Scores:
    """`score` without parity, for an artifact of which no quantized model is known."""
    return _scored((full,), texts, count, limits, progress, partial(_score_pair, artifact, full))


def score_windows(artifact: Runtime, full: StreamedLlama, windows: Sequence[Window]) -> Scores:
    """Scores the given windows, and decides nothing."""
    scores = Scores()
    for window in windows:
        _score_pair(artifact, full, window, scores, samples=0)
    return scores


def _scored(
    references: Sequence[StreamedLlama | QuantizedReference],
    texts: Sequence[WindowedText],
    count: int,
    limits: Limits,
    progress: Progress,
    score_window: Callable[[Window, Scores], object],
) -> Scores:
    source = list(in_turn(texts))
    scores = Scores()
    scores.texts = [
        {"name": text.name, "windows": len(text.windows), "repeated": text.repeated} for text in texts
    ]
    for look in plan_looks(count, len(source)):
        scores.look = look
        new = source[len(scores.quality) : look.windows]
        for reference in references:
            reference.read_ahead([window.tokens for window in new], progress)
        with progress.bar("score", len(new), "window") as bar:
            for window in new:
                score_window(window, scores)
                bar.update(1)
        undecided = [c.name for c in _all_checks(scores, limits) if c.verdict == "inconclusive"]
        if not undecided:
            break
        if look.number < look.planned:
            progress.say(
                f"{', '.join(undecided)}: the interval straddles the limit after {look.windows} windows; "
                "reading more text"
            )
    return scores


def _score_window(
    subject: Subject, families: Mapping[str, QuantizedReference], window: Window, scores: Scores
) -> None:
    samples = effort_for(subject.target).continuations
    candidate, reference = _score_pair(subject.artifact, subject.full, window, scores, samples=samples)
    for name, replica in families.items():
        positions = metrics.compare(reference, replica.logits(window.tokens), _targets(subject.full, window))
        scores.families.setdefault(name, []).append(positions)
    if len(scores.parity) < parity.WINDOWS:
        beginning = candidate[: parity.TOKENS].clone()
        del candidate, reference  # the logits of a whole window, beside those that the measurement computes
        compared, floor = parity.measure_parity(beginning, subject.expected, window)
        scores.parity.append(compared)
        scores.floor.append(floor)


def _score_pair(
    artifact: Runtime,
    full: StreamedLlama,
    window: Window,
    scores: Scores,
    *,
    samples: int = WHOLE.continuations,
) -> tuple[Tensor, Tensor]:
    """Adds the metrics of one window. Returns the artifact's logits and the reference's.

    samples: number of windows that are kept for greedy text.
    """
    artifact.reset()
    candidate = artifact.forward_all(window.tokens)
    reference = full.logits(window.tokens)
    positions = metrics.compare(reference, candidate, _targets(full, window))
    scores.quality.append(positions)
    scores.windows.append(window)
    scores.domains.setdefault(window.domain, []).append(positions)
    if len(scores.samples) < samples:
        scores.samples.append(window)
    return candidate, reference


def _targets(full: StreamedLlama, window: Window) -> tuple[int, ...] | None:
    """The tokens that come next; None for a classifier, which predicts none."""
    return None if full.config.is_classifier else window.targets


def examine_quality(subject: Subject, scores: Scores, limits: Limits, *, by_domain: bool) -> Section:
    """The section `quality` of a report and the fields that belong to it, with checks of the user's limits.

    by_domain: summarize each text separately as well.
    """
    section = quality_section(
        subject.artifact, subject.full, subject.bundle.tokenizer, scores, limits, by_domain=by_domain
    )
    return replace(section, checks=(*section.checks, *check_unscored(subject, scores.families)))


def quality_section(
    artifact: Runtime,
    full: StreamedLlama,
    tokenizer: Tokenizer,
    scores: Scores,
    limits: Limits,
    *,
    by_domain: bool,
) -> Section:
    """`examine_quality` of a runtime and its reference."""
    writes = not full.config.is_classifier
    figures, samples = greedy(artifact, full, scores.samples, tokenizer) if writes else ({}, [])
    quality = scores.summary() | figures
    domains = {name: metrics.summarize(w) for name, w in sorted(scores.domains.items())} if by_domain else {}
    fields = {
        "tokens": sum(len(w.kl) for w in scores.quality),
        "windows": len(scores.quality),
        "quality": quality,
        "domains": domains,
        "scored": {**scored_section(scores.windows, scores.quality), "texts": scores.texts},
        "samples": tuple(samples),
    }
    if scores.families:
        quality["families"] = {family: scores.summary(family) for family in scores.families}
    return Section(tuple(_all_checks(scores, limits)), fields)


def _all_checks(scores: Scores, limits: Limits) -> list[Check]:
    """The checks of the artifact, and of the replica for each family of processors that rounds otherwise."""
    checks = quality_checks(scores.summary(), limits)
    for family in scores.families:
        checks += quality_checks(scores.summary(family), limits, suffix=f"_{family.replace('-', '_')}")
    return checks


def quality_checks(quality: Mapping[str, Any], limits: Limits, *, suffix: str = "") -> list[Check]:
    """The checks named `quality.*`, one for each limit that is not None.

    The intervals that decide are wider than those of 95 % where more than one look was planned.

    suffix: of the checks' names.
    """
    bounds = quality["decided_on"]
    checks = []
    if limits.max_kl is not None:
        interval = tuple(bounds["kl_mean"])
        checks.append(
            below(
                f"quality.kl{suffix}",
                quality["kl_mean"],
                limits.max_kl,
                interval=interval,
                detail="; ".join(filter(None, (_shown(interval), limits.kl_source))),
            )
        )
    if limits.min_top1 is not None:
        interval = tuple(bounds["top1_agreement"])
        detail = f"{_shown(interval)}; equal logits agree"
        checks.append(
            above(
                f"quality.top1{suffix}",
                quality["top1_agreement"],
                limits.min_top1,
                interval=interval,
                detail=detail,
            )
        )
    if limits.max_ppl_ratio is not None:
        ratio = math.exp(min(quality["ln_ppl_ratio"], 700.0))
        low, high = (math.exp(min(x, 700.0)) for x in bounds["ln_ppl_ratio"])
        checks.append(
            below(
                f"quality.ppl_ratio{suffix}",
                ratio,
                limits.max_ppl_ratio,
                interval=(low, high),
                detail=_shown((low, high)),
            )
        )
    return checks


def _shown(interval: Sequence[float]) -> str:
    low, high = interval
    return f"decided on [{low:.4f}, {high:.4f}]"


# Bins of the KL's histogram: four a decade, from 1e-8 to 1e2 nats.
LOG10_LOW, LOG10_STEP, BINS = -8.0, 0.25, 40
POSITION_BINS = 16  # at most


def scored_section(windows: Sequence[Window], scores: Sequence[Positions]) -> dict[str, Any]:
    """The section `scored` of a report.

    `windows` has a row for each window: means per token, and a hash of its token ids. `kl_histogram` counts
    tokens by the logarithm of their KL; `below` and `above` count those outside the bins. `by_position` has
    KL and top-1 agreement of positions [from, to) of the windows.
    """
    return {
        "windows": [
            {
                "domain": window.domain,
                "tokens": len(positions.kl),
                "sha256": window_sha256(window),
                "kl": float(positions.kl.mean()),
                "top1": float(positions.top1.mean()),
                **_losses(positions),
            }
            for window, positions in zip(windows, scores, strict=True)
        ],
        "kl_histogram": _histogram(scores),
        "by_position": _by_position(scores, [window.domain for window in windows]),
    }


def _losses(positions: Positions) -> dict[str, float]:
    """Mean losses of a window's next tokens; none for logits of labels."""
    if not len(positions.nll_reference):
        return {}
    return {
        "nll_reference": float(positions.nll_reference.mean()),
        "nll_artifact": float(positions.nll_candidate.mean()),
    }


def window_sha256(window: Window) -> str:
    """Hash of a window's token ids and targets."""
    return hashlib.sha256(json.dumps([window.tokens, window.targets]).encode()).hexdigest()


def _histogram(scores: Sequence[Positions]) -> dict[str, Any]:
    kl = np.concatenate([positions.kl for positions in scores])
    kl = kl[np.isfinite(kl)]
    bins = np.floor((np.log10(np.maximum(kl, 1e-300)) - LOG10_LOW) / LOG10_STEP).astype(int)
    inside = bins[(bins >= 0) & (bins < BINS)]
    return {
        "log10_low": LOG10_LOW,
        "log10_step": LOG10_STEP,
        "counts": np.bincount(inside, minlength=BINS).tolist(),
        "below": int((bins < 0).sum()),
        "above": int((bins >= BINS).sum()),
    }


def _by_position(scores: Sequence[Positions], strata: Sequence[str]) -> list[dict[str, Any]]:
    length = min(len(positions.kl) for positions in scores)
    width = max(1, -(-length // POSITION_BINS))
    spans = (slice(start, min(start + width, length)) for start in range(0, length, width))
    return [
        {"from": span.start, "to": span.stop, **kl_and_top1(scores, strata, positions=span)} for span in spans
    ]
