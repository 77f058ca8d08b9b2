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
from edgellama.emulator.kernels import Kernels, executed_kernels
from edgellama.emulator.processors import Processor, find_processor
from edgellama.errors import BundleError, UsageError
from edgellama.files import read_json
from edgellama.gate import metrics
from edgellama.gate.golden import feed
from edgellama.gate.limits import recipe_limit
from edgellama.host.progress import Progress
from edgellama.model.schemes import module_shapes
from edgellama.report import Check, Report, below, check
from edgellama.runtimes.emulated import KINDS, EmulatedRuntime
from edgellama.targets import find_target
from edgellama.targets.onnx.interface import GENAI_FILE
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
            raise UsageError(
                f"none of the targets {', '.join(targets)} has a runtime on emulated Arm",
                remedy=f"Targets that can be emulated: {', '.join(KINDS)}.",
            )
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
                probe=_probe(bundle, target, Path(directory)),
                log=log,
            )
            with runtime:
                row, checks = _golden_checks(golden, target, runtime)
                if scored is not None:
                    figures, check_of_text = _score(runtime, scored)
                    row, checks = row | {"scored": figures}, [*checks, check_of_text]
        except BundleError as error:
            row = {"processor": processor.name, "qemu": emulator.qemu}
            return row, [check(f"emulated.{processor.name}.load", False, detail=error.message)]
        kernels = executed_kernels(emulator, log, runtime.mapped)
    if runtime.probe is not None:
        checks.append(check_rounding(processor, runtime.probe))
    row |= {
        "processor": processor.name,
        "qemu": emulator.qemu,
        "features": runtime.features,
        "label": label(processor, emulator, kernels),
        "kernels": list(kernels.names),
        "products": kernels.products,
    }
    return row, [*checks, check_kernels(bundle, target, processor, kernels)]


def _probe(bundle: Bundle, target: str, directory: Path) -> Path | None:
    """Writes the probe of rounding, for a model with products of int4 in ONNX Runtime."""
    if target != "onnx" or bundle.recipe.onnx_form != "ort" or 4 not in linear_bits(bundle):
        return None
    with find_target(target).needs_extra():
        from edgellama.targets.onnx.rounding_probe import write_probe

        write_probe(directory)
    return directory


def check_rounding(processor: Processor, results: Sequence[Any]) -> Check:
    """Check that ONNX Runtime rounds the inputs of int4 products per block, as the artifact's arithmetic is.

    A processor without dotprod rounds nothing. results: see `runtimes/emulated_worker`.
    """
    from edgellama.targets.onnx.rounding_probe import rounding_of

    expected = "per block" if processor.products else "float"
    actual = [rounding_of(np.array(result, np.float32)) for result in results]
    return check(
        f"emulated.{processor.name}.rounding",
        set(actual) == {expected},
        value=actual[0],
        limit=expected,
        detail=f"prefill {actual[0]}, decode {actual[1]}, by the session entries of {GENAI_FILE}",
    )


def client_entries(path: Path) -> list[str]:
    """Session entries, `NAME=VALUE`, in the configuration that clients of the ONNX artifact at `path` read.

    Raises BundleError for a file of another form.
    """
    file = path / GENAI_FILE
    try:
        options = read_json(file)["model"]["decoder"]["session_options"]
        entries = [(name, value) for name, value in options.items() if "." in name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{file}: no configuration of onnxruntime-genai ({error})", remedy="Export the bundle again."
        ) from error
    return [f"{name}={value}" for name, value in entries if isinstance(value, str)]


def label(processor: Processor, emulator: Emulator, kernels: Kernels) -> str:
    """Name of a run for people: `emulated cortex-a76, qemu 10.0.13, KleidiAI dotprod`."""
    family = "KleidiAI" if any(name.startswith("kai_") for name in kernels.names) else "MLAS"
    products = _product_set(kernels)
    return f"emulated {processor.name}, qemu {emulator.qemu}, {family} {products or 'float'}"


def _product_set(kernels: Kernels) -> str | None:
    """The newest instruction set among the products of int8 that ran; None if none ran."""
    sets = (("sme", "mopa"), ("i8mm", "mmla"), ("i8mm", "usdot"), ("dotprod", "dot"))
    return next(
        (name for name, ending in sets if any(product.endswith(ending) for product in kernels.integer)), None
    )


def check_kernels(bundle: Bundle, target: str, processor: Processor, kernels: Kernels) -> Check:
    """Check that fast kernels computed the quantized linears.

    For a .pte every kind of quantized weight must have a kernel of KleidiAI that ran. For ONNX, whose library
    has no symbols, products of int8 must have run. A processor without dotprod computes in float.
    """
    name = f"emulated.{processor.name}.kernels"
    bits = linear_bits(bundle)
    if not bits:
        return check(name, True, detail="the recipe quantizes nothing")
    if not processor.products:
        return check(name, True, detail=f"{processor.name} has no products of int8")
    products = _product_set(kernels)
    if target == "onnx":
        return check(
            name, products is not None, value=products or "float", detail=", ".join(kernels.products)
        )
    missing = [f"int{b}" for b in sorted(bits) if not any(f"_qsi{b}c" in kernel for kernel in kernels.names)]
    fallback = [kernel for kernel in kernels.names if kernel.startswith("xnn_")]
    detail = f"no KleidiAI kernel for {', '.join(missing)} weights; ran: {', '.join(fallback) or 'none'}"
    return check(name, not missing, value=products, detail=detail if missing else f"KleidiAI {products}")


def linear_bits(bundle: Bundle) -> set[int]:
    """Bits of the quantized linears' weights, without those of the embedding."""
    config = bundle.config
    schemes = bundle.recipe.assign(module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    return {s.bits for name, s in schemes.items() if s is not None and name != "model.embed_tokens"}


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
