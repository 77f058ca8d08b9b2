"""Checks of device logs: results of a phone that replayed the golden vectors.

The phone's own verdict is not trusted. The hashes must be those of this bundle, and every scored position
must be present. Means and verdicts are computed again from the KL of each position. A log that contradicts
itself or the golden vectors fails (edgellama.gate.plausible).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.golden import FILE, Golden, nullable_floats, read_golden
from edgellama.bundle.schema import conforming
from edgellama.errors import UsageError
from edgellama.files import read_named_json
from edgellama.gate.device_origin import copies, device_check
from edgellama.gate.plausible import contradictions
from edgellama.report import Check, Report, below, check

SCHEMA = "edgellama.device/1"
_REMEDY = "Copy the result file from the device again, or run the check there again."


def read_device_logs(paths: Sequence[Path], targets: Sequence[str]) -> list[dict[str, Any]]:
    """Reads device logs.

    Raises InputError if a file is not a device log, UsageError if it is about a target outside `targets`.
    """
    logs = [_read(path) for path in paths]
    for path, log in zip(paths, logs, strict=True):
        if log["target"] not in targets:
            raise UsageError(
                f"{path} is about target {log['target']!r}, this validation is about {', '.join(targets)}",
                remedy="Validate that target too, or leave the log out.",
            )
    return logs


def _read(path: Path) -> dict[str, Any]:
    """Reads one device log. Raises InputError if the file is not one."""
    log = read_named_json(path, "device log", remedy=_REMEDY)
    return conforming(log, "device", label="log", where=str(path), remedy=_REMEDY)


def with_device_logs(
    bundle: Bundle, reports: Sequence[Report], logs: Sequence[Mapping[str, Any]], device: str | None = None
) -> list[Report]:
    """Adds to each report a summary of its target's device logs, and the checks named `device.*`.

    device: name, or part of the name, of the device that the logs must come from; None for any.
    """
    if not logs:
        return list(reports)
    golden, copied = read_golden(bundle), copies(logs)
    judged = [
        (
            *judge(bundle, golden, log),
            device_check("device.name", device, log),
            check(
                "device.copied",
                number not in copied,
                detail=f"took to the last digit as long as {copied[number]}" if number in copied else "",
            ),
        )
        for number, log in enumerate(logs)
    ]
    return [
        replace(
            report,
            device=tuple(summary(log) for log in logs if log["target"] == report.target),
            checks=(
                *report.checks,
                *(
                    c
                    for log, checks in zip(logs, judged, strict=True)
                    if log["target"] == report.target
                    for c in checks
                ),
            ),
        )
        for report in reports
    ]


def judge(bundle: Bundle, golden: Golden, log: Mapping[str, Any]) -> list[Check]:
    """The checks named `device.*` of one device log."""
    family = check_family(golden, log)
    golden = for_family_of(golden, log)
    checks = [*measure(bundle, golden, log), *([] if family is None else [family])]
    passed = all(c.verdict == "pass" for c in checks)
    agrees = log["verdict"] == ("pass" if passed else "fail")
    verdict = check(
        "device.verdict",
        agrees and passed,
        value=log["verdict"],
        limit="pass",
        detail="" if agrees else "the device came to another verdict than its numbers allow",
    )
    complete = all(c.verdict == "pass" for c in checks if c.name == "device.sequences")
    return [*checks, verdict, *(contradictions(bundle, golden, log) if complete else ())]


def for_family_of(golden: Golden, log: Mapping[str, Any]) -> Golden:
    """Golden vectors for the family that a log names; those of the host's for none or an unknown one."""
    target, family = log["target"], log.get("family")
    return golden.for_family(target, family if family in golden.other_families(target) else None)


def check_family(golden: Golden, log: Mapping[str, Any]) -> Check | None:
    """Check of the family of processors that a log names; None where all processors round alike.

    A log without a name comes from an app that knows of no families. Its figures were computed against the rows of
    the host's family, so they are judged by its limits.
    """
    target = log["target"]
    host = golden.family(target)
    if host is None:
        return None
    family, known = log.get("family"), [host, *golden.other_families(target)]
    if family is None:
        detail = f"not named, so it is judged as {host}, whose rows an app without the name replays"
        return check("device.family", True, value=host, limit=", ".join(known), detail=detail)
    detail = "" if family in known else "no family of this artifact"
    return check("device.family", family in known, value=family, limit=", ".join(known), detail=detail)


def measure(bundle: Bundle, golden: Golden, log: Mapping[str, Any]) -> list[Check]:
    """The checks that a device can make itself: hashes, positions, tokens and the KL to the host's run."""
    target, device = log["target"], f"{log['device']}, {log['os']}"
    artifact, vectors = bundle.artifact_sha256(target), golden.sha256
    recorded = golden.data["artifacts"][target]["sha256"]
    limits = golden.limits(target)
    expected = [(s.name, s.scored) for s in golden.sequences]
    actual = [(s["name"], len(s["parity_kl"])) for s in log["sequences"]]
    equal_lengths = all(
        len(s["kl"]) == len(s["top1"]) == len(s["parity_top1"]) == len(s["parity_kl"])
        for s in log["sequences"]
    )
    complete = expected == actual and equal_lengths
    checks = [
        check(
            "device.artifact",
            log["artifact_sha256"] == artifact == recorded,
            value=log["artifact_sha256"][:12],
            limit=artifact[:12],
            detail=device,
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
            value=len(actual),
            limit=len(expected),
            detail="" if complete else "not the positions that are scored in this bundle",
        ),
        check(
            "device.tokenizer",
            all(s["tokens_match"] for s in log["sequences"]),
            detail=", ".join(f"other ids for {s['name']}" for s in log["sequences"] if not s["tokens_match"]),
        ),
    ]
    kl_by_sequence = [_mean(s["parity_kl"]) for s in log["sequences"]]
    mean = _mean([kl for s in log["sequences"] for kl in s["parity_kl"]])
    worst = max(range(len(kl_by_sequence)), key=lambda i: (math.isnan(kl_by_sequence[i]), kl_by_sequence[i]))
    checks += [
        below(
            "device.parity_kl",
            mean,
            limits["parity_kl_mean"],
            detail=f"top-1 {_share(log, 'parity_top1'):.1%} of the host's artifact",
        ),
        below(
            "device.parity_kl_sequence",
            kl_by_sequence[worst],
            limits["parity_kl_sequence"],
            detail=f"worst: {log['sequences'][worst]['name']}",
        ),
    ]
    return checks


def summary(log: Mapping[str, Any]) -> dict[str, Any]:
    """The log as a report stores it: without single positions, with means computed again."""
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
    """Mean KL, nats. NaN, which fails every limit, if there is no value or one is null (not a number)."""
    return float(nullable_floats(kl).mean()) if kl else math.nan


def _share(log: Mapping[str, Any], key: str) -> float:
    values = [value for s in log["sequences"] for value in s[key]]
    return sum(values) / len(values) if values else math.nan
