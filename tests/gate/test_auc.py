"""AUC and its paired interval, against counting of pairs and against the covariance of DeLong as published."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgellama.gate.auc import area_and_influence, auc_difference
from edgellama.model.labels import Floats

NORMAL = 1.959963984540054  # quantile of 97.5 %


def by_pairs(ones: Floats, others: Floats) -> Floats:
    """1, 0.5 or 0 for each pair: float64 [ones, others]."""
    wins: Floats = (ones[:, None] > others) + 0.5 * (ones[:, None] == others)
    return wins


def two_classes(scores: Floats) -> Floats:
    """Scores of two labels whose second has log-odds `scores`."""
    return np.stack([np.zeros(len(scores)), scores], 1)


def test_the_area_is_the_share_of_pairs_with_ties_as_halves() -> None:
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 6, 40).astype(float), generator.random(40) < 0.3
    area, influence = area_and_influence(scores, positive)
    assert area == pytest.approx(by_pairs(scores[positive], scores[~positive]).mean())
    assert influence.sum() == pytest.approx(0) and area_and_influence(-scores, positive)[0] == pytest.approx(
        1 - area
    )


def test_the_interval_is_that_of_delong() -> None:
    """Variances and covariances of the components of positives and negatives, as in the paper."""
    generator = np.random.default_rng(1)
    truth = (generator.random(90) < 0.4).astype(np.int64)
    before = truth + generator.normal(size=90)
    after = before + 0.6 * generator.normal(size=90)
    components = [by_pairs(x[truth == 1], x[truth == 0]) for x in (before, after)]
    variance = 0.0
    for axis in (1, 0):
        means = np.stack([c.mean(axis) for c in components])
        covariance = np.cov(means) / means.shape[1]
        variance += covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    one, other, change = auc_difference(truth, two_classes(before), two_classes(after), 1.3)
    expected = [c.mean() for c in components]
    assert (one, other) == pytest.approx(expected)
    # Both labels are scored, and their areas are equal because their scores are opposite.
    assert change.mean == pytest.approx(expected[1] - expected[0])
    assert change.high - change.low == pytest.approx(2 * NORMAL * math.sqrt(variance))


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    """Three labels, a worse artifact, 400 draws of 90 texts."""
    generator, inside, differences = np.random.default_rng(2), 0, []
    draws = []
    for _ in range(400):
        truth = generator.integers(0, 3, 90)
        before = 1.2 * np.eye(3)[truth] + generator.normal(size=(90, 3))
        after = before + 0.8 * generator.normal(size=(90, 3))
        _, _, change = auc_difference(truth, before, after, 1.0)
        draws.append(change)
        differences.append(change.mean)
    true = float(np.mean(differences))
    inside = sum(change.low <= true <= change.high for change in draws)
    assert true < -0.03 and 0.92 <= inside / 400 <= 0.98


def test_texts_of_one_label_have_no_area() -> None:
    one, other, change = auc_difference(np.zeros(5, np.int64), np.zeros((5, 2)), np.zeros((5, 2)), 1.0)
    assert math.isnan(one) and math.isnan(other) and (change.low, change.high) == (-1.0, 1.0)
