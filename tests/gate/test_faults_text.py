"""Planted faults of the evaluation text: text that the model has seen, and text that measures nothing new.

The bundle is calibrated on these pages' sources. Every fault goes the way of `edgellama validate --text`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle.bundle import write_manifest
from edgellama.bundle.reports import EXPORT_REPORT
from edgellama.checkpoints import Checkpoint
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import TextError
from edgellama.files import to_json
from edgellama.gate import metrics
from edgellama.recipe import RECIPES
from edgellama.report import Report
from edgellama.text.calibration import calibration_texts
from edgellama.text.windows import Text, default_texts, read_texts
from tests.helpers.one_layer_bundle import Sound
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

CONTEXT = 128
NOVEL, TUTORIAL = (text.content for text in default_texts())
CALIBRATION_NOVEL, CALIBRATION_TUTORIAL = (text.content for text in calibration_texts())
PAGES = sorted((ROOT / "edgellama/docs").glob("*.md"))
OWN = "\n".join(page.read_text(encoding="utf-8") for page in PAGES[:8])
UNSEEN = "\n".join(page.read_text(encoding="utf-8") for page in PAGES[8:])
LINE = "The quick brown fox jumps over the lazy dog, and nobody asks it for its reasons.\n"


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    checkpoint = tiny_checkpoint.first_layers(1)
    path = tmp_path_factory.mktemp("calibrated") / "own.edgellama"
    recipe = replace(RECIPES["int4"], name="quick", calibration_tokens=2048)
    texts = [Text("own", OWN)]
    bundle = export(checkpoint, path, recipe=recipe, context=CONTEXT, calibration=texts, validate=False)
    return Sound(checkpoint, bundle)


def judged(calibrated: Sound, texts: list[Text], **options: Any) -> Report:
    """The gate's report. The limit of KL is too high to matter, because a cut of a model predicts badly."""
    options = {"tokens": 512, "max_kl": 100.0} | options
    return validate(calibrated.bundle, reference=calibrated.checkpoint, texts=texts, relower=False, **options)


def shuffled(text: str) -> str:
    lines = text.splitlines()
    random.Random(0).shuffle(lines)
    return "\n".join(lines)


def wrapped(text: str, width: int) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(CALIBRATION_NOVEL, "is a calibration text", id="edgellama's calibration text"),
        pytest.param(CALIBRATION_TUTORIAL[9_000:15_000], "long lines", id="excerpt of it"),
        pytest.param(shuffled(CALIBRATION_NOVEL), "long lines", id="its lines shuffled"),
        pytest.param(wrapped(CALIBRATION_NOVEL, 70), "of its passages", id="its lines wrapped"),
        pytest.param(CALIBRATION_NOVEL.upper(), "of its passages", id="in upper case"),
        pytest.param(NOVEL + CALIBRATION_NOVEL[:9_000], "long lines", id="behind an evaluation text"),
        pytest.param(OWN, "is a calibration text", id="the bundle's own calibration text"),
        pytest.param(OWN + "\n", "of its passages", id="own text with a line more"),
        pytest.param(OWN[7_000:15_000], "of its passages", id="excerpt of the own text"),
        pytest.param(shuffled(OWN), "of its passages", id="lines of the own text shuffled"),
        pytest.param(OWN.replace("\n", "\r\n"), "of its passages", id="own text with other line ends"),
        pytest.param(" ".join(OWN.split()), "of its passages", id="own text in one line"),
        pytest.param(UNSEEN + OWN[:9_000], "of its passages", id="own text behind new text"),
    ],
)
def test_text_that_the_model_was_calibrated_on(content: str, reason: str, calibrated: Sound) -> None:
    with pytest.raises(TextError, match=f"evaluation: harmless .*{reason}"):
        judged(calibrated, [Text("first", NOVEL[:5_000]), Text("harmless", content)])


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param([LINE * 500], id="one line repeated"),
        pytest.param([LINE * 300 + LINE[::-1] * 300], id="two lines repeated"),
        pytest.param(["".join(f"{i}. {LINE}" for i in range(400))], id="one line numbered"),
        pytest.param([NOVEL] * 4, id="the same text four times"),
        pytest.param([NOVEL, "A first line of my own.\n" + NOVEL], id="a copy that is moved"),
        pytest.param([NOVEL, NOVEL[20_000:60_000]], id="an excerpt of the other text"),
        pytest.param([NOVEL, shuffled(NOVEL)], id="lines of the other text shuffled"),
        pytest.param([NOVEL, wrapped(NOVEL, 70).upper()], id="the other text in upper case"),
        pytest.param(["=-" * 40_000], id="no letters"),
    ],
)
def test_text_that_repeats_itself(contents: list[str], calibrated: Sound) -> None:
    texts = [Text(f"text {i}", content) for i, content in enumerate(contents)]
    try:
        report = judged(calibrated, texts)
    except TextError as error:
        assert "repeats itself" in error.message
    else:  # one short window is new
        assert (report.verdict, report.windows) == ("inconclusive", 1)


