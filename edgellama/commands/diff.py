"""Verb `diff`: differences of two bundles, reports or benchmarks. With limits, it is a step of a pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import is_bundle
from edgellama.bundle.reports import export_report, read_reports
from edgellama.commands.bench import BENCH_SCHEMA, read_bench
from edgellama.errors import InputError, UsageError
from edgellama.files import read_json
from edgellama.gate.regression import check_limit, increase, paired
from edgellama.report import Check, check
from edgellama.report.checks import worst_verdict

SCHEMA = "edgellama.diff/1"
_ELSEWHERE = ("artifacts", "accuracy", "files")  # sections of a manifest that are compared on their own


def diff(
    a: str | Path,
    b: str | Path,
    *,
    max_kl_increase: float | None = None,
    max_bytes_increase: int | None = None,
    identical: bool = False,
) -> dict[str, Any]:
    """Differences of `b` from `a`, as JSON data (schema `edgellama.diff/1`). Both are of one kind.

    Args:
        a: path of a bundle, a report or a benchmark.
        b: path of another of the same kind.
        max_kl_increase: largest allowed increase of a target's mean KL, nats per token. The interval of the
            paired difference decides. Raises UsageError if the two cannot be paired.
        max_bytes_increase: largest allowed growth of an artifact, in bytes.
        identical: no difference is allowed.

    Without a limit there are no checks, and the verdict is `pass`.
    """
    check_limit(max_kl_increase, a)
    paths, kinds = (Path(a), Path(b)), [_kind(Path(path)) for path in (a, b)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{a} is a {kinds[0]} and {b} is a {kinds[1]}", remedy="Give two of a kind.")
    kind = kinds[0]
    data: dict[str, Any] = {"schema": SCHEMA, "kind": f"{kind}s", "a": str(a), "b": str(b)}
    if kind == "bundle":
        data |= _bundles(Bundle.open(a), Bundle.open(b))
    if kind in ("bundle", "report"):
        reports = [read_reports(path) for path in paths]
        data |= {"accuracy": _accuracy(*reports), "speed": list(_device_speed(*reports))}
    else:
        data |= {"speed": list(_speed(*(read_bench(path) for path in paths)))}
    if kind != "bundle":
        data["identical"] = read_json(paths[0]) == read_json(paths[1])
    checks = list(_checks(data, max_kl_increase, max_bytes_increase, identical))
    return data | {
        "checks": [c.to_dict() for c in checks],
        "verdict": worst_verdict(c.verdict for c in checks),
    }


def _kind(path: Path) -> str:
    """Kind of the input: `bundle`, `report` or `benchmark`. Raises InputError if it cannot be read."""
    if path.is_dir() or is_bundle(path):
        return "bundle"
    try:
        content = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", remedy="Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: neither a bundle nor JSON ({error})", remedy=_REMEDY) from error
    return "benchmark" if isinstance(content, dict) and content.get("schema") == BENCH_SCHEMA else "report"


_REMEDY = "Give two bundles, or two files that `validate --json` or `bench --json` wrote."


def _bundles(a: Bundle, b: Bundle) -> dict[str, Any]:
    files_a, files_b = a.manifest["files"], b.manifest["files"]
    heads = [{k: v for k, v in m.manifest.items() if k not in _ELSEWHERE} for m in (a, b)]
    manifest = list(_changed(*(dict(_flat(head)) for head in heads)))
    return {
        "identical": files_a == files_b and not [row for row in manifest if row["field"] != "name"],
        "manifest": manifest,
        "files": {
            "only_a": sorted(files_a.keys() - files_b.keys()),
            "only_b": sorted(files_b.keys() - files_a.keys()),
            "changed": sorted(
                name for name in files_a.keys() & files_b.keys() if files_a[name] != files_b[name]
            ),
        },
        "artifacts": [_artifact(a, b, target) for target in dict.fromkeys([*a.targets, *b.targets])],
        "modules": list(_modules(export_report(a), export_report(b))),
    }


def _artifact(a: Bundle, b: Bundle, target: str) -> dict[str, Any]:
    """Differences of one target's artifact: bytes by group of tensors, and operators.

    If one side has no such artifact, only the bytes of the other.
    """
    entry_a, entry_b = (dict(x.artifact_entry(target)) if target in x.targets else None for x in (a, b))
    if entry_a is None or entry_b is None:
        return {
            "target": target,
            "bytes_a": entry_a and entry_a["bytes"],
            "bytes_b": entry_b and entry_b["bytes"],
        }
    groups = [{_group(row): row["bytes"] for row in x["quantization"]} for x in (entry_a, entry_b)]
    operators = [set(x["requires"]["operators"]) for x in (entry_a, entry_b)]
    return {
        "target": target,
        "bytes_a": entry_a["bytes"],
        "bytes_b": entry_b["bytes"],
        "difference": entry_b["bytes"] - entry_a["bytes"],
        "same_file": a.artifact_sha256(target) == b.artifact_sha256(target),
        "groups": list(_changed(*groups)),
        "operators_only_a": sorted(operators[0] - operators[1]),
        "operators_only_b": sorted(operators[1] - operators[0]),
    }


def _group(row: Mapping[str, Any]) -> str:
    size = "" if row["group_size"] is None else f" g{row['group_size']}"
    return f"{row.get('modules', 'tensors')} {row['scheme']}{size}"


def _modules(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tensors whose scheme or bytes changed, counted by kind of module."""
    tensors_a, tensors_b = ({row["name"]: row for row in x.get("tensors", ())} for x in (a, b))
    rows = Counter[tuple[str, str, str]]()
    sizes = Counter[tuple[str, str, str]]()
    for name in dict.fromkeys([*tensors_a, *tensors_b]):
        before, after = tensors_a.get(name), tensors_b.get(name)
        schemes = tuple("none" if row is None else row["scheme"] for row in (before, after))
        grown = (after["bytes"] if after else 0) - (before["bytes"] if before else 0)
        if schemes[0] != schemes[1] or grown:
            key = (name.removesuffix(".weight").rpartition(".")[2], *schemes)
            rows[key] += 1
            sizes[key] += grown
    for key, count in rows.items():
        yield {
            "module": key[0],
            "scheme_a": key[1],
            "scheme_b": key[2],
            "tensors": count,
            "difference": sizes[key],
        }


