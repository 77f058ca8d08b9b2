"""Tests of the reports for CI jobs: Markdown tables that survive hostile texts, and JUnit XML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from edgellama.bundle import Bundle
from edgellama.bundle.reports import stored_reports
from edgellama.report.junit import to_junit
from edgellama.report.markdown import to_markdown
from edgellama.report.numbers import megabytes
from tests.helpers.report_data import HOSTILE, poisoned

# Attributes and children of each element in the schema of Jenkins' xUnit plugin (junit-10.xsd), as far as used here.
# The schema fixes the order of the children of a suite, but not of a case.
ALLOWED = {
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, ["testsuite"]),
    "testsuite": ({"name", "tests", "failures", "errors", "time"}, ["properties", "testcase"]),
    "properties": (set(), ["property"]),
    "property": ({"name", "value"}, []),
    "testcase": ({"name", "classname", "time"}, ["failure", "error"]),
    "failure": ({"message", "type"}, []),
    "error": ({"message", "type"}, []),
}


@pytest.fixture
def reports(tiny_bundle: Bundle) -> list[dict[str, Any]]:
    """A report that passed, and one of another target with one failed and one inconclusive check."""
    (report,) = stored_reports(tiny_bundle).values()
    failed: dict[str, Any] = json.loads(json.dumps(report)) | {"target": "onnx", "verdict": "fail"}
    for check in failed["checks"]:
        if check["name"] == "parity.kl":
            check |= {"verdict": "fail", "value": 0.5, "limit": 0.1, "detail": "noise floor 0.03"}
        if check["name"] == "quality.kl":
            check["verdict"] = "inconclusive"
    return [report, failed]


def test_the_summary_states_the_verdict_and_the_failed_checks(
    reports: list[dict[str, Any]], tiny_bundle: Bundle
) -> None:
    size = megabytes(tiny_bundle.artifact_entry("xnnpack")["bytes"])
    passed = to_markdown("tiny", reports[:1], tiny_bundle.manifest)
    assert passed.startswith("### ✅ edgellama: `tiny` passed\n") and "Did not pass" not in passed
    kl = reports[0]["quality"]["kl_mean"]
    assert f"| `xnnpack` | ✅ pass | {kl:.4f} (" in passed and f"{size} | 1,024 |" in passed
    both = to_markdown("tiny", reports, tiny_bundle.manifest)
    assert both.startswith("### ❌ edgellama: `tiny` failed\n")
    failures = both[both.index("**Did not pass**") : both.index("<details>")]
    assert "| `onnx` | ❌ `parity.kl` | `0.5000` | `0.1` | `noise floor 0.03` |" in failures
    assert "⚠️ `quality.kl`" in failures and failures.count("\n| `") == 2


def test_markdown_keeps_hostile_texts_in_code_spans(
    reports: list[dict[str, Any]], tiny_bundle: Bundle
) -> None:
    """Rendered as on GitHub: no foreign element, no mention outside code, tables of the same size."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    clean = parser.render(to_markdown("tiny", reports, tiny_bundle.manifest))
    html = parser.render(to_markdown(HOSTILE, poisoned(reports), poisoned(tiny_bundle.manifest)))
    assert set(re.findall(r"<(\w+)", html)) == set(re.findall(r"<(\w+)", clean))
    assert html.count("<td") == clean.count("<td") and html.count("<tr") == clean.count("<tr")
    outside = re.sub(r"<code>.*?</code>", "", html, flags=re.DOTALL)
    assert "alert" not in outside and "@" not in outside
    assert "<code>x`|y</code>" in parser.render(to_markdown("x`|y", reports, {}))


def test_junit_has_a_case_for_each_check(reports: list[dict[str, Any]]) -> None:
    root = ElementTree.fromstring(to_junit("tiny", reports))
    count = len(reports[0]["checks"])
    assert [root.get(k) for k in ("tests", "failures", "errors")] == [str(2 * count), "1", "1"]
    assert [s.get("name") for s in root] == ["tiny:xnnpack", "tiny:onnx"]
    for suite, report in zip(root, reports, strict=True):
        cases = {case.get("name"): case for case in suite.iter("testcase")}
        assert list(cases) == [check["name"] for check in report["checks"]]
        assert {c.get("classname") for c in cases.values()} >= {f"edgellama.{report['target']}.quality"}
        for check in report["checks"]:
            outcome = [child.tag for child in cases[check["name"]]]
            assert outcome == {"pass": [], "fail": ["failure"], "inconclusive": ["error"]}[check["verdict"]]
    (failure,) = root.iter("failure")
    assert failure.get("message") == "parity.kl is 0.5000, limit 0.1"
    assert failure.text == "parity.kl is 0.5000, limit 0.1\nnoise floor 0.03"
    properties = {p.attrib["name"]: p.attrib["value"] for p in root[0].iter("property")}
    assert float(properties["kl_mean"]) == reports[0]["quality"]["kl_mean"]


@pytest.mark.parametrize("hostile", [False, True])
def test_junit_conforms_to_the_schema(reports: list[dict[str, Any]], hostile: bool) -> None:
    xml = to_junit(HOSTILE, poisoned(reports)) if hostile else to_junit("tiny", reports)
    xml.encode()
    for element in ElementTree.fromstring(xml).iter():
        attributes, children = ALLOWED[element.tag]
        assert set(element.keys()) <= attributes and element.attrib.get("name", "x")
        places = [children.index(child.tag) for child in element]
        assert places == sorted(places)
        assert not (element.text or "").strip() or element.tag in ("failure", "error")


def test_a_report_without_a_reference_has_no_quality(reports: list[Mapping[str, Any]]) -> None:
    without_reference = {**reports[0], "quality": {}, "tokens": 0}
    assert "| ✅ pass | not compared |" in to_markdown("tiny", [without_reference], {})
    assert "kl_mean" not in to_junit("tiny", [without_reference])