def test_a_file_under_another_name(calibrated: Sound, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("ours.txt", "theirs.txt")]
    for path in paths:
        path.write_text(NOVEL, encoding="utf-8")
    with pytest.raises(TextError, match="the text theirs repeats itself, or the texts before it"):
        judged(calibrated, read_texts(paths))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"A few words.", "fewer than 129"),
    ],
    ids=["empty", "blank", "no text", "shorter than a window"],
)
def test_no_text(content: bytes, message: str, calibrated: Sound, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(TextError, match=message):
        judged(calibrated, read_texts([tmp_path / "text.txt"]))


def test_four_copies_in_one_file_are_one(calibrated: Sound) -> None:
    part = NOVEL[:20_000]
    once, four = (judged(calibrated, [Text("text", part * n)], tokens=1 << 20) for n in (1, 4))
    assert abs(once.windows - four.windows) <= 1
    assert four.scored["texts"] == [
        {"name": "text", "windows": four.windows, "repeated": pytest.approx(3 * once.windows, abs=4)}
    ]
    widths = [r.quality["kl_mean_ci95"][1] - r.quality["kl_mean_ci95"][0] for r in (once, four)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda report: report.pop("calibration"), id="no record of the calibration"),
        pytest.param(lambda report: report["calibration"].update(texts=[]), id="no text in it"),
        pytest.param(lambda report: report["calibration"]["texts"][0].pop("sha256"), id="no hash in it"),
        pytest.param(
            lambda report: report["calibration"]["texts"][0]["fingerprints"].update(sampling=7),
            id="fingerprints of another form",
        ),
    ],
)
def test_a_record_without_the_calibration_text(change: Change, calibrated: Sound, tmp_path: Path) -> None:
    copy = tmp_path / "copy.edgellama"
    shutil.copytree(calibrated.bundle.path, copy)
    report = json.loads((copy / EXPORT_REPORT).read_text(encoding="utf-8"))
    change(report)
    (copy / EXPORT_REPORT).write_text(to_json(report), encoding="utf-8")
    altered = replace(calibrated, bundle=write_manifest(copy, calibrated.bundle.manifest))
    failed = [c.name for c in judged(altered, default_texts()).checks if c.verdict != "pass"]
    assert "text.calibration" in failed and set(failed) <= {"text.calibration", "claims.tensors"}


def test_new_text_passes(calibrated: Sound) -> None:
    report = judged(calibrated, [Text("unseen", UNSEEN), *default_texts()])
    assert {c.name: c.detail for c in report.checks if c.verdict != "pass"} == {}
    assert [row["name"] for row in report.scored["texts"]] == ["unseen", *(t.name for t in default_texts())]


def test_a_limit_between_two_looks_reads_more_text(calibrated: Sound) -> None:
    """A limit inside the first interval, where a single look of 95 % would have decided."""
    first = judged(calibrated, default_texts())
    _, narrow = first.quality["kl_mean_ci95"]
    _, wide = first.quality["decided_on"]["kl_mean"]
    assert first.quality["decided_on"]["look"] == 1 and narrow < wide
    second = judged(calibrated, default_texts(), max_kl=(narrow + wide) / 2)
    assert second.quality["decided_on"]["look"] > 1 and second.windows > first.windows


@pytest.mark.parametrize(
    ("limit", "check"),
    [
        ({"max_kl": 1e-4}, "quality.kl"),
        ({"min_top1": 1.0}, "quality.top1"),
        ({"max_ppl_ratio": 0.5}, "quality.ppl_ratio"),
    ],
)
def test_a_limit_that_is_not_kept(limit: dict[str, float], check: str, calibrated: Sound) -> None:
    report = judged(calibrated, default_texts(), **limit)
    assert [c.name for c in report.checks if c.verdict == "fail"] == [check]


def test_tied_tokens_are_no_coin(calibrated: Sound, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact takes the other of two tokens whose logits are equal in the reference, at every position."""
    compare = metrics.compare

    def compare_with_ties(reference: Any, candidate: Any, targets: Any) -> metrics.Positions:
        best = reference.argmax(-1, keepdim=True)
        other = (best + 1) % reference.shape[-1]
        top = reference.gather(1, best)
        tied = reference.scatter(1, other, top)
        return compare(tied, tied.scatter(1, other, top + 1e-6), targets)

    monkeypatch.setattr(metrics, "compare", compare_with_ties)
    report = judged(calibrated, default_texts(), min_top1=0.999)
    assert report.quality["top1_agreement"] == 1.0
    assert [c.verdict for c in report.checks if c.name == "quality.top1"] == ["pass"]
