"""Contradictions in device logs: figures that no run of the artifact on a device can give.

A log is a claim. Its figures depend on each other and on the golden vectors, so an invented log contradicts
them somewhere. The bounds on KL hold for every distribution, so an honest log keeps to them on any processor.
A log without a contradiction may still be invented; a challenge proves more (edgellama.gate.challenge).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.golden import REFERENCE, Float, Golden, nullable_floats
from edgellama.gate import limits
from edgellama.gate.device_origin import figures_check, runtime_check, system_check
from edgellama.gate.possible_kl import Pair, least_kl_of_change
from edgellama.report import Check, check
from edgellama.targets import find_target


def contradictions(bundle: Bundle, golden: Golden, log: Mapping[str, Any]) -> list[Check]:
    """The checks of one complete device log for contradictions, each named `device.*`.

    log: a device log whose sequences and positions are those of `golden`.
    """
    target = find_target(log["target"])
    claims = _Claims.of(golden, log)
    return [
        runtime_check("device.runtime", target, log),
        system_check("device.system", target, log),
        figures_check("device.figures", bundle, target, log),
        _summary(golden, log),
        _finite(golden, log),
        _rounding(golden, claims),
        _repeated(claims),
        _flags(golden, claims),
        _flags_and_kl(golden, claims),
        _reference_kl(golden, claims),
    ]


@dataclass(frozen=True)
class _Claims:
    """Figures of a log at each scored position, in order.

    Attributes:
        kl, parity_kl: KL to the reference's and the host's record, nats, float64 [P]; NaN for null.
        top1, parity_top1: agreement of the most probable token, bool [P].
        distinct: the first position of each distinct sequence of tokens so far, bool [P].
    """

    target: str
    kl: Float
    parity_kl: Float
    top1: Any
    parity_top1: Any
    distinct: Any

    @classmethod
    def of(cls, golden: Golden, log: Mapping[str, Any]) -> _Claims:
        seen: set[tuple[int, ...]] = set()
        distinct = []
        for sequence in golden.sequences:
            for position in range(sequence.score_from, len(sequence.tokens)):
                fed = sequence.tokens[: position + 1]
                distinct.append(fed not in seen)
                seen.add(fed)

        def joined(key: str) -> list[Any]:
            return [x for sequence in log["sequences"] for x in sequence[key]]

        return cls(
            target=log["target"],
            kl=nullable_floats(joined("kl")),
            parity_kl=nullable_floats(joined("parity_kl")),
            top1=np.array(joined("top1"), bool),
            parity_top1=np.array(joined("parity_top1"), bool),
            distinct=np.array(distinct),
        )


def _summary(golden: Golden, log: Mapping[str, Any]) -> Check:
    """Means and verdicts of the log, against its own positions."""
    wrong = []
    for key, parts in (
        ("kl_mean", "kl"),
        ("parity_kl_mean", "parity_kl"),
        ("top1_agreement", "top1"),
        ("parity_top1_agreement", "parity_top1"),
    ):
        mean = float(nullable_floats([x for s in log["sequences"] for x in s[parts]]).mean())
        if not _equal(log[key], mean):
            wrong.append(f"{key} is {log[key]}, its positions give {mean:g}")
    values = {c["name"]: c for c in log["checks"]}
    sequences = [float(nullable_floats(s["parity_kl"]).mean()) for s in log["sequences"]]
    for name, value, limit in (
        ("parity_kl", log["parity_kl_mean"], "parity_kl_mean"),
        (
            "parity_kl_sequence",
            max(sequences) if all(map(math.isfinite, sequences)) else None,
            "parity_kl_sequence",
        ),
    ):
        entry = values.get(name)
        if entry is None:
            continue
        if not _equal(entry["value"], math.nan if value is None else value):
            wrong.append(f"check {name} is of {entry['value']}")
        if not _equal(entry["limit"], golden.limits(log["target"])[limit]):
            wrong.append(f"check {name} has the limit {entry['limit']}")
    verdict = "pass" if all(c["verdict"] == "pass" for c in log["checks"]) else "fail"
    if log["checks"] and verdict != log["verdict"]:
        wrong.append(f"its checks say {verdict}, its verdict says {log['verdict']}")
    return check("device.summary", not wrong, value=len(wrong), limit=0, detail="; ".join(wrong[:2]))


def _finite(golden: Golden, log: Mapping[str, Any]) -> Check:
    """KL to the reference at every position, as on the host."""
    missing = sum(x is None for s in log["sequences"] for x in s["kl"])
    known = golden.data["artifacts"][log["target"]]["kl_mean"] is not None
    return check(
        "device.finite",
        not (missing and known),
        value=missing,
        limit=0,
        detail=f"positions without a KL to the reference: {missing}" if missing else "",
    )


def _rounding(golden: Golden, claims: _Claims) -> Check:
    """Rounding of the recorded log-probabilities, which leaves traces in the KL of any run.

    Golden vectors are float32. Even the host's own logits give a KL of about 1e-8 in half of the positions,
    and zero in the other half, because the sum is negative there.
    """
    host = golden.expected[claims.target]
    logp = np.concatenate([host.logp, host.rest[:, None]], axis=-1)
    steps = np.where(np.isfinite(logp), np.spacing(np.abs(np.where(np.isfinite(logp), logp, 0))), 0.0)
    scale = np.sqrt((np.exp(logp.astype(np.float64)) ** 2 * steps.astype(np.float64) ** 2 / 12).sum(-1))
    measurable = (scale > limits.DEVICE_ROUNDING_LEAST) & claims.distinct & np.isfinite(claims.parity_kl)
    count = int(measurable.sum())
    traces = int((claims.parity_kl[measurable] > limits.DEVICE_ROUNDING_SHARE * scale[measurable]).sum())
    least = (
        math.ceil(limits.DEVICE_ROUNDING_POSITIONS * count) if count >= limits.DEVICE_ROUNDING_COUNT else 0
    )
    return check(
        "device.rounding",
        traces >= least,
        value=traces,
        limit=least,
        detail=""
        if traces >= least
        else "parity KL is smaller than the rounding of the golden vectors leaves it",
    )


def _repeated(claims: _Claims) -> Check:
    """Equal figures at positions with other tokens."""
    most, worst = 0.0, ""
    for name, values in (("kl", claims.kl), ("parity_kl", claims.parity_kl)):
        nonzero = values[(values > 0) & claims.distinct]
        if len(nonzero) < limits.DEVICE_REPEATS_COUNT:
            continue
        repeated = 1 - len(np.unique(nonzero)) / len(nonzero)
        if repeated > most:
            most, worst = repeated, name
    passed = most <= limits.DEVICE_REPEATS
    return check(
        "device.repeated",
        passed,
        value=most,
        limit=limits.DEVICE_REPEATS,
        detail="" if passed else f"{worst} has equal figures at positions with other tokens",
    )


def _flags(golden: Golden, claims: _Claims) -> Check:
    """Both top-1 flags of a position: a device has one most probable token."""
    reference, host = golden.expected[REFERENCE].ids[:, 0], golden.expected[claims.target].ids[:, 0]
    impossible = np.where(
        reference == host, claims.top1 != claims.parity_top1, claims.top1 & claims.parity_top1
    )
    return check(
        "device.top1",
        not impossible.any(),
        value=int(impossible.sum()),
        limit=0,
        detail=""
        if not impossible.any()
        else f"{_place(golden, impossible)}: one token cannot be and not be the best",
    )


def _flags_and_kl(golden: Golden, claims: _Claims) -> Check:
    """Least KL that a change of the most probable token costs."""
    impossible = np.zeros(len(claims.kl), bool)
    for name, other, flags, other_flags, kl in (
        (REFERENCE, claims.target, claims.top1, claims.parity_top1, claims.kl),
        (claims.target, REFERENCE, claims.parity_top1, claims.top1, claims.parity_kl),
    ):
        recorded, best = golden.expected[name], golden.expected[other].ids[:, 0]
        for i in np.flatnonzero(~flags):
            known = int(best[i]) if other_flags[i] else None
            least = least_kl_of_change(recorded, int(i), known)
            impossible[i] |= bool(kl[i] < least * (1 - limits.DEVICE_KL_ERROR) - limits.DEVICE_KL_ZERO)
    return check(
        "device.top1_kl",
        not impossible.any(),
        value=int(impossible.sum()),
        limit=0,
        detail=""
        if not impossible.any()
        else f"{_place(golden, impossible)}: so small a KL keeps the best token",
    )


def _reference_kl(golden: Golden, claims: _Claims) -> Check:
    """KL to the reference, against bounds that follow from the KL to the host's run."""
    reference, host = golden.expected[REFERENCE], golden.expected[claims.target]
    pairs = [Pair.of(reference, host, i) for i in range(len(claims.kl))]
    recorded = golden.data["artifacts"][claims.target]["kl_mean"]
    hidden = math.inf if recorded is None else recorded * len(pairs) - sum(pair.kl for pair in pairs)
    spreads = np.array([pair.spread(parity) for pair, parity in zip(pairs, claims.parity_kl, strict=True)])
    outside = np.zeros(len(pairs), bool)
    for i, (pair, kl, parity) in enumerate(zip(pairs, claims.kl, claims.parity_kl, strict=True)):
        if not (math.isfinite(kl) and math.isfinite(parity)):
            continue
        low, error = pair.least_kl(parity), limits.DEVICE_KL_ERROR
        high = pair.kl + min(max(hidden, 0.0), limits.DEVICE_HIDDEN_NATS * pair.hidden) + spreads[i]
        outside[i] = (
            not low * (1 - error) - limits.DEVICE_KL_ZERO <= kl <= high * (1 + error) + limits.DEVICE_KL_ZERO
        )
    return check(
        "device.reference_kl",
        not outside.any(),
        value=int(outside.sum()),
        limit=0,
        detail="" if not outside.any() else f"{_place(golden, outside)}: not within reach of the host's run",
    )


def _place(golden: Golden, positions: Any) -> str:
    """The first of the marked positions, in words."""
    row = int(np.flatnonzero(positions)[0])
    for number, sequence in enumerate(golden.sequences):
        rows = golden.rows(number)
        if row < rows.stop:
            return f"{sequence.name}, position {sequence.score_from + row - rows.start}"
    raise AssertionError("rows belong to sequences")


def _equal(claimed: Any, value: float) -> bool:
    if claimed is None or not isinstance(claimed, (int, float)):
        return claimed is None and not math.isfinite(value)
    return math.isclose(claimed, value, rel_tol=limits.DEVICE_SUMMARY_ERROR, abs_tol=1e-12)
