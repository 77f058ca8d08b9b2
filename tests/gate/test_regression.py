"""Tests of --baseline and `edgellama diff`: paired windows of two reports, exit codes, and refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.bundle.reports import read_reports, stored_reports
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.cli.arguments import VERDICT_CODES
from edgellama.cli.dispatch import main
from edgellama.commands.diff import diff
from edgellama.commands.validate import validate
from edgellama.errors import BundleError, InputError, UsageError
from edgellama.files import to_json
from edgellama.gate.metrics import Positions, clustered_mean
from edgellama.gate.quality import scored_section
from edgellama.gate.regression import check_windows, paired, read_baseline, with_regression
from edgellama.report import Check, Report
from edgellama.text.windows import Text, Window, default_texts
from tests.helpers.paths import TINY
from tests.helpers.report_data import BENCH

STORED = "reports/validate-xnnpack.json"


@pytest.fixture
def stored_report(tiny_bundle: Bundle) -> dict[str, Any]:
    """Report in the tiny bundle, as JSON data."""
    return stored_reports(tiny_bundle)["xnnpack"]


@pytest.fixture
def current_report(stored_report: dict[str, Any]) -> Report:
    """The same report as the gate returned it."""
    checks = tuple(Check(**row) for row in stored_report["checks"])
    keys = ("target", "runtime", "reference", "tokens", "windows")
    sections = ("structure", "parity", "quality", "domains", "tools", "scored")
    return Report(**{key: stored_report[key] for key in (*keys, *sections)}, checks=checks)


def with_changed_kl(report: dict[str, Any], by: Callable[[int], float]) -> dict[str, Any]:
    """The report with the KL of its i-th window changed by `by(i)`."""
    data: dict[str, Any] = json.loads(json.dumps(report))
    for i, row in enumerate(data["scored"]["windows"]):
        row["kl"] += by(i)
    return data


def test_the_windows_add_up_to_the_quality_section(stored_report: dict[str, Any]) -> None:
    rows, quality = stored_report["scored"]["windows"], stored_report["quality"]
    assert (
        sum(row["tokens"] for row in rows) == stored_report["tokens"]
        and len(rows) == stored_report["windows"]
    )
    assert np.mean([row["kl"] for row in rows]) == pytest.approx(quality["kl_mean"])
    assert np.mean([row["top1"] for row in rows]) == pytest.approx(quality["top1_agreement"])
    assert math.exp(np.mean([row["nll_artifact"] for row in rows])) == pytest.approx(quality["ppl_artifact"])
    positions = stored_report["scored"]["by_position"]
    assert (positions[0]["from"], positions[-1]["to"]) == (0, 128)
    assert np.mean([row["kl_mean"] for row in positions]) == pytest.approx(quality["kl_mean"])
    assert sum(stored_report["scored"]["kl_histogram"]["counts"]) == stored_report["tokens"]
    assert len({row["sha256"] for row in rows}) == len(rows)


def test_the_histogram_counts_by_decades() -> None:
    kl = np.array([0.0, 1e-9, 1.1e-8, 0.5, 1.5, 99.0, 101.0, math.nan])
    window = Window("text", tuple(range(8)), tuple(range(1, 9)))
    histogram = scored_section([window], [Positions(kl, kl, kl, kl, kl)])["kl_histogram"]
    counts = {i: n for i, n in enumerate(histogram["counts"]) if n}
    assert (histogram["below"], histogram["above"]) == (2, 1) and counts == {0: 1, 30: 1, 32: 1, 39: 1}


def test_samples_show_their_common_beginning(stored_report: dict[str, Any]) -> None:
    assert len(stored_report["samples"]) == 4
    for row in stored_report["samples"]:
        start = row["reference"][: row["equal_characters"]]
        assert row["artifact"].startswith(start)
        if row["equal_tokens"] == row["tokens"]:  # equal texts may have different tokens
            assert row["reference"] == row["artifact"] == start
    share = np.mean([row["equal_tokens"] / row["tokens"] for row in stored_report["samples"]])
    assert stored_report["quality"]["greedy_prefix_agreement"] == pytest.approx(share)


def test_the_difference_is_paired_and_clustered(stored_report: dict[str, Any]) -> None:
    steps = [0.001, 0.003, 0.002, 0.0, 0.004, 0.001, 0.002, 0.003]
    section = paired(
        stored_report["scored"]["windows"],
        with_changed_kl(stored_report, lambda i: steps[i])["scored"]["windows"],
    )
    texts = [row["domain"] for row in stored_report["scored"]["windows"]]
    estimate = clustered_mean([np.full(128, step) for step in steps], texts)
    mean, low, high = estimate.mean, estimate.low, estimate.high
    assert section["kl_difference"] == pytest.approx(mean) and section["windows"] == 8
    assert section["kl_difference_ci95"] == pytest.approx([low, high])
    unpaired = stored_report["quality"]["kl_mean_ci95"]
    assert high - low < (unpaired[1] - unpaired[0]) / 2
    assert section["top1_difference"] == 0 and section["ln_ppl_difference_ci95"] == [0.0, 0.0]
    rows = stored_report["scored"]["windows"]
    assert paired(rows * 4, rows * 4) == paired(rows, rows), "a window counts once"
    fewer = paired(stored_report["scored"]["windows"][:3], stored_report["scored"]["windows"])
    assert fewer["windows"] == 3 and fewer["tokens"] == 384


@pytest.mark.parametrize(
    ("by", "limit", "verdict"),
    [
        (lambda i: 0.0, None, "pass"),  # equal
        (lambda i: 0.0, 0.0, "pass"),
        (lambda i: 0.01 + 1e-4 * (i % 2), None, "pass"),  # better than the baseline
        (lambda i: -0.005 - 1e-4 * (i % 2), None, "fail"),
        (lambda i: -0.005 - 1e-4 * (i % 2), 0.01, "pass"),  # worse, within the limit
        (lambda i: 0.02 if i % 4 < 2 else -0.0201, None, "inconclusive"),
    ],
)
def test_verdicts(
    current_report: Report,
    stored_report: dict[str, Any],
    by: Callable[[int], float],
    limit: float | None,
    verdict: str,
) -> None:
    report = with_regression(current_report, with_changed_kl(stored_report, by), limit)
    assert report.checks[-1].name == "regression.kl" and report.checks[-1].verdict == verdict
    assert report.verdict == verdict and report.to_dict()["regression"]["windows"] == 8
    assert "against the earlier report" in report.to_text()
    assert VERDICT_CODES[verdict] in (0, 1, 3)


@pytest.mark.slow
def test_validate_with_a_baseline(
    tiny_bundle: Bundle, stored_report: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command against the bundle itself, and against a better report."""
    better, output = tmp_path / "better.json", tmp_path / "now.json"
    better.write_text(to_json(with_changed_kl(stored_report, lambda i: -0.005 - 1e-4 * (i % 2))))
    common = ["validate", str(tiny_bundle.path), "--reference", str(TINY), "--tokens", "512"]
    assert main([*common, "--baseline", str(tiny_bundle.path), "--json", str(output)]) == 0
    section = json.loads(output.read_text())["regression"]
    assert section["windows"] == 4 and abs(section["kl_difference"]) < 1e-9
    assert main([*common, "--baseline", str(better), "--markdown", str(tmp_path / "a.md")]) == 1
    assert "FAIL regression.kl" in capfd.readouterr().out
    assert "**Against the earlier report**" in (tmp_path / "a.md").read_text()


