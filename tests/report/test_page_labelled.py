"""The part of the page about labelled texts: confusion, reliability, and changed answers side by side."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from edgellama.files import to_json
from edgellama.gate.flips import Answers
from edgellama.gate.labelled import LabelLimits, judged
from edgellama.report.label_charts import reliability
from edgellama.report.page import PageData, render
from edgellama.text.labelled import LabelledText, LabelledTexts
from tests.helpers.report_data import HOSTILE
from tests.report.test_page import ParsedPage

BAD = HOSTILE.replace("\ud800", "")  # which no file of texts holds: it is not Unicode
NAMES = ("safe", BAD)


def section() -> dict[str, Any]:
    """60 texts of two labels in two groups; the artifact loses the first and wins the last."""
    generator = np.random.default_rng(0)
    truth = np.arange(60) % 2
    reference = 3.0 * np.eye(2)[truth] + generator.normal(size=(60, 2)) * 0.3
    reference[59] = reference[59][::-1]
    artifact = reference.copy()
    artifact[0], artifact[59] = artifact[0][::-1], artifact[59][::-1]
    rows = tuple(LabelledText(f"text {n} {BAD}", NAMES[truth[n]], ("en", "de")[n // 30]) for n in range(60))
    texts = LabelledTexts("judged", rows)
    fields = judged(Answers(truth, reference, artifact), texts, NAMES, None, LabelLimits()).fields["labelled"]
    plain: dict[str, Any] = json.loads(to_json(fields))
    return plain


def report(labelled: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "quality": {},
        "parity": {},
        "checks": [],
        "domains": {},
        "agreement": {},
        "device": [],
    }
    return {
        **empty,
        "target": "onnx",
        "verdict": "pass",
        "runtime": "r",
        "reference": None,
        "tokens": 0,
        "windows": 0,
        "labelled": labelled,
    }


def test_the_page_shows_confusion_reliability_and_flips() -> None:
    labelled = section()
    page = ParsedPage(render(PageData("a classifier", [report(labelled)])))
    words = page.words
    assert labelled["confusion"]["artifact"] == [[29, 1], [0, 30]]
    assert "Confusion of onnx" in words and "29 1" in words
    assert words.index("Answers that changed") < words.index("text 0") < words.index("text 59")
    for text in ("row 1,", "row 60,", "On labelled texts", "30 texts", "Calibration error", "AUC"):
        assert text in words, text
    (chart,) = (svg for svg in page.of("svg") if svg.get("role") == "img")
    assert chart["aria-labelledby"].startswith("t0-reliability-t")
    assert not any("alert" in value for _, attributes in page.elements for value in attributes.values())


def test_a_report_of_an_older_version_has_no_diagram() -> None:
    labelled = section()
    for part in (labelled, *labelled["groups"].values()):
        for key in [key for key in part if key.startswith("auc") or key == "reliability"]:
            del part[key]
    assert reliability(labelled, "t0") == ""
    page = ParsedPage(render(PageData("a classifier", [report(labelled)])))
    assert "Confusion of full precision" in page.words


def test_texts_without_flips_or_of_one_label() -> None:
    truth = np.zeros(4, np.int64)
    scores = np.array([[1.0, 0.0]] * 4)
    texts = LabelledTexts("judged", tuple(LabelledText(f"{n}", "safe") for n in range(4)))
    fields = judged(Answers(truth, scores, scores), texts, NAMES, None, LabelLimits()).fields["labelled"]
    page = ParsedPage(render(PageData("a classifier", [report(json.loads(to_json(fields)))])))
    assert "No answer changed." in page.words
