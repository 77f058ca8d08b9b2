"""Verb `validate`: the gate. Structure, parity, consistency and quality of the file on disk, with verdicts.

Artifact and reference run side by side on the same tokens; nothing is dumped. When an interval straddles its limit,
more text is read, twice as much each time, until the answer is clear or the text is used up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from edgellama import compare, consistency, parity
from edgellama.bundle import Bundle
from edgellama.checkpoint import Checkpoint, load_llama, open_checkpoint
from edgellama.compare import Positions
from edgellama.errors import InputError, UsageError
from edgellama.export.pipeline import quantized_llama
from edgellama.load import load
from edgellama.progress import Progress
from edgellama.report import Check, Report, above, below, check
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import Target, find_target
from edgellama.text import WINDOW, Text, Window, default_texts, windows
from edgellama.tokenizer import Tokenizer
from edgellama.verb import callable_as

DEFAULT_TOKENS = 4096
GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_TOKENS = 4, 32, 24
# Without a reference no noise floor can be measured; this is what 30 layers with int8 activations show.
ASSUMED_FLOOR = 0.03

PROBES = (
    "Hello, world! 3.14159 2026-01-01 0xDEADBEEF",
    "Grüße, naïve café — “quotes” … ½ ²",
    "日本語のテキスト、中文字符，한국어 문장",
    "👩‍💻🏳️‍🌈 emoji, ﷽, \u200bzero width, é combining",
    "def f(x):\n\treturn {k: v ** 2 for k, v in x.items()}  # code\r\n",
    "  leading, trailing  and\n\n\nmany   spaces \t ",
)


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


def check_tokens(tokens: int) -> None:
    """Raises UsageError for fewer tokens than a window has."""
    if tokens < WINDOW:
        raise UsageError(
            f"--tokens must be at least {WINDOW}, one window, got {tokens}", remedy="Ask for more tokens."
        )


@dataclass
class _Measured:
    """What accumulates while windows are scored."""

    quality: list[Positions] = field(default_factory=list)
    domains: dict[str, list[Positions]] = field(default_factory=dict)
    parity: list[Positions] = field(default_factory=list)
    floor: list[Positions] = field(default_factory=list)
    first: Window | None = None
    prompts: list[tuple[int, ...]] = field(default_factory=list)


def validate(
    bundle: Bundle | str | Path,
    *,
    reference: Checkpoint | str | Path | None = None,
    target: str | None = None,
    texts: Sequence[Text] | None = None,
    tokens: int = DEFAULT_TOKENS,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """The gate's report about one target of a bundle.

    Args:
        reference: the full-precision checkpoint the bundle was made from. Without it only the files and the
            artifact's agreement with itself are checked.
        target: None for the bundle's first.
        texts: what is scored; None for the texts that ship with edgellama.
        tokens: how many tokens are scored at first; more are when an interval straddles a limit.
        max_kl, min_top1, max_ppl_ratio: limits; max_kl None means the recipe's own.

    Raises InputError when the bundle or the reference cannot be used. A failed check is no error: see `passed`.
    """
    progress = progress or Progress()
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    row = find_target(target or bundle.targets[0])
    limits = Limits(max_kl, min_top1, max_ppl_ratio)
    check_tokens(tokens)
    if reference is None and limits != Limits():
        raise UsageError(
            "a quality limit was given without a reference", remedy="Add --reference CHECKPOINT."
        )
    problems = bundle.problems()
    files = check(
        "structure.files", not problems, value=len(problems), limit=0, detail="; ".join(problems[:3])
    )
    if problems:
        return _report(row, "not run", None, [files])
    if reference is None:
        return _validate_alone(bundle, row, files, progress)
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference)
    _check_source(bundle, checkpoint)
    if limits.max_kl is None:
        limits = Limits(bundle.recipe.kl_limit(checkpoint.config.parameters), min_top1, max_ppl_ratio)
    return _validate(bundle, row, checkpoint, texts or default_texts(), tokens, limits, files, progress)


def _validate(
    bundle: Bundle,
    row: Target,
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    tokens: int,
    limits: Limits,
    files: Check,
    progress: Progress,
) -> Report:
    with progress.stage("load for validation"):
        quantized, _ = quantized_llama(checkpoint, bundle.recipe, bundle.context_length)
        full = ReferenceRuntime(load_llama(checkpoint, bundle.context_length))
    structure: list[Check] = row.load("structure")(bundle.artifact(row.name), quantized)
    checks = [files, *structure, _check_tokenizer(bundle.tokenizer, checkpoint.tokenizer, texts)]
    measured = _Measured()
    with load(bundle, row.name) as artifact:
        name = artifact.name
        length = min(WINDOW, artifact.context_length)
        source = windows(texts, bundle.tokenizer, length)
        with progress.stage("score"):
            quality = _score(
                source, artifact, full, quantized, row, measured, -(-tokens // length), limits, progress
            )
        section = parity.summarize(measured.parity, measured.floor)
        checks += parity.checks(section)
        assert measured.first is not None
        with progress.stage("consistency"):
            figures, consistent = consistency.measure(
                artifact, measured.first.tokens, floor=section["noise_floor_kl"]
            )
            checks += consistent
            quality |= _greedy(artifact, full, measured.prompts)
    checks += _quality_checks(quality, limits)
    return _report(
        row,
        name,
        checkpoint,
        checks,
        tokens=sum(len(w.kl) for w in measured.quality),
        windows=len(measured.quality),
        parity=section | figures,
        quality=quality,
        domains={n: compare.summarize(w) for n, w in sorted(measured.domains.items())}
        if len(texts) > 1
        else {},
    )


def _score(
    source: Iterator[Window],
    artifact: Runtime,
    full: ReferenceRuntime,
    quantized: Any,
    row: Target,
    measured: _Measured,
    count: int,
    limits: Limits,
    progress: Progress,
) -> dict[str, Any]:
    """Score windows until every limit is decided: the quality section. `count` windows first, then twice as many."""
    while True:
        with progress.bar("score", count - len(measured.quality), "window") as bar:
            exhausted = True
            for window in source:
                _score_window(window, artifact, full, quantized, row, measured)
                bar.update(1)
                if len(measured.quality) == count:
                    exhausted = False
                    break
        quality = compare.summarize(measured.quality)
        undecided = [c.name for c in _quality_checks(quality, limits) if c.verdict == "inconclusive"]
        if exhausted or not undecided:
            return quality
        progress.say(
            f"{', '.join(undecided)}: the interval straddles the limit after {count} windows; reading more text"
        )
        count *= 2


def _score_window(
    window: Window,
    artifact: Runtime,
    full: ReferenceRuntime,
    quantized: Any,
    row: Target,
    measured: _Measured,
) -> None:
    candidate = parity.steps(artifact, window.tokens)
    full.reset()
    reference = full.forward_all(window.tokens)
    positions = compare.compare(reference, candidate, window.targets)
    measured.quality.append(positions)
    measured.domains.setdefault(window.domain, []).append(positions)
    measured.first = measured.first or window
    if len(measured.prompts) < GREEDY_PROMPTS:
        measured.prompts.append(window.tokens[:GREEDY_PROMPT_TOKENS])
    if len(measured.parity) < parity.WINDOWS:
        compared, floor = parity.measure(
            candidate[: parity.TOKENS],
            quantized,
            window,
            numerics=row.load("numerics"),
            seed=len(measured.parity),
        )
        measured.parity.append(compared)
        measured.floor.append(floor)


def _quality_checks(quality: dict[str, Any], limits: Limits) -> list[Check]:
    checks = []
    if limits.max_kl is not None:
        checks.append(
            below("quality.kl", quality["kl_mean"], limits.max_kl, interval=tuple(quality["kl_mean_ci95"]))
        )
    if limits.min_top1 is not None:
        interval = tuple(quality["top1_agreement_ci95"])
        checks.append(above("quality.top1", quality["top1_agreement"], limits.min_top1, interval=interval))
    if limits.max_ppl_ratio is not None:
        ratio = float(torch.tensor(quality["ln_ppl_ratio"]).exp())
        low, high = torch.tensor(quality["ln_ppl_ratio_ci95"]).exp().tolist()
        checks.append(below("quality.ppl_ratio", ratio, limits.max_ppl_ratio, interval=(low, high)))
    return checks


def _greedy(artifact: Runtime, full: ReferenceRuntime, prompts: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """How far greedy continuations run together, as a share of their length."""
    count = min(GREEDY_TOKENS, artifact.context_length - GREEDY_PROMPT_TOKENS)
    if count < 1:
        return {}
    shares = [
        compare.common_prefix(_continue(artifact, prompt, count), _continue(full, prompt, count)) / count
        for prompt in prompts
    ]
    return {"greedy_prefix_agreement": sum(shares) / len(shares), "greedy_tokens": count}


def _continue(runtime: Runtime, prompt: Sequence[int], count: int) -> list[int]:
    runtime.reset()
    tokens: list[int] = []
    logits = runtime.forward(prompt)
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = runtime.forward(tokens[-1:])
    return tokens


def _validate_alone(bundle: Bundle, row: Target, files: Check, progress: Progress) -> Report:
    """Without a reference: the files, and the artifact's agreement with itself."""
    text = " ".join(PROBES) * 4
    with load(bundle, row.name) as artifact, progress.stage("consistency"):
        tokens = bundle.tokenizer.encode(text)
        figures, checks = consistency.measure(artifact, tokens, floor=ASSUMED_FLOOR)
        return _report(row, artifact.name, None, [files, *checks], parity=figures)