def _accuracy(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired differences for each target of either side, or the reason that there are none."""
    rows = []
    for target in dict.fromkeys([*a, *b]):
        row: dict[str, Any] = {"target": target}
        if target not in a or target not in b:
            rows.append(row | {"not_compared": f"no report in {'A' if target not in a else 'B'}"})
            continue
        report_a, report_b = a[target], b[target]
        try:
            rows.append(row | _paired(report_a, report_b))
        except InputError as error:
            rows.append(row | {"not_compared": error.message})
    return rows


def _paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    if not (one.get("scored") and other.get("scored")):
        raise InputError("a report has no section `scored`, window by window", remedy="Validate again.")
    if one["reference"] is None or one["reference"]["sha256"] != (other["reference"] or {}).get("sha256"):
        raise InputError("they were compared with other checkpoints", remedy="Use one --reference.")
    return paired(one["scored"]["windows"], other["scored"]["windows"]) | {
        "verdict_a": one["verdict"],
        "verdict_b": other["verdict"],
    }


def _speed(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Ratios of medians (b / a) for artifacts that both measured with the same length of prompt.

    Artifacts are matched by name. If no names are equal, they are matched by target, which needs one artifact
    a target. The ratios are not paired, so they are less precise than those of one run that takes turns.
    """
    candidates_a, candidates_b = ({row["name"]: row for row in x["candidates"]} for x in (a, b))
    if not candidates_a.keys() & candidates_b.keys():
        candidates_a, candidates_b = (
            {name.rpartition(":")[2]: row for name, row in rows.items()}
            for rows in (candidates_a, candidates_b)
        )
        if len(candidates_a) < len(a["candidates"]) or len(candidates_b) < len(b["candidates"]):
            raise UsageError(
                "several artifacts for one target, and none that both measured",
                remedy="Compare benchmarks of one bundle each, or measure both in turns: edgellama bench A B.",
            )
    for name in sorted(candidates_a.keys() & candidates_b.keys()):
        runs_b = {run["prompt_tokens"]: run for run in candidates_b[name]["runs"]}
        for run in candidates_a[name]["runs"]:
            for rate in ("prefill_tok_s", "decode_tok_s") if run["prompt_tokens"] in runs_b else ():
                label = f"{name}, {run['prompt_tokens']} tokens, {rate}"
                yield _ratio({"what": label}, run[rate], runs_b[run["prompt_tokens"]][rate])


def _device_speed(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Ratios of speeds (b / a) from device logs, matched by the device's name."""
    for target in sorted(a.keys() & b.keys()):
        logs_a, logs_b = ({log["device"]: log for log in x[target].get("device", ())} for x in (a, b))
        for device in sorted(logs_a.keys() & logs_b.keys()):
            for rate in ("prefill_tok_s", "decode_tok_s"):
                before, after = logs_a[device].get(rate), logs_b[device].get(rate)
                if before and after:
                    yield {
                        "what": f"{target} on {device}, {rate}",
                        "a": before,
                        "b": after,
                        "ratio": after / before,
                    }


def _ratio(row: dict[str, Any], a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    """Ratio of medians, with bounds: slowest of b to fastest of a, and fastest of b to slowest of a."""
    return row | {
        "a": a["median"],
        "b": b["median"],
        "ratio": b["median"] / a["median"],
        "low": b["low"] / a["high"],
        "high": b["high"] / a["low"],
    }


def _checks(
    data: Mapping[str, Any], max_kl: float | None, max_bytes: int | None, identical: bool
) -> Iterator[Check]:
    if identical:
        yield check("diff.identical", bool(data["identical"]))
    if max_bytes is not None:
        if "artifacts" not in data:
            raise UsageError(
                "--max-bytes-increase needs two bundles", remedy="Give bundles, or leave it out."
            )
        for row in data["artifacts"]:
            if "difference" not in row:
                raise UsageError(
                    f"only one of the bundles has an artifact for {row['target']}",
                    remedy="Leave out the limit.",
                )
            grown = row["difference"]
            yield check(f"diff.bytes.{row['target']}", grown <= max_bytes, value=grown, limit=max_bytes)
    if max_kl is not None:
        rows = data.get("accuracy", ())
        if not rows:
            raise UsageError(
                "--max-kl-increase needs accuracy on both sides", remedy="Give validated bundles or reports."
            )
        for row in rows:
            if "not_compared" in row:
                raise UsageError(
                    f"the accuracy of {row['target']} cannot be compared: {row['not_compared']}",
                    remedy="Leave out --max-kl-increase, or validate both with the same texts and checkpoint.",
                )
            yield increase(f"diff.kl.{row['target']}", row, max_kl)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects with their dotted names. Lists are leaves."""
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from _flat(value[key], f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name) or (name in a) != (name in b):
            yield {"field": name, "a": a.get(name), "b": b.get(name)}
