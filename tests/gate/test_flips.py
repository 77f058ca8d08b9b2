"""Figures of paired answers, calibration of answers, and the checks on labelled texts, all without a model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgellama.errors import UsageError
from edgellama.gate import flips
from edgellama.gate.answer_calibration import best_temperature, calibrated, threshold_for
from edgellama.gate.flips import Answers, bootstrap, mcnemar, paired_difference, rate, summarize
from edgellama.gate.labelled import LabelLimits, judged
from edgellama.model.labels import Classifier, Floats, Label, log_probabilities
from edgellama.report import Check
from edgellama.text.labelled import LabelledText, LabelledTexts

NAMES = ("safe", "unsafe")


def scores_of(answers: list[int], margin: float = 2.0) -> Floats:
    """Scores of two labels whose best is the answer."""
    return margin * np.eye(2)[answers]


def answers_of(truth: list[int], reference: list[int], artifact: list[int]) -> Answers:
    return Answers(np.array(truth), scores_of(reference), scores_of(artifact))


def texts_of(truth: list[int], groups: list[str]) -> LabelledTexts:
    rows = (
        LabelledText(f"text {n}", NAMES[t], g) for n, (t, g) in enumerate(zip(truth, groups, strict=True))
    )
    return LabelledTexts("texts.jsonl", tuple(rows))


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_exact_intervals() -> None:
    """Published values: Clopper and Pearson for 10 of 100, and the rule of three."""
    ten = rate(10, 100)
    assert (round(ten.low, 4), round(ten.high, 4)) == (0.0490, 0.1762)
    assert rate(0, 300).high == pytest.approx(3.69 / 300, rel=0.01)
    assert rate(5, 5).high == 1.0


def test_paired_intervals_are_those_of_newcombe() -> None:
    """Example of Newcombe (1998), table II: 36 both, 12 gained, 2 lost, 0 neither: +0.2 from 0.0569 to 0.3404."""
    after = np.array([True] * 48 + [False] * 2)
    before = np.array([True] * 36 + [False] * 12 + [True] * 2)
    difference = paired_difference(after, before)
    assert difference.mean == pytest.approx(0.2)
    assert (difference.low, difference.high) == pytest.approx((0.0569, 0.3404), abs=2e-4)


def test_mcnemar_sums_the_tail_of_a_fair_coin() -> None:
    tail = sum(math.comb(9, k) for k in range(7, 10)) / 2**9
    assert mcnemar(7, 2) == pytest.approx(tail)
    assert mcnemar(2, 7) > 0.9


def test_f1_and_calibration_error_by_hand() -> None:
    truth = np.array([0, 0, 0, 1])
    figures = summarize(answers_of(truth.tolist(), [0, 0, 0, 1], [0, 0, 1, 1]), NAMES)
    assert figures["f1_reference"] == 1.0
    assert figures["f1_artifact"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    confidence = math.exp(2) / (math.exp(2) + 1)
    assert figures["ece_reference"] == pytest.approx(1 - confidence)
    assert figures["ece_artifact"] == pytest.approx(abs(0.75 - confidence))
    assert figures["confusion"]["artifact"] == [[2, 1], [0, 1]]
    assert figures["fpr"]["unsafe"]["artifact"] == pytest.approx(1 / 3)
    assert (figures["lost"], figures["won"], figures["flips"]) == (1, 0, 0.25)


def test_the_bootstrap_is_paired_and_repeatable() -> None:
    rows = np.random.default_rng(3).random((200, 1))

    def mean(sums: Floats) -> Floats:
        return sums[..., 0] / 200

    one = bootstrap(rows, rows + 0.5, mean)
    assert one == bootstrap(rows, rows + 0.5, mean)
    assert (one.low, one.high) == pytest.approx((0.5, 0.5))
    noisy = bootstrap(rows, rows[::-1], mean)
    expected = 2 * float((rows - rows[::-1]).std()) / math.sqrt(200)
    assert noisy.high - noisy.low == pytest.approx(2 * expected, rel=0.15)
    assert flips.RESAMPLES % flips.DRAWN_AT_ONCE == 0


def test_a_group_that_got_worse_behind_a_better_average_fails() -> None:
    """English gains 30 answers of 300 and German loses 12 of 60: the average rises."""
    truth = [0] * 360
    groups = ["en"] * 300 + ["de"] * 60
    reference = [1] * 60 + [0] * 300
    artifact = [1] * 30 + [0] * 270 + [0] * 48 + [1] * 12
    section = judged(
        answers_of(truth, reference, artifact), texts_of(truth, groups), NAMES, None, LabelLimits(0.2, 0.1)
    )
    figures, checks = section.fields["labelled"], by_name(section.checks)
    assert figures["accuracy_artifact"] > figures["accuracy_reference"]
    assert checks["data.accuracy"].verdict == "pass"
    assert checks["data.accuracy_worst_group"].verdict == "fail"
    assert checks["data.accuracy_worst_group"].detail.startswith("de of 2 groups")
    assert checks["data.fpr_increase"].verdict == "pass"
    assert checks["data.fpr_increase_worst_group"].verdict == "inconclusive"
    assert checks["data.flips"].verdict == "pass"
    assert checks["data.flips_worst_group"].verdict == "inconclusive"
    without = judged(
        answers_of(truth, reference, artifact), texts_of(truth, ["all"] * 360), NAMES, None, LabelLimits()
    )
    assert [(c.name, c.verdict) for c in without.checks] == [("data.accuracy", "pass")]


def test_few_texts_do_not_prove_a_limit() -> None:
    truth = [0, 1] * 5
    checks = by_name(
        judged(
            answers_of(truth, truth, truth), texts_of(truth, ["a"] * 10), NAMES, None, LabelLimits(0.1, 0.1)
        ).checks
    )
    assert checks["data.flips"].value == 0.0
    assert {checks["data.flips"].verdict, checks["data.fpr_increase"].verdict} == {"inconclusive"}


def test_temperature_undoes_a_scale() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 3)) * 2
    uniform = generator.random((20_000, 1))
    truth = (np.exp(log_probabilities(logits)).cumsum(-1) < uniform).sum(-1)
    assert best_temperature(logits * 2.5, truth) == pytest.approx(2.5, rel=0.05)


def test_a_threshold_keeps_its_rate_and_is_the_least_that_does() -> None:
    negatives = np.linspace(0, 1, 201)
    threshold = threshold_for(negatives, 0.05)
    assert (negatives >= threshold).mean() <= 0.05 < (negatives >= threshold - 0.006).mean()
    assert (np.full(40, 0.7) >= threshold_for(np.full(40, 0.7), 0.1)).sum() == 0
    with pytest.raises(UsageError, match="needs 100 texts"):
        threshold_for(negatives[:99], 0.01)


def test_more_false_positives_than_stated_fail() -> None:
    """A threshold that was chosen on easier texts."""
    generator = np.random.default_rng(1)
    easy = np.stack([np.zeros(400), generator.normal(-4, 1, 400)], -1)
    truth = np.array([0] * 399 + [1])
    calibration = calibrated(
        easy, truth, names=NAMES, positive="unsafe", fpr=0.05, artifact_sha256="a" * 64, data_sha256="b" * 64
    )
    assert calibration.threshold is not None and calibration.threshold.measured_fpr <= 0.05
    rows = texts_of(truth.tolist(), ["a"] * 400)
    for shift, verdict in ((0.0, "pass"), (1.5, "fail")):
        scores = easy + np.array([0.0, shift])
        answers = Answers(truth, scores, scores, calibration.temperature)
        checks = by_name(judged(answers, rows, NAMES, calibration, LabelLimits()).checks)
        assert checks["data.threshold_fpr"].verdict == verdict


def test_texts_of_one_label_are_joined() -> None:
    classifier = Classifier("tokens", (Label("a", ("x", "y"), (1, 2)), Label("b", ("z",), (3,))), "{text}")
    scores = classifier.scores(np.array([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]]))
    assert scores[:, 0] == pytest.approx(np.log(np.exp([0.0, 5.0]) + np.exp([1.0, 1.0])))
    assert scores[:, 1].tolist() == [2.0, 0.0]
    assert Classifier.from_dict(classifier.to_dict()) == classifier
