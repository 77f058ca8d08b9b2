"""Gate, part 3: score windows of text, artifact and reference side by side, until every limit is decided."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellama.errors import UsageError
from edgellama.gate import metrics as compare
from edgellama.gate import parity
from edgellama.gate.metrics import Positions
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.report.report import Check, above, below
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
        quality = compare.summarize(measured.quality)
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
    positions = compare.compare(reference, candidate, window.targets)
    measured.quality.append(positions)
    measured.windows.append(window)
    measured.domains.setdefault(window.domain, []).append(positions)
    if len(measured.samples) < GREEDY_PROMPTS:
        measured.samples.append(window)
    if len(measured.parity) < parity.WINDOWS:
        compared, floor = parity.measure(
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
        equal = compare.common_prefix(one, other)
        shared, *texts = (tokenizer.decode(ids) for ids in (one[:equal], one, other))
        rows.append(
            {
                "domain": window.domain,
                "prompt": tokenizer.decode(prompt),
                "reference": texts[0],
                "artifact": texts[1],
                "tokens": count,
                "equal_tokens": equal,
                "equal_characters": min(compare.common_prefix(shared, text) for text in texts),
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