def test_an_incomparable_baseline_is_refused_before_scoring(
    tiny_bundle: Bundle, tiny_checkpoint: Checkpoint, stored_report: dict[str, Any], tmp_path: Path
) -> None:
    def refused(change: dict[str, Any], match: str, **options: Any) -> None:
        path = tmp_path / "baseline.json"
        path.write_text(to_json(stored_report | change))
        with pytest.raises(InputError, match=match):
            validate(tiny_bundle, reference=tiny_checkpoint, baseline=path, **options)

    text = Text("evaluation_persuasion", default_texts()[1].content)
    refused({}, "window 1: other token ids", texts=[text])
    renamed_text = replace(text, name="mine")
    refused({}, "its text 'evaluation_persuasion' is not the text 'mine'", texts=[renamed_text])
    refused({"reference": {**stored_report["reference"], "sha256": "f" * 64}}, "another checkpoint")
    refused({"reference": None}, "another checkpoint")
    refused({"target": "onnx"}, "is about onnx, not about 'xnnpack'")
    refused({"scored": {}}, "window by window")
    refused({"schema": "edgellama.bench/1"}, "schema is")
    refused({"scored": {"windows": [{"sha256": 1}]}}, r"report\.scored is .* none of the forms")
    refused({"quality": {"kl_mean": "0.1"}}, r"report\.quality is .* none of the forms")
    refused({}, r"max_kl_increase must lie in \[0, 100\]", max_kl_increase=-1.0)
    window = Window("a", tuple(range(64)), tuple(range(1, 65)))
    with pytest.raises(InputError, match="its windows have 128 tokens, here 64"):
        check_windows([window], stored_report)
    with pytest.raises(UsageError, match="without --baseline"):
        validate(tiny_bundle, reference=tiny_checkpoint, max_kl_increase=0.1)
    with pytest.raises(UsageError, match="a baseline was given without a reference"):
        validate(tiny_bundle, baseline=tiny_bundle.path)
    for content in ("{", "[]", "{}", "[1]", '{"schema": "edgellama.report/1"}', "nan", "[" * 100_000):
        (tmp_path / "baseline.json").write_text(content)
        with pytest.raises(InputError):
            read_baseline(tmp_path / "baseline.json", "xnnpack", "a")
    with pytest.raises(InputError, match="No such file"):
        read_reports(tmp_path / "nowhere.json")


