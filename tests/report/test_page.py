"""Tests of the page of --html: it loads nothing, states the verdict first and keeps hostile texts as text."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.reports import export_report, stored_reports
from edgellama.cli.report_files import Outputs
from edgellama.report.charts import by_position, kl_cumulative, kl_histogram, layer_costs, speed, sqnr_curve
from edgellama.report.numbers import interval, number
from edgellama.report.page import PageData, breakable, render
from edgellama.report.svg import LEFT, RIGHT, WIDTH, Chart, Row, Scale, tick, whisker
from tests.helpers.paths import ROOT
from tests.helpers.report_data import BENCH, HOSTILE, LAYERS, poisoned

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
CSS = (ROOT / "edgellama/report/page.css").read_text()


class ParsedPage(HTMLParser):
    """Elements of a page with their attributes and text. Fails if elements do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._space(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes another element"
        self._space(tag)

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "title", "desc"):
            self.text.append(data)

    def _space(self, tag: str) -> None:
        if tag not in ("b", "bdi", "code", "del", "ins", "span", "wbr"):
            self.text.append(" ")

    @property
    def words(self) -> str:
        """Visible text, with one space between words."""
        return " ".join("".join(self.text).split())

    def of(self, tag: str) -> list[dict[str, str]]:
        """Attributes of each element with that tag."""
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tiny_bundle: Bundle) -> Mapping[str, Any]:
    return stored_reports(tiny_bundle)["xnnpack"]


@pytest.fixture
def full_page_data(report: Mapping[str, Any], tiny_bundle: Bundle) -> PageData:
    """All parts of a page: two targets, layers, regression, a device, calibration, a benchmark."""
    passed = copy.deepcopy(dict(report))
    passed |= {"layers": LAYERS, "agreement": {"onnx": {**passed["quality"], "tokens": 1024}}}
    passed["regression"] = {
        "tokens": 1024,
        "windows": 8,
        "tools_before": {"torch": "2.12.0"},
        **{f"{n}_{w}": 0.5 for n in ("kl", "top1", "ln_ppl") for w in ("before", "now", "difference")},
        **{f"{n}_difference_ci95": [-0.01, 0.02] for n in ("kl", "top1", "ln_ppl")},
    }
    passed["device"] = [
        {
            "device": "a phone",
            "os": "Android 15",
            "runtime": "executorch 1.4.0",
            "parity_kl_mean": 1e-8,
            "kl_mean": 0.02,
            "prefill_tok_s": None,
            "decode_tok_s": 40.0,
        }
    ]
    passed["adapters"] = [
        {
            **{key: passed["quality"][key] for key in ("kl_mean", "kl_mean_ci95", "top1_agreement")},
            "name": "style",
            "judged": True,
            "bytes": 460_000,
            "tokens": 1024,
            "without": {"kl_mean": 0.7, "top1_agreement": 0.4},
        },
        {"name": "facts", "judged": False},
    ]
    failed = copy.deepcopy(dict(report)) | {"target": "onnx", "verdict": "fail"}
    failed["checks"][0] |= {"verdict": "fail", "value": 1}
    export = export_report(tiny_bundle) | {
        "calibration": {"tokens": 16384, "windows": 64, "sha256": "a" * 64, "texts": [{"name": "ours"}]}
    }
    return PageData("a name", [passed, failed], tiny_bundle.manifest, export, BENCH)


def test_the_page_of_an_export(report: Mapping[str, Any], tiny_bundle: Bundle) -> None:
    html = render(PageData("tiny", [report], tiny_bundle.manifest, export_report(tiny_bundle)))
    page = ParsedPage(html)
    quality, words = report["quality"], page.words
    low, high = quality["kl_mean_ci95"]
    assert words.index("✓ Pass") < words.index("Accuracy") < words.index("structure")
    for text in (
        f"{quality['kl_mean']:.4f}",
        f"{low:.4f} – {high:.4f}",
        "at most 0.42 is allowed",
        f"{quality['top1_agreement']:.1%}".replace("%", " %"),
        "evaluation_persuasion",
        "int4 g32",
        tiny_bundle.artifact_sha256("xnnpack"),
        tiny_bundle.manifest["source"]["sha256"],
        f"executorch {tiny_bundle.manifest['tools']['executorch']}",
        report["samples"][0]["reference"].strip()[:12],
    ):
        assert text in words, text
    for check in report["checks"]:
        assert check["name"].partition(".")[2] in words, check["name"]
    charts = [svg for svg in page.of("svg") if svg.get("role") == "img"]
    assert [svg["aria-labelledby"].split()[0] for svg in charts] == [
        "t0-histogram-t",
        "t0-cumulative-t",
        "t0-position-t",
    ]
    assert html == render(PageData("tiny", [report], tiny_bundle.manifest, export_report(tiny_bundle)))


