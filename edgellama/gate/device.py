"""Device logs: what a phone wrote when it replayed the golden vectors, judged again here.

The phone's own verdict is not taken on trust: the hashes must be those of this bundle, every scored position must
be there, and means and verdicts are computed anew from the KL of each position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.golden import FILE, Golden, read_golden
from edgellama.bundle.schema import published, violations
from edgellama.errors import InputError, UsageError
from edgellama.files import read_named_json
from edgellama.report import Check, Report, below, check

SCHEMA = "edgellama.device/1"
_REMEDY = "Copy the result file from the device again, or run the check there again."


def read_device_logs(paths: Sequence[Path], targets: Sequence[str]) -> list[dict[str, Any]]:
    """The device logs in files. Raises InputError for what is none, or is about none of `targets`."""
    logs = [_read(path) for path in paths]
    for path, log in zip(paths, logs, strict=True):
        if log["target"] not in targets:
            raise UsageError(
                f"{path} is about target {log['target']!r}, this validation is about {', '.join(targets)}",
                remedy="Validate that target too, or leave the log out.",
            )
    return logs


def _read(path: Path) -> dict[str, Any]:
    """The device log in a file. Raises InputError when it is none."""
    log = read_named_json(path, "device log", remedy=_REMEDY)
    schema = published("device")
    found = log.get("schema") if isinstance(log, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: schema is {found!r:.60}, expected {SCHEMA!r}", remedy=_REMEDY)
    for violation in violations(log, schema, schema, "log"):
        raise InputError(f"{path}: {violation}", remedy=_REMEDY)
    return dict(log)


def with_device_logs(
    bundle: Bundle, reports: Sequence[Report], logs: Sequence[Mapping[str, Any]]
) -> list[Report]:
    """The reports of a bundle's targets, each with the logs of its target and checks of them."""
    if not logs:
        return list(reports)
    golden = read_golden(bundle)
    return [
        replace(
            report,
            device=tuple(summary(log) for log in logs if log["target"] == report.target),
            checks=(
                *report.checks,
                *(c for log in logs if log["target"] == report.target for c in judge(bundle, golden, log)),
            ),
        )
        for report in reports
    ]


def judge(bundle: Bundle, golden: Golden, log: Mapping[str, Any]) -> list[Check]:
    """The checks named `device.*` about one log of a target in the bundle."""
    target, where = log["target"], f"{log['device']}, {log['os']}"
    artifact, vectors = bundle.artifact_sha256(target), golden.sha256
    recorded = golden.data["artifacts"][target]["sha256"]
    limits = golden.limits(target)
    expected = [(s.name, s.scored) for s in golden.sequences]
    found = [(s["name"], len(s["parity_kl"])) for s in log["sequences"]]
    even = all(
        len(s["kl"]) == len(s["top1"]) == len(s["parity_top1"]) == len(s["parity_kl"])
        for s in log["sequences"]
    )
    complete = expected == found and even
    checks = [
        check(
            "device.artifact",
            log["artifact_sha256"] == artifact == recorded,
            value=log["artifact_sha256"][:12],
            limit=artifact[:12],
            detail=where,
        ),
        check(
            "device.golden",
            log["golden_sha256"] == vectors,
            value=log["golden_sha256"][:12],
            limit=vectors[:12],
            detail=FILE,
        ),
        check(
            "device.sequences",
            complete,
            value=len(found),
            limit=len(expected),
            detail="" if complete else "not the positions that are scored in this bundle",
        ),
        check(
            "device.tokenizer",
            all(s["tokens_match"] for s in log["sequences"]),
            detail=", ".join(f"other ids for {s['name']}" for s in log["sequences"] if not s["tokens_match"]),
        ),
    ]
    by_sequence = [_mean(s["parity_kl"]) for s in log["sequences"]]
    mean = _mean([kl for s in log["sequences"] for kl in s["parity_kl"]])
    worst = max(range(len(by_sequence)), key=lambda i: (math.isnan(by_sequence[i]), by_sequence[i]))
    checks += [
        below(
            "device.parity_kl",
            mean,
            limits["parity_kl_mean"],
            detail=f"top-1 {_share(log, 'parity_top1'):.1%} of the host's artifact",
        ),
        below(
            "device.parity_kl_sequence",
            by_sequence[worst],
            limits["parity_kl_sequence"],
            detail=f"worst: {log['sequences'][worst]['name']}",
        ),
    ]
    passed = all(c.verdict == "pass" for c in checks)
    agrees = log["verdict"] == ("pass" if passed else "fail")
    return [
        *checks,
        check(
            "device.verdict",
            agrees and passed,
            value=log["verdict"],
            limit="pass",
            detail="" if agrees else "the device came to another verdict than its numbers allow",
        ),
    ]


def summary(log: Mapping[str, Any]) -> dict[str, Any]:
    """The log as the report keeps it: everything but the single positions, with means computed anew."""
    rest = {key: value for key, value in log.items() if key not in ("schema", "sequences", "checks")}
    return rest | {
        "kl_mean": _mean([kl for s in log["sequences"] for kl in s["kl"]]),
        "parity_kl_mean": _mean([kl for s in log["sequences"] for kl in s["parity_kl"]]),
        "top1_agreement": _share(log, "top1"),
        "parity_top1_agreement": _share(log, "parity_top1"),
        "sequences": [
            {
                "name": s["name"],
                "tokens_match": s["tokens_match"],
                "kl_mean": _mean(s["kl"]),
                "parity_kl_mean": _mean(s["parity_kl"]),
            }
            for s in log["sequences"]
        ],
    }


def _mean(kl: Sequence[float | None]) -> float:
    """NaN, which fails every limit, where a position's KL is no number (null in JSON)."""
    return float(np.mean([math.nan if x is None else x for x in kl])) if kl else math.nan


def _share(log: Mapping[str, Any], key: str) -> float:
    values = [value for s in log["sequences"] for value in s[key]]
    return sum(values) / len(values) if values else math.nan