def test_a_bundle_without_validation_has_no_report(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = copied(tiny_bundle, tmp_path / "a.edgellama")
    (bundle.path / STORED).unlink()
    write_manifest(bundle.path, bundle.manifest)
    assert read_reports(bundle.path) == {}
    with pytest.raises(InputError, match="no target"):
        read_baseline(bundle.path, "xnnpack", "a")
    (bundle.path / "reports/export.json").unlink()
    assert read_reports(bundle.path) == {}
    (bundle.path / "manifest.json").unlink()
    with pytest.raises(BundleError, match="not a bundle"):
        read_reports(bundle.path)


def copied(bundle: Bundle, path: Path) -> Bundle:
    shutil.copytree(bundle.path, path)
    return Bundle.open(path)


def rewritten(bundle: Bundle, files: dict[str, str], **manifest: Any) -> Bundle:
    """Replaces files of the bundle and sections of its manifest."""
    for name, content in files.items():
        (bundle.path / name).write_text(content)
    return write_manifest(bundle.path, {**bundle.manifest, **manifest})


def test_a_bundle_does_not_differ_from_its_copy(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copied(tiny_bundle, tmp_path / "copy.edgellama")
    limits = ["--identical", "--max-kl-increase", "0", "--max-bytes-increase", "0"]
    assert main(["diff", str(tiny_bundle.path), str(copy.path), *limits]) == 0
    out = capsys.readouterr().out
    assert "identical  yes" in out and "diff.kl.xnnpack" in out
    differences = diff(tiny_bundle.path, copy.path)
    assert differences["manifest"] == differences["modules"] == differences["checks"] == []
    assert differences["verdict"] == "pass"
    assert differences["files"] == {"only_a": [], "only_b": [], "changed": []}


def test_differences_between_bundles_are_listed(
    tiny_bundle: Bundle, stored_report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = json.loads((tiny_bundle.path / "reports/export.json").read_text())
    tensor = next(t for t in export["tensors"] if t["name"] == "model.layers.1.mlp.down_proj.weight")
    tensor |= {"scheme": "int8 channel a8", "bytes": tensor["bytes"] + 1000}
    (artifact,) = json.loads(json.dumps(tiny_bundle.manifest["artifacts"]))
    artifact["bytes"] += 1000
    artifact["requires"]["operators"].append("llama::new.out")
    artifact["quantization"][0]["bytes"] += 1000
    worse = with_changed_kl(stored_report, lambda i: 0.005 + 1e-4 * (i % 2))
    changed = rewritten(
        copied(tiny_bundle, tmp_path / "other.edgellama"),
        {"reports/export.json": to_json(export), STORED: to_json(worse)},
        tools={**tiny_bundle.manifest["tools"], "torch": "2.14.0"},
        artifacts=[artifact],
    )
    differences = diff(tiny_bundle.path, changed.path)
    before = tiny_bundle.manifest["tools"]["torch"]
    assert differences["manifest"] == [{"field": "tools.torch", "a": before, "b": "2.14.0"}]
    assert differences["files"]["changed"] == ["reports/export.json", STORED]
    (target,) = differences["artifacts"]
    assert (target["difference"], target["operators_only_b"]) == (1000, ["llama::new.out"])
    assert target["operators_only_a"] == [] and len(target["groups"]) == 1
    assert differences["modules"] == [
        {
            "module": "down_proj",
            "scheme_a": "int4 g32 a8",
            "scheme_b": "int8 channel a8",
            "tensors": 1,
            "difference": 1000,
        }
    ]
    assert differences["accuracy"][0]["kl_difference"] == pytest.approx(0.00505)
    assert differences["verdict"] == "pass" and not differences["identical"]  # no limit was given
    pair = ["diff", str(tiny_bundle.path), str(changed.path)]
    for limit, code in (
        (["--max-kl-increase", "0.001"], 1),
        (["--max-kl-increase", "0.00505"], 3),
        (["--max-kl-increase", "0.01"], 0),
        (["--max-bytes-increase", "999"], 1),
        (["--max-bytes-increase", "1KB"], 0),
        (["--identical"], 1),
    ):
        assert main([*pair, *limit]) == code, limit
    capsys.readouterr()
    assert main([*pair, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "edgellama.diff/1"


def test_differences_between_reports_and_benchmarks(stored_report: dict[str, Any], tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("a", "b", "bench", "faster", "none")}
    files["a"].write_text(to_json(stored_report))
    files["b"].write_text(to_json([with_changed_kl(stored_report, lambda i: 0.001)]))
    assert diff(files["a"], files["b"])["accuracy"][0]["kl_difference"] == pytest.approx(0.001)
    assert diff(files["a"], files["a"], identical=True)["verdict"] == "pass"
    faster = json.loads(json.dumps(BENCH).replace("100.0", "150.0"))
    files["bench"].write_text(to_json(BENCH | {"candidates": BENCH["candidates"][:1]}))
    files["faster"].write_text(to_json(faster | {"candidates": faster["candidates"][:1]}))
    rows = diff(files["bench"], files["faster"])["speed"]
    assert len(rows) == 6 and {row["ratio"] for row in rows} == {1.5}
    assert rows[0]["what"] == "one.edgellama:xnnpack, 32 tokens, prefill_tok_s"
    assert rows[0]["low"] < 1 < rows[0]["high"]
    renamed = json.loads(files["faster"].read_text().replace("one.edgellama:", ""))
    files["faster"].write_text(to_json(renamed))
    rows = diff(files["bench"], files["faster"])["speed"]
    assert len(rows) == 6 and rows[0]["what"] == "xnnpack, 32 tokens, prefill_tok_s"
    files["bench"].write_text(to_json(BENCH))
    with pytest.raises(UsageError, match="several artifacts for one target"):
        diff(files["bench"], files["faster"])
    files["bench"].write_text(to_json(BENCH | {"candidates": BENCH["candidates"][:1]}))
    files["none"].write_text(to_json(stored_report | {"reference": None}))
    assert "other checkpoints" in diff(files["a"], files["none"])["accuracy"][0]["not_compared"]
    with pytest.raises(UsageError, match="cannot be compared"):
        diff(files["a"], files["none"], max_kl_increase=0.1)
    with pytest.raises(UsageError, match="needs two bundles"):
        diff(files["a"], files["b"], max_bytes_increase=0)
    with pytest.raises(UsageError, match=r"is a report and .* is a benchmark"):
        diff(files["a"], files["bench"])
    broken: dict[str, Any]
    for broken in ({"candidates": []}, {"machine": 3}, {"ratios": [{}]}, {"bandwidth": {"median": "fast"}}):
        files["faster"].write_text(to_json({**BENCH, **broken}))
        with pytest.raises(InputError, match=r"faster.json: bench\."):
            diff(files["bench"], files["faster"])
    assert main(["diff", str(files["a"]), str(tmp_path / "nowhere")]) == 2
    files["a"].write_text("nothing")
    with pytest.raises(InputError, match="neither a bundle nor JSON"):
        diff(files["a"], files["b"])


def test_the_hash_of_the_reference_is_that_of_the_checkpoint(stored_report: dict[str, Any]) -> None:
    assert open_checkpoint(TINY).sha256() == stored_report["reference"]["sha256"]