def test_the_page_loads_nothing_and_runs_nothing(full_page_data: PageData) -> None:
    page = ParsedPage(render(full_page_data))
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "#").startswith("#") and "src" not in attributes
    assert not re.search(r"url\(|@import|https?:", CSS)
    policies = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_a_full_page_nests_and_its_references_resolve(full_page_data: PageData) -> None:
    page = ParsedPage(render(full_page_data))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [a["href"][1:] for a in page.of("a")]
    references += [i for _, a in page.elements for i in a.get("aria-labelledby", "").split()]
    assert set(references) <= set(ids)
    assert len([svg for svg in page.of("svg") if svg.get("role") == "img"]) == 2 * 3 + 2 + 2
    assert page.words.startswith("edgellama validation a name") and "✕ Fail" in page.words
    for text in (
        "Against the earlier report",
        "On devices",
        "a phone",
        "facts not compared",
        "rounding the weights",
        "16,384 tokens",
    ):
        assert text in page.words


def test_a_page_of_speed_alone() -> None:
    page = ParsedPage(render(PageData("one, other", bench=BENCH)))
    assert "Checks" not in page.words and "Provenance" not in page.words
    for text in ("a processor, 2 cores", "90.0 – 105.0", "0.800 – 1.020", "118.0 MB"):
        assert text in page.words


def test_hostile_texts_stay_text(full_page_data: PageData) -> None:
    data = PageData(
        HOSTILE,
        poisoned(full_page_data.reports),
        poisoned(full_page_data.manifest),
        poisoned(full_page_data.export),
        poisoned(BENCH),
    )
    html = render(data)
    page, clean = ParsedPage(html), ParsedPage(render(full_page_data))
    assert Counter(t for t, _ in page.elements).keys() == Counter(t for t, _ in clean.elements).keys()
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert not set(html) & {"\x00", "\u202e", "\ud800"}
    assert "<script>alert(1)</script>" in page.words and "\\x00\\u202e\\ud800" in page.words
    html.encode()


def test_infinite_intervals_and_undefined_kl_are_left_out(report: Mapping[str, Any]) -> None:
    data = json.loads(json.dumps(report))
    for quality in (data["quality"], *data["domains"].values()):
        quality |= {"kl_mean": math.nan, "kl_mean_ci95": [math.nan, math.inf], "ppl_artifact": math.inf}
    for row in data["scored"]["by_position"]:
        row["kl_mean_ci95"] = [-math.inf, math.inf]
    page = ParsedPage(render(PageData("broken", [data])))
    assert "is – nats per token away" in page.words
    for row in data["scored"]["by_position"]:
        row["kl_mean"] = math.nan
    data["scored"]["kl_histogram"] |= {"counts": [0] * 40, "below": 0, "above": 0}
    assert len([s for s in ParsedPage(render(PageData("broken", [data]))).of("svg") if "role" in s]) == 0


def test_reports_of_earlier_versions_lack_sections(report: Mapping[str, Any]) -> None:
    data = {k: v for k, v in report.items() if k not in ("scored", "samples", "layers")}
    words = ParsedPage(render(PageData("old", [data]))).words
    assert "✓ Pass" in words and "What they write" not in words
    not_compared = {**data, "quality": {}, "domains": {}, "reference": None}
    page = ParsedPage(render(PageData("alone", [not_compared])))
    assert "was not compared with a checkpoint" in page.words


def colours() -> Iterator[tuple[str, dict[str, str]]]:
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    light, dark, paper = (dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks)
    yield from (("light", light), ("dark", {**light, **dark}), ("print", {**light, **paper}))


