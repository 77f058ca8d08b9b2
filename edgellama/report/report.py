"""Report: measurements and decisions of the gate, as data. Text and JSON are two views of one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgellama.files import to_json
from edgellama.report import labelled, metrics
from edgellama.report.checks import Check, Verdict, worst_verdict

SCHEMA = "edgellama.report/1"


@dataclass(frozen=True)
class Report:
    """The gate's answer about one target of one bundle.

    Attributes:
        runtime: name of the runtime that computed the artifact's numbers.
        reference: the checkpoint, or None when none was given and nothing was compared.
        artifact_sha256: hash of the artifact that ran (`Bundle.artifact_sha256`); None if nothing ran.
        tokens: number of scored tokens.
        windows: number of scored windows.
        domains: `quality` of each evaluation text.
        agreement: comparison with the bundle's other artifacts.
        layers: sources of the error, when they were asked for.
        device: a summary of each device log about the artifact, which phones wrote.
        cross_check: comparison of the checkpoint with transformers' reading of it, or the reason why not.
        emulated: a row for each emulated Arm processor (edgellama.gate.emulation).
        scored: the scored text, window by window (edgellama.gate.quality).
        samples: greedy continuations of the reference and the artifact.
        regression: comparison with an earlier report.
        adapters: a row for each adapter of the bundle (edgellama.gate.adapters).
        labelled: a classifier on labelled texts (edgellama.gate.flips).

    >>> import edgellama
    >>> report = edgellama.validate(bundle)
    >>> report.verdict, report.runtime
    ('pass', 'executorch-xnnpack')
    >>> [check.name for check in report.checks][:2]
    ['structure.files', 'structure.metadata']
    """

    target: str
    runtime: str
    reference: Mapping[str, Any] | None
    tokens: int
    windows: int
    structure: Mapping[str, Any]
    parity: Mapping[str, Any]
    quality: Mapping[str, Any]
    domains: Mapping[str, Any]
    checks: tuple[Check, ...]
    tools: Mapping[str, str] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    cross_check: Mapping[str, Any] = field(default_factory=dict)
    device: tuple[Mapping[str, Any], ...] = ()
    emulated: tuple[Mapping[str, Any], ...] = ()
    scored: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()
    regression: Mapping[str, Any] = field(default_factory=dict)
    artifact_sha256: str | None = None
    adapters: tuple[Mapping[str, Any], ...] = ()
    labelled: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """`fail` if any check failed, else `inconclusive` if any is, else `pass`."""
        return worst_verdict(c.verdict for c in self.checks)

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "target": self.target,
            "runtime": self.runtime,
            "artifact_sha256": self.artifact_sha256,
            "reference": self.reference,
            "tokens": self.tokens,
            "windows": self.windows,
            "structure": dict(self.structure),
            "parity": dict(self.parity),
            "quality": dict(self.quality),
            "domains": dict(self.domains),
            "agreement": dict(self.agreement),
            **({"layers": dict(self.layers)} if self.layers else {}),
            **({"cross_check": dict(self.cross_check)} if self.cross_check else {}),
            "device": [dict(log) for log in self.device],
            **({"emulated": [dict(row) for row in self.emulated]} if self.emulated else {}),
            **({"scored": dict(self.scored)} if self.scored else {}),
            **({"samples": [dict(row) for row in self.samples]} if self.samples else {}),
            **({"regression": dict(self.regression)} if self.regression else {}),
            **({"adapters": [dict(row) for row in self.adapters]} if self.adapters else {}),
            **({"labelled": dict(self.labelled)} if self.labelled else {}),
            "checks": [c.to_dict() for c in self.checks],
            "tools": dict(self.tools),
            "verdict": self.verdict,
        }

    def headline(self) -> dict[str, Any]:
        """Figures that the bundle's manifest records."""
        figures = {key: self.quality[key] for key in metrics.HEADLINE if key in self.quality}
        return {"verdict": self.verdict, "tokens": self.tokens, **figures}

    def to_json(self) -> str:
        return to_json(self.to_dict())

    def to_text(self) -> str:
        """Returns a table of the checks and the headline numbers, for people."""
        width = max((len(c.name) for c in self.checks), default=0)
        marks = {"pass": "ok  ", "fail": "FAIL", "inconclusive": "?   "}
        lines = [f"{self.target} ({self.runtime})"]
        for c in self.checks:
            limit = "" if c.limit is None else f"  limit {_number(c.limit)}"
            value = "" if c.value is None else f"  {_number(c.value)}"
            detail = f"  {c.detail}" if c.detail else ""
            lines.append(f"  {marks[c.verdict]} {c.name:<{width}}{value}{limit}{detail}")
        if self.cross_check and not self.cross_check["done"]:
            lines.append(f"  cross-check not done: {self.cross_check['reason']}")
        if self.quality:
            lines += ["", *_quality_lines(self.quality, self.tokens, self.windows)]
        if "compared_to_position" in self.parity:
            lines.append(f"    compared     up to position {self.parity['compared_to_position']}")
        for name, quality in self.domains.items():
            low, high = quality["kl_mean_ci95"]
            lines.append(
                f"    {name}: KL {quality['kl_mean']:.4f} [{low:.4f}, {high:.4f}], top-1 {quality['top1_agreement']:.1%}"
            )
        if self.adapters:
            lines += ["", *metrics.adapter_lines(self.adapters)]
        if self.labelled:
            lines += ["", *labelled.lines(self.labelled)]
        if self.regression:
            lines += ["", *_regression_lines(self.regression)]
        for log in self.device:
            lines.append("")
            lines += _device_lines(log)
        for row in self.emulated:
            lines.append("")
            lines += _emulated_lines(row)
        return "\n".join([*lines, "", f"verdict: {self.verdict}"])


