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
from edgellama.gate.metrics import Positions, clustered_mean, compare
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.report import Check, Report, below
from edgellama.runtimes.load import load
from edgellama.targets import find_target
from edgellama.text.windows import WINDOW, Text, default_texts, windows

TOKENS = 1024
# Mean KL, nats per token: int8 activations alone cost SmolLM2-135M about 0.014 and leave 0.035 between two runs of
# the same model that differ by rounding noise.
ACTIVATIONS = 0.04


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
    kl, (low, high) = clustered_mean([p.kl for p in positions])
    top1, (top_low, top_high) = clustered_mean([p.top1 for p in positions])
    return {
        "tokens": sum(len(p.kl) for p in positions),
        "kl_mean": kl,
        "kl_mean_ci95": [max(0.0, low), high],
        "top1_agreement": top1,
        "top1_agreement_ci95": [max(0.0, top_low), min(1.0, top_high)],
    }


def _added(report: Report, pairs: Mapping[tuple[str, str], dict[str, Any]]) -> Report:
    own = {
        (other if one == report.target else one): figures
        for (one, other), figures in pairs.items()
        if report.target in (one, other)
    }
    return replace(report, agreement=own, checks=(*report.checks, *_checks(report.target, own.items())))


def _checks(target: str, figures: Iterable[tuple[str, dict[str, Any]]]) -> list[Check]:
    row = find_target(target)
    checks = []
    for other, found in figures:
        same = find_target(other).activations is row.activations
        limit = 2 * (row.parity_kl + find_target(other).parity_kl) if same else ACTIVATIONS
        detail = f"top-1 {found['top1_agreement']:.1%}" + (
            "" if same else "; activations are rounded in other ways"
        )
        checks.append(below(f"agreement.{other}", found["kl_mean"], limit, detail=detail))
    return checks