@pytest.mark.parametrize(("theme", "colour"), list(colours()), ids=lambda v: v if isinstance(v, str) else "")
def test_colours_are_legible(theme: str, colour: dict[str, str]) -> None:
    """WCAG 2.2: contrast of 4.5 to 1 for text and 3 to 1 for graphics."""

    def contrast(first: str, second: str) -> float:
        light, dark = sorted((_luminance(colour[first]), _luminance(colour[second])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for text, ground in (
        *((text, ground) for text in ("ink", "muted") for ground in ("page", "card")),
        *((text, f"{v}-bg") for v in ("pass", "fail", "inconclusive") for text in ("ink", "muted", v)),
        *((v, "page") for v in ("pass", "fail", "inconclusive", "s0")),
    ):
        assert contrast(text, ground) >= 4.5, (theme, text, ground)
    assert all(contrast(f"s{i}", "page") >= 3 for i in range(6))


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_scales_and_their_ticks() -> None:
    assert Scale(0, 10).place(2.5) == 0.25 and Scale(1e-4, 1, log=True).place(1e-2) == pytest.approx(0.5)
    assert Scale(0, 1).place(7) == 1 and Scale(0, 1).place(math.nan) == 0
    assert Scale(1, 10, log=True).place(0) == 0
    assert Scale(0, 0.02175).ticks() == pytest.approx([0, 0.005, 0.01, 0.015, 0.02])
    assert Scale(1e-6, 10, log=True).ticks() == pytest.approx([1e-6, 1e-4, 1e-2, 1])
    assert Scale(5, 5) == Scale(math.nan, 1) == Scale(0, 1)
    assert [tick(x, True) for x in (1e-5, 0.01, 1.0)] == ["10⁻⁵", "0.01", "1"]
    assert [tick(x) for x in (0.30000000000000004, 500.0, 20000.0)] == ["0.3", "500", "20,000"]


def test_marks_are_at_the_places_of_their_values() -> None:
    chart = Chart("k", "title", "description", Scale(0, 10), Scale(0, 1), "x", "y")
    chart.column(2, 4, Row(3, 0.5, 0.25, 0.75, "tip")).line([Row(0, 0), Row(10, 1)])
    svg = chart.render()
    (rect,) = re.findall(
        r'<rect class="s0 fill" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg
    )
    x, y, width, height = map(float, rect)
    span = WIDTH - LEFT - RIGHT
    assert [x, width] == pytest.approx([LEFT + 0.2 * span + 0.4, 0.2 * span - 0.8])
    bottom = y + height
    (line,) = re.findall(r'class="ink whisker" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"', svg)
    assert [(bottom - float(v)) / height for v in line] == pytest.approx([0.5, 1.5], abs=0.01)
    assert "<title>tip</title>" in svg and '<title id="k-t">title</title>' in svg


def test_labels_of_rules_do_not_touch() -> None:
    chart = Chart("k", "t", "d", Scale(0, 100), Scale(0, 1), "x", "y")
    for x in (50, 51, 52, 99):
        chart.rule(x, "label")
    labels = re.findall(r'<text class="note" x="([\d.]+)" y="(-?\d+)">label</text>', chart.render())
    rows = Counter(y for _, y in labels)
    assert sorted(rows.values()) == [1, 1, 2] and all(float(x) + 30 < WIDTH for x, _ in labels)


def test_charts_of_the_real_sections(report: Mapping[str, Any]) -> None:
    scored, quality = report["scored"], report["quality"]
    histogram = kl_histogram(scored, quality, "k")
    bars = re.findall(r": (\d+) tokens", histogram)
    assert sum(map(int, bars)) == report["tokens"] and ">p99.9<" in histogram
    assert "1024 tokens" in kl_cumulative(scored, quality, "k")
    assert by_position(scored, quality, "k").count("<title>positions ") == len(scored["by_position"])
    assert "The most costly alone is lm_head" in layer_costs(LAYERS, "k")
    assert sqnr_curve(LAYERS, "k").count(" dB</title>") == 31
    assert speed(BENCH, "decode_tok_s", "k").count("(90.0 to 105.0)") == 6


def test_numbers_and_intervals_as_text() -> None:
    assert [number(x) for x in (None, 0.0, 0.02649, 2.39e-14, 33.1, 12345, "pass", True)] == [
        "–",
        "0.0000",
        "0.0265",
        "2.39e-14",
        "33.1",
        "12,345",
        "pass",
        "True",
    ]
    assert interval([0.1, None]) == "" and interval([0.873, 0.898], "percent") == "87.3 % – 89.8 %"
    assert breakable("a_b<c>") == "a_<wbr>b&lt;c&gt;"
    assert whisker(0.1, [None, None], Scale(0, 1)) == ""


def test_only_requested_files_are_written(tiny_bundle: Bundle, tmp_path: Path) -> None:
    outputs = Outputs(html=tmp_path / "a.html", junit=tmp_path / "a.xml")
    assert outputs and not Outputs() and not outputs.written()
    outputs.write(tiny_bundle, list(stored_reports(tiny_bundle).values()))
    assert outputs.written() and sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.xml"]