def _quality_lines(quality: Mapping[str, Any], tokens: int, windows: int) -> list[str]:
    return [
        f"  against the full-precision model, {tokens} tokens in {windows} windows (95 % intervals, clustered by window)",
        *(f"    {line}" for line in metrics.lines(quality)),
    ]


def _regression_lines(r: Mapping[str, Any]) -> list[str]:
    lines = [f"  against the earlier report, the same {r['tokens']} tokens in {r['windows']} windows"]
    for name, key in (("KL", "kl"), ("top-1", "top1"), ("ln ppl", "ln_ppl")):
        if f"{key}_now" not in r:
            continue
        low, high = r[f"{key}_difference_ci95"]
        lines.append(
            f"    {name:<12} {r[f'{key}_before']:.4f} -> {r[f'{key}_now']:.4f}, "
            f"{r[f'{key}_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        )
    return lines


def _device_lines(log: Mapping[str, Any]) -> list[str]:
    def figure(key: str) -> str:
        return "unknown" if log[key] is None else f"{log[key]:.0f}"

    return [
        f"  on {log['device']} ({log['os']}, {log['runtime']})",
        f"    KL           {log['parity_kl_mean']:.2e} from the host's artifact, {log['kl_mean']:.4f} from the reference",
        f"    top-1        {log['parity_top1_agreement']:.1%} and {log['top1_agreement']:.1%}",
        f"    speed        prefill {figure('prefill_tok_s')}, decode {figure('decode_tok_s')} tok/s; load {figure('load_ms')} ms",
    ]


def _emulated_lines(row: Mapping[str, Any]) -> list[str]:
    if "parity_kl_mean" not in row:
        return [f"  on emulated {row['processor']}: not run"]
    return [
        f"  on {row['label']}",
        (
            f"    KL           {row['parity_kl_mean']:.2e} from the host's artifact, {row['kl_mean']:.4f} from the "
            f"reference, {row['positions']} positions up to {row['to_position']}"
        ),
        f"    top-1        {row['parity_top1_agreement']:.1%} and {row['top1_agreement']:.1%}",
        *(f"    kernel       {kernel}" for kernel in row["kernels"]),
        *([f"    products     {', '.join(row['products'])}"] if not row["kernels"] else []),
    ]


def _number(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:.3e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:.4f}"
    return str(value)