def _check_source(bundle: Bundle, checkpoint: Checkpoint) -> None:
    recorded, found = bundle.manifest["source"]["sha256"], checkpoint.sha256()
    if recorded != found:
        raise InputError(
            f"{checkpoint.path} is not the checkpoint that {bundle.path} was made from "
            f"(sha256 {found[:12]}…, the manifest says {str(recorded)[:12]}…)",
            remedy="Give the checkpoint that was exported.",
        )


def _check_tokenizer(found: Tokenizer, expected: Tokenizer, texts: Sequence[Text]) -> Check:
    """The bundle's tokenizer is the checkpoint's.

    Vocabulary and merges are compared whole, since no text reaches every merge; the rest by the ids of probes.
    """
    one, other = (json.loads(tokenizer.files["tokenizer.json"]) for tokenizer in (found, expected))
    for part, what in (
        ("model", "another vocabulary or other merges"),
        ("added_tokens", "other added tokens"),
    ):
        if one.get(part) != other.get(part):
            return check("structure.tokenizer", False, detail=f"{what} than the checkpoint's tokenizer")
    for probe in (*PROBES, *(text.content[:20000] for text in texts)):
        if found.encode(probe) != expected.encode(probe):
            return check(
                "structure.tokenizer",
                False,
                detail=f"other ids than the checkpoint's tokenizer for {probe[:40]!r}",
            )
    return check("structure.tokenizer", True, value=found.size)


def _report(
    row: Target, runtime: str, checkpoint: Checkpoint | None, checks: list[Check], **sections: Any
) -> Report:
    reference = None
    if checkpoint is not None:
        reference = {
            "format": checkpoint.format,
            "parameters": checkpoint.config.parameters,
            "sha256": checkpoint.sha256(),
            "notes": list(checkpoint.notes),
        }
    structure = {
        c.name.removeprefix("structure."): c.verdict for c in checks if c.name.startswith("structure.")
    }
    return Report(
        target=row.name,
        runtime=runtime,
        reference=reference,
        tokens=sections.get("tokens", 0),
        windows=sections.get("windows", 0),
        structure=structure,
        parity=sections.get("parity", {}),
        quality=sections.get("quality", {}),
        domains=sections.get("domains", {}),
        checks=tuple(checks),
        tools=tool_versions(),
    )


def tool_versions() -> dict[str, str]:
    """Versions of what the numbers and the files depend on."""
    return {
        name: version(name).partition("+")[0] for name in ("torch", "torchao", "executorch", "tokenizers")
    }


callable_as(__name__, "edgellama.validate:validate")
