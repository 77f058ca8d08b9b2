"""Agreement of a bundle's artifacts: every pair runs side by side on the same tokens.

Artifacts of one quantized model hold the same weights, so they differ in their arithmetic only. Two artifacts
with float activations differ by float16 rounding. If one quantizes activations, that quantization adds to the
difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.gate.effort import effort_for
from edgellama.gate.limits import agreement_limit, same_activations
from edgellama.gate.metrics import Positions, compare, kl_and_top1
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.report import Check, Report, below
from edgellama.runtimes.load import load
from edgellama.targets import find_target
from edgellama.text.windows import WINDOW, Text, default_texts, windows


def with_agreement(
    bundle: Bundle,
    reports: Sequence[Report],
    texts: Sequence[Text] | None,
    progress: Progress,
    known: Mapping[tuple[str, str], dict[str, Any]] | None = None,
) -> list[Report]:
    """Adds to each report the agreement with the other artifacts, and the checks named `agreement.*`.

    Returns the reports unchanged for a single target, or if any report has no checks or wrong hashes.

    Args:
        bundle: the bundle that the reports are about.
        reports: one for each target.
        texts: evaluation texts; None for those that ship with edgellama.
        progress: reporter of stages.
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
    """KL, top-1 agreement and tokens of every pair of targets, by (reference, candidate).

    known: figures of pairs that are not measured again.
    """
    known = known or {}
    all_pairs = list(combinations(targets, 2))
    scored: dict[tuple[str, str], list[Positions]] = {pair: [] for pair in all_pairs if pair not in known}
    unmeasured = [name for name in targets if any(name in pair for pair in scored)]
    with ExitStack() as stack:
        runtimes = {name: stack.enter_context(load(bundle, name)) for name in unmeasured}
        length = min(WINDOW, bundle.context_length)
        counts = {pair: -(-_tokens(pair) // length) for pair in scored}
        most = max(counts.values(), default=0)
        chosen = list(islice(windows(texts, bundle.tokenizer, length), most))
        for number, window in enumerate(chosen):
            pairs = [pair for pair, count in counts.items() if number < count]
            logits: dict[str, Tensor] = {}
            for name, runtime in runtimes.items():
                if any(name in pair for pair in pairs):
                    runtime.reset()
                    logits[name] = runtime.forward_all(window.tokens)
            for reference, candidate in pairs:
                positions = compare(logits[reference], logits[candidate], None)
                scored[reference, candidate].append(positions)
    strata = [window.domain for window in chosen]
    return {
        pair: _summary(scored[pair], strata[: len(scored[pair])]) if pair in scored else known[pair]
        for pair in all_pairs
    }


def _tokens(pair: tuple[str, str]) -> int:
    """Tokens that a pair is compared on, as its slower side allows."""
    return min(effort_for(find_target(name)).pair_tokens for name in pair)


def _summary(positions: Sequence[Positions], strata: Sequence[str]) -> dict[str, Any]:
    return {"tokens": sum(len(p.kl) for p in positions), **kl_and_top1(positions, strata)}


def _added(report: Report, pairs: Mapping[tuple[str, str], dict[str, Any]]) -> Report:
    own = {
        (candidate if reference == report.target else reference): figures
        for (reference, candidate), figures in pairs.items()
        if report.target in (reference, candidate)
    }
    return replace(report, agreement=own, checks=(*report.checks, *_checks(report.target, own.items())))


def _checks(name: str, figures: Iterable[tuple[str, dict[str, Any]]]) -> list[Check]:
    target, checks = find_target(name), []
    for other_name, section in figures:
        other_target = find_target(other_name)
        detail = f"top-1 {section['top1_agreement']:.1%}"
        if not same_activations(target, other_target):
            detail += "; activations are rounded in other ways"
        limit = agreement_limit(target, other_target)
        checks.append(below(f"agreement.{other_name}", section["kl_mean"], limit, detail=detail))
    return checks
