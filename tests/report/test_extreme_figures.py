"""Figures that are huge, tiny or not finite: every report that is written can be read and shown.

Random models, tiny vocabularies and broken artifacts have such figures, and some of their bundles pass the
gate. A file that the writer accepts and the reader refuses would end an export after the gate.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgellama.bundle.golden import Expectation
from edgellama.bundle.reports import read_reports
from edgellama.bundle.schema import manifest_schema, published, violations
from edgellama.commands.diff import diff
from edgellama.files import to_json
from edgellama.gate import metrics, parity
from edgellama.gate.golden import accuracy
from edgellama.gate.limits import Limits, parity_limit
from edgellama.gate.quality import Scores, quality_checks, scored_section
from edgellama.gate.regression import with_regression
from edgellama.report import Check, Report
from edgellama.report.junit import to_junit
from edgellama.report.markdown import to_markdown
from edgellama.report.page import PageData, render
from edgellama.text.windows import Window
from tests.helpers.small_bundle import SECTIONS

POSITIONS = 8
EXTREMES = (0.0, -0.0, 5e-324, 1e-30, 1e38, 1e39, 1.7e308, -1e308, math.inf, -math.inf, math.nan)


def logits(kind: str, vocabulary: int) -> Tensor:
    x = torch.randn(POSITIONS, vocabulary, generator=torch.Generator().manual_seed(0))
    match kind:
        case "huge":
            return 1e30 * x
        case "steep":
            return 1e4 * x
        case "flat":
            return 0 * x
        case "one infinite":
            return x.index_fill(1, torch.tensor([1]), torch.inf)
        case "impossible tokens":
            return x.index_fill(1, torch.tensor([0]), -torch.inf)
        case "not a number":
            return x.index_fill(0, torch.tensor([2]), torch.nan)
    return x


KINDS = ("ordinary", "huge", "steep", "flat", "one infinite", "impossible tokens", "not a number")


def report_of(reference: str, artifact: str, *, vocabulary: int = 5, windows: int = 2) -> Report:
    """The report of a gate in which the models have logits of these kinds."""
    window = Window("text", tuple(range(POSITIONS)), tuple([0] * POSITIONS))
    pair = logits(reference, vocabulary), logits(artifact, vocabulary)
    positions = [metrics.compare(*pair, window.targets)] * windows
    scores = Scores(quality=positions, windows=[window] * windows)
    quality = scores.summary()
    section = parity.examine_parity(positions, positions, 1e-4)
    limits = Limits(0.1, 0.5, 1e6)
    return Report(
        "xnnpack",
        "runtime",
        {"sha256": "0" * 64, "format": "gguf", "parameters": 1, "notes": []},
        POSITIONS * windows,
        windows,
        {},
        section.fields["parity"],
        quality,
        {"text": quality},
        (*section.checks, *quality_checks(quality, limits)),
        scored=scored_section([window] * windows, positions),
    )


@pytest.mark.parametrize(("reference", "artifact"), list(itertools.product(KINDS, KINDS)))
def test_a_report_of_any_two_models_can_be_read_and_shown(
    reference: str, artifact: str, tmp_path: Path
) -> None:
    report = report_of(reference, artifact)
    file = tmp_path / "report.json"
    file.write_text(report.to_json(), encoding="utf-8")
    (read,) = read_reports(file).values()
    assert read == json.loads(report.to_json(), parse_constant=pytest.fail)
    manifest = accepted(report)
    shown = with_regression(report, read, None)
    assert shown.to_text() and shown.regression
    again = json.loads(shown.to_json())
    assert render(PageData("bundle", [again], manifest, {"notes": []}))
    assert to_markdown("bundle", [again], manifest) and to_junit("bundle", [again])
    assert to_json(diff(file, file))


def accepted(report: Report) -> dict[str, Any]:
    """A manifest with the report's headline, which the schema must accept."""
    manifest = {
        **copy.deepcopy(SECTIONS),
        "schema": "edgellama.bundle/1",
        "files": {"tokenizer/tokenizer.json": {"bytes": 1, "sha256": "0" * 64}},
        "accuracy": {report.target: report.headline()},
    }
    data: dict[str, Any] = json.loads(to_json(manifest))
    assert list(violations(data, manifest_schema(), manifest_schema(), "manifest")) == []
    return data


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("vocabulary", [2, 3])
def test_one_window_and_a_tiny_vocabulary(windows: int, vocabulary: int) -> None:
    accepted(report_of("steep", "ordinary", vocabulary=vocabulary, windows=windows))


@pytest.mark.parametrize("value", EXTREMES)
def test_every_figure_of_a_report_may_be_extreme(value: float) -> None:
    report = report_of("ordinary", "ordinary")
    data = report.to_dict()
    for row in (data["quality"], *data["scored"]["windows"]):
        row |= {key: value for key, old in row.items() if isinstance(old, float)}
    data["checks"].append(Check("quality.kl", "fail", value, value).to_dict())
    data["device"] = [{"device": "phone", "prefill_tok_s": value, "decode_tok_s": value}]
    read = json.loads(to_json(data), parse_constant=pytest.fail)
    assert list(violations(read, published("report"), published("report"), "report")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_golden_figures_of_any_model_conform(kind: str) -> None:
    rows = logits(kind, 300).numpy()
    expectation = Expectation.of(logits("ordinary", 300).numpy(), 256)
    floor = float(expectation.kl(rows).mean())
    entry = {
        "sha256": "0" * 64,
        "runtime": "runtime",
        **accuracy([expectation], [rows]),
        "noise_floor_kl_mean": floor,
        "noise_floor_kl_sequence": floor,
    }
    limits = {"parity_kl_mean": parity_limit(floor), "parity_kl_sequence": parity_limit(floor)}
    schema = published("golden")
    for value, part in ((entry, "artifacts"), (limits, "limits")):
        data = json.loads(to_json({"xnnpack": value}), parse_constant=pytest.fail)
        assert list(violations(data, schema["properties"][part], schema, part)) == []


@pytest.mark.parametrize("value", EXTREMES)
def test_a_limit_of_parity_is_a_positive_number(value: float) -> None:
    assert 0 < parity_limit(value) < math.inf


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    far = np.full(3, 1e30)
    positions = metrics.Positions(np.zeros(3), np.ones(3), np.zeros(3), far, np.ones(3))
    figures = metrics.summarize([positions, positions])
    assert figures["ppl_artifact"] == math.inf and figures["ppl_reference"] == 1.0
