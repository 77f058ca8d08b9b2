"""Checks of the artifact on emulated Arm processors: golden vectors, scored text, rounding, and the kernels that ran.

A phone's kernels round in another order than this machine's. On an emulated processor the artifact is
computed by the kernels that a phone with that processor chooses. The limits are those of a device log.
Sequences longer than MOST_TOKENS tokens are left out, because emulated prefill is 40 times slower.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.bundle.golden import REFERENCE, Golden, read_golden
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.emulator.installed import Emulator, find_emulator
from edgellama.emulator.kernels import executed_kernels
from edgellama.emulator.processors import Processor, find_processor
from edgellama.errors import BundleError
from edgellama.gate import metrics
from edgellama.gate.emulated_kernels import (
    check_kernels,
    check_rounding,
    client_entries,
    kind_of,
    label,
    rounding_probe,
)
from edgellama.gate.golden import feed
from edgellama.gate.limits import recipe_limit
from edgellama.host.progress import Progress
from edgellama.report import Check, Report, below, check
from edgellama.runtimes.emulated import KINDS, EmulatedRuntime, not_emulated
from edgellama.targets import find_target
from edgellama.text.windows import Text, Window, default_texts, windows

Result = tuple[dict[str, Any], list[Check]]  # the row of a run, and its checks

MOST_TOKENS = 512  # tokens of a golden sequence
WINDOW = 128  # tokens of a scored window


@dataclass(frozen=True)
class Emulation:
    """Processors to emulate."""

    emulator: Emulator
    processors: tuple[Processor, ...]

    @classmethod
    def of(cls, specifications: Sequence[str], targets: Sequence[str]) -> Emulation:
        """Processors named as on the command line (`arm64:cortex-a76`).

        Raises UsageError for an unknown one or if none of the targets can run there, MissingDependencyError if
        the emulator is not installed.
        """
        processors = tuple(dict.fromkeys(map(find_processor, specifications)))
        if not set(targets) & set(KINDS):
            raise not_emulated(targets)
        return cls(find_emulator(), processors)


@dataclass(frozen=True)
class ScoredText:
    """Text to score on the emulated processors.

    Attributes:
        windows: windows of evaluation text.
        logits: of the full-precision checkpoint, float32 [T, vocab_size] for each window.
        max_kl: limit for the mean KL, nats per token.
    """

    windows: Sequence[Window]
    logits: Sequence[Tensor]
    max_kl: float

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        checkpoint: Checkpoint,
        texts: Sequence[Text] | None,
        tokens: int,
        max_kl: float | None,
    ) -> ScoredText:
        """At least `tokens` tokens of the texts, read by the checkpoint.

        texts: None for those that ship with edgellama. max_kl: None for the limit of the gate.
        """
        length = min(WINDOW, bundle.context_length)
        chosen = list(
            islice(windows(texts or default_texts(), bundle.tokenizer, length), -(-tokens // length))
        )
        full = StreamedLlama(checkpoint)
        full.read_ahead([window.tokens for window in chosen])
        logits = [full.logits(window.tokens) for window in chosen]
        if max_kl is None:
            max_kl, _ = recipe_limit(bundle.recipe, checkpoint.config.parameters)
        return cls(chosen, logits, max_kl)


def with_emulation(
    bundle: Bundle,
    reports: Sequence[Report],
    emulation: Emulation,
    progress: Progress,
    scored: ScoredText | None = None,
) -> list[Report]:
    """Adds to each report the checks named `emulated.*` of every processor, and the field `emulated`.

    Reports about targets without an Arm runtime are unchanged. As many processors run side by side as this
    machine has cores. Each has one thread.
    """
    golden = read_golden(bundle)
    targets = [report.target for report in reports if report.target in KINDS]
    jobs = [(target, processor) for target in targets for processor in emulation.processors]
    run = partial(_examine, bundle, golden, emulation.emulator, scored)
    with progress.bar("emulated Arm", len(jobs), "processor") as bar, ThreadPoolExecutor(_cores()) as pool:
        results = []
        for result in pool.map(lambda job: run(*job), jobs):
            results.append(result)
            bar.update(1)
    return [
        _joined(report, [r for (t, _), r in zip(jobs, results, strict=True) if t == report.target])
        for report in reports
    ]


def _joined(report: Report, results: Sequence[Result]) -> Report:
    """The report with the rows and checks of its target's runs."""
    rows, checks = tuple(row for row, _ in results), tuple(c for _, part in results for c in part)
    return replace(report, emulated=rows, checks=(*report.checks, *checks))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _examine(
    bundle: Bundle,
    golden: Golden,
    emulator: Emulator,
    scored: ScoredText | None,
    target: str,
    processor: Processor,
) -> Result:
    """The row of the field `emulated`, and the checks, of one artifact on one processor."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "translated.log"
        try:
            runtime = EmulatedRuntime(
                emulator,
                processor,
                find_target(target),
                bundle.artifact(target),
                entries=client_entries(bundle.artifact(target)) if target == "onnx" else (),
                probe=rounding_probe(bundle, target, Path(directory)),
                log=log,
            )
            with runtime:
                family = golden.family_of(target, kind_of(processor))
                row, checks = _golden_checks(golden.for_family(target, family), target, runtime)
                if scored is not None:
                    figures, check_of_text = _score(runtime, scored)
                    row, checks = row | {"scored": figures}, [*checks, check_of_text]
        except BundleError as error:
            row = {"processor": processor.name, "qemu": emulator.qemu}
            return row, [check(f"emulated.{processor.name}.load", False, detail=error.message)]
        kernels = executed_kernels(emulator, log, runtime.mapped)
    if runtime.probe is not None:
        checks.append(check_rounding(processor, runtime.probe, family))
    row |= {
        "processor": processor.name,
        "qemu": emulator.qemu,
        "features": runtime.features,
        "label": label(processor, emulator, kernels),
        "family": family,
        "kernels": list(kernels.names),
        "products": kernels.products,
    }
    return row, [*checks, check_kernels(bundle, target, processor, kernels)]


def _golden_checks(
    golden: Golden, target: str, runtime: EmulatedRuntime
) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks of the golden sequences that are short enough."""
    limits, name = golden.limits(target), f"emulated.{runtime.processor.name}"
    numbers = [n for n, s in enumerate(golden.sequences) if len(s.tokens) <= MOST_TOKENS]
    parity, quality, top1, parity_top1 = ([], [], [], [])
    for number in numbers:
        rows, span = feed(runtime, golden.sequences[number]), golden.rows(number)
        host, reference = golden.expected[target][span], golden.expected[REFERENCE][span]
        parity.append(host.kl(rows))
        quality.append(reference.kl(rows))
        parity_top1.append(host.top1(rows))
        top1.append(reference.top1(rows))
    means = [float(kl.mean()) for kl in parity]
    worst = max(range(len(means)), key=means.__getitem__)
    longest = max(len(golden.sequences[number].tokens) for number in numbers)
    figures = {
        "positions": sum(map(len, parity)),
        "to_position": longest - 1,
        "parity_kl_mean": float(np.concatenate(parity).mean()),
        "parity_kl_sequence": means[worst],
        "parity_top1_agreement": float(np.concatenate(parity_top1).mean()),
        "kl_mean": float(np.concatenate(quality).mean()),
        "top1_agreement": float(np.concatenate(top1).mean()),
    }
    return figures, [
        below(
            f"{name}.parity_kl",
            figures["parity_kl_mean"],
            limits["parity_kl_mean"],
            detail=f"top-1 {figures['parity_top1_agreement']:.1%} of the host's artifact",
        ),
        below(
            f"{name}.parity_kl_sequence",
            means[worst],
            limits["parity_kl_sequence"],
            detail=f"worst: {golden.sequences[numbers[worst]].name}",
        ),
    ]


def _score(runtime: EmulatedRuntime, scored: ScoredText) -> tuple[dict[str, Any], Check]:
    """Quality on text: figures as in the section `quality`, and the check of their mean KL."""
    positions = []
    for window, reference in zip(scored.windows, scored.logits, strict=True):
        runtime.reset()
        positions.append(metrics.compare(reference, runtime.forward_all(window.tokens), window.targets))
    figures = metrics.summarize(positions) | {
        "tokens": sum(len(p.kl) for p in positions),
        "windows": len(positions),
    }
    return figures, below(
        f"emulated.{runtime.processor.name}.kl",
        figures["kl_mean"],
        scored.max_kl,
        interval=tuple(figures["kl_mean_ci95"]),
    )
