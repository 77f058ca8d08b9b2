"""Gate, part 4: do the artifacts of a bundle agree with each other? Every pair, on the same tokens, side by side.

Artifacts of one quantized model hold the same weights, so what is between two of them is their arithmetic: float16
rounding where both leave activations in float, and the quantization of activations where one of them quantizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.gate.limits import agreement_limit
from edgellama.gate.metrics import Positions, compare, kl_and_top1
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.report import Check, Report, below
from edgellama.runtimes.load import load
from edgellama.targets import find_target
from edgellama.text.windows import WINDOW, Text, default_texts, windows

TOKENS = 1024


def with_agreement(
    bundle: Bundle,
    reports: Sequence[Report],
    texts: Sequence[Text] | None,
    progress: Progress,
    known: Mapping[tuple[str, str], dict[str, Any]] | None = None,
) -> list[Report]:
    """The reports of a bundle's targets, each with its agreement with the others and checks of that.

    known: figures of pairs that were measured before.
    """
    targets = [report.target for report in reports]
    if len(targets) < 2 or any(not r.checks or r.structure.get("files") == "fail" for r in reports):
        return list(reports)
    with progress.stage("agreement"):
        pairs = measure_agreement(bundle, targets, texts or default_texts(), known)
    return [_added(report, pairs) for report in reports]


@one_thread()
def measure_agreement(
    bundle: Bundle,
    targets: Sequence[str],
    texts: Sequence[Text],
    known: Mapping[tuple[str, str], dict[str, Any]] | None = None,
) -> dict[tuple[str, str], dict[str, Any]]:
    """(reference, candidate) -> KL with its interval, top-1 agreement, tokens; for every pair of targets.

    known: pairs that need not be measured again.
    """
    known = known or {}
    all_pairs = list(combinations(targets, 2))
    scored: dict[tuple[str, str], list[Positions]] = {pair: [] for pair in all_pairs if pair not in known}
    wanted = [name for name in targets if any(name in pair for pair in scored)]
    with ExitStack() as stack:
        runtimes = {name: stack.enter_context(load(bundle, name)) for name in wanted}
        length = min(WINDOW, bundle.context_length)
        count = -(-TOKENS // length) if scored else 0
        for window in islice(windows(texts, bundle.tokenizer, length), count):
            logits: dict[str, Tensor] = {}
            for name, runtime in runtimes.items():
                runtime.reset()
                logits[name] = runtime.forward_all(window.tokens)
            for (one, other), positions in scored.items():
                positions.append(compare(logits[one], logits[other], window.targets))
    return {pair: _summary(scored[pair]) if pair in scored else known[pair] for pair in all_pairs}


def _summary(positions: Sequence[Positions]) -> dict[str, Any]:
    return {"tokens": sum(len(p.kl) for p in positions), **kl_and_top1(positions)}


def _added(report: Report, pairs: Mapping[tuple[str, str], dict[str, Any]]) -> Report:
    own = {
        (other if one == report.target else one): figures
        for (one, other), figures in pairs.items()
        if report.target in (one, other)
    }
    return replace(report, agreement=own, checks=(*report.checks, *_checks(report.target, own.items())))


def _checks(name: str, figures: Iterable[tuple[str, dict[str, Any]]]) -> list[Check]:
    target, checks = find_target(name), []
    for other_name, section in figures:
        other = find_target(other_name)
        detail = f"top-1 {section['top1_agreement']:.1%}"
        if target.activations is not other.activations:
            detail += "; activations are rounded in other ways"
        limit = agreement_limit(target, other)
        checks.append(below(f"agreement.{other_name}", section["kl_mean"], limit, detail=detail))
    return checks
