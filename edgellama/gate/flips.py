"""Answers of two classifiers on the same labelled texts: flips, accuracy, F1, AUC, false positives, calibration error.

Both read the same texts, so differences are paired. Rates have exact intervals (Clopper and Pearson 1934), and
differences of paired rates those of Newcombe (1998, method 10). Differences of F1 and of the expected calibration error
come from a paired bootstrap with a fixed seed. Texts count as independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from edgellama.gate.auc import auc_difference
from edgellama.gate.limits import ERROR
from edgellama.gate.metrics import Estimate
from edgellama.model.labels import Floats, log_probabilities

Ints = npt.NDArray[np.int64]
BINS = 15  # of the expected calibration error, of equal width (Guo et al. 2017)
RESAMPLES, DRAWN_AT_ONCE, SEED = 1000, 50, 0


@dataclass(frozen=True)
class Answers:
    """Answers of the full-precision model and of an artifact on N labelled texts.

    Attributes:
        truth: number of the true label of each text, int64 [N].
        reference, artifact: scores of the labels, float64 [N, L].
        temperature: the artifact's, which both scores are divided by.
    """

    truth: Ints
    reference: Floats
    artifact: Floats
    temperature: float = 1.0

    def of(self, rows: npt.NDArray[Any]) -> Answers:
        """The answers on some of the texts."""
        return Answers(self.truth[rows], self.reference[rows], self.artifact[rows], self.temperature)

    def __len__(self) -> int:
        return len(self.truth)


def rate(count: int, total: int, error: float = ERROR) -> Estimate:
    """A share with its exact interval. Nothing is known without texts.

    error: probability that the true share lies above the interval, and that it lies below.

    >>> estimate = rate(0, 100)
    >>> estimate.mean, estimate.low, round(estimate.high, 4)
    (0.0, 0.0, 0.0362)
    """
    if not total:
        return Estimate(math.nan, 0.0, 1.0)
    low = 0.0 if count == 0 else float(special.betaincinv(count, total - count + 1, error))
    high = 1.0 if count == total else float(special.betaincinv(count + 1, total - count, 1 - error))
    return Estimate(count / total, low, high)


def paired_difference(
    after: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_], error: float = ERROR
) -> Estimate:
    """Difference of two shares of the same texts, `after` minus `before`, with its interval.

    >>> same = np.array([True] * 9 + [False])
    >>> paired_difference(same, same).mean
    0.0
    """
    total = len(after)
    if not total:
        return Estimate(math.nan, -1.0, 1.0)
    both, gained = int((after & before).sum()), int((after & ~before).sum())
    lost = int((~after & before).sum())
    neither = total - both - gained - lost
    (p1, low1, high1), (p2, low2, high2) = (_wilson(both + x, total, error) for x in (gained, lost))
    product = both * neither - gained * lost
    scale = math.sqrt((both + gained) * (lost + neither) * (both + lost) * (gained + neither))
    correlation = (max(product - total / 2, 0) if product > 0 else product) / scale if scale else 0.0

    def width(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    mean = p1 - p2
    return Estimate(mean, mean - width(p1 - low1, high2 - p2), mean + width(high1 - p1, p2 - low2))


def _wilson(count: int, total: int, error: float) -> tuple[float, float, float]:
    """A share with the ends of its score interval (Wilson 1927)."""
    z, p = float(special.ndtri(1 - error)), count / total
    middle, margin = p + z**2 / (2 * total), z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return p, max((middle - margin) / scale, 0.0), min((middle + margin) / scale, 1.0)


def mcnemar(lost: int, won: int) -> float:
    """Probability of so many lost answers or more, among those that changed, if losing were as likely as winning.

    The exact one-sided test of McNemar (1947).

    >>> mcnemar(0, 0), mcnemar(8, 0)
    (1.0, 0.00390625)
    """
    changed = lost + won
    return 1.0 if lost == 0 else float(special.bdtrc(lost - 1, changed, 0.5))


def confusion(truth: Ints, answers: Ints, labels: int) -> Ints:
    """Number of texts by true label and answer, int64 [labels, labels]."""
    counts: Ints = np.bincount(truth * labels + answers, minlength=labels**2).reshape(labels, labels)
    return counts


def macro_f1(counts: npt.NDArray[Any]) -> Floats:
    """Mean F1 over the labels that occur as truth or answer: counts [..., L, L] -> float64 [...]."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    total = counts.sum(-2) + counts.sum(-1)
    f1 = 2 * hits / np.maximum(total, 1)
    means: Floats = f1.sum(-1) / np.maximum((total > 0).sum(-1), 1)
    return means


def one_hot(values: Ints, count: int) -> Floats:
    """float64 [N, count]: 1 at the value of each row, else 0."""
    return np.eye(count)[values]


def _binned(truth: Ints, scores: Floats, temperature: float) -> tuple[Floats, npt.NDArray[np.bool_], Ints]:
    """Confidence, correctness and bin of confidence of each text, each [N]."""
    logs = log_probabilities(scores, temperature)
    confidence = np.exp(logs.max(-1))
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return confidence, logs.argmax(-1) == truth, bins


def confidence_gaps(truth: Ints, scores: Floats, temperature: float) -> Floats:
    """Confidence minus correctness of each text, in the column of its bin of confidence: float64 [N, BINS]."""
    confidence, right, bins = _binned(truth, scores, temperature)
    gaps: Floats = one_hot(bins, BINS) * (confidence - right)[:, None]
    return gaps


def reliability(truth: Ints, scores: Floats, temperature: float) -> list[dict[str, Any]]:
    """Number, mean confidence and accuracy of the texts in each bin of confidence that has some, as JSON data."""
    confidence, right, bins = _binned(truth, scores, temperature)
    return [
        {
            "texts": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(right[bins == number].mean()),
        }
        for number in sorted({*bins.tolist()})
    ]


def calibration_error(sums: Floats, total: int) -> Floats:
    """Expected calibration error of summed `confidence_gaps`: float64 [..., BINS] -> [...]."""
    errors: Floats = np.abs(sums).sum(-1) / total
    return errors


def false_positives(truth: Ints, answers: Ints, label: int) -> npt.NDArray[np.bool_]:
    """For each text of another label: whether it got `label`."""
    wrong: npt.NDArray[np.bool_] = answers[truth != label] == label
    return wrong


def bootstrap(before: Floats, after: Floats, figure: Callable[[Floats], Floats]) -> Estimate:
    """Difference of a figure, after minus before, with the interval of a paired bootstrap.

    Args:
        before, after: rows of the same texts, float64 [N, columns].
        figure: of sums over texts, float64 [..., columns] -> [...].
    """
    generator, size = np.random.default_rng(SEED), len(before)
    samples = []
    for _ in range(0, RESAMPLES, DRAWN_AT_ONCE):
        times = generator.multinomial(size, np.full(size, 1 / size), DRAWN_AT_ONCE).astype(np.float64)
        samples.append(figure(times @ after) - figure(times @ before))
    low, high = np.quantile(np.concatenate(samples), [ERROR, 1 - ERROR])
    mean = float(figure(after.sum(0)) - figure(before.sum(0)))
    return Estimate(mean, float(low), float(high))


def summarize(answers: Answers, names: tuple[str, ...]) -> dict[str, Any]:
    """Figures of both models on the same texts, with the differences and their intervals, as JSON data."""
    truth, labels = answers.truth, len(names)
    before, after = answers.reference.argmax(-1), answers.artifact.argmax(-1)
    right_before, right_after = before == truth, after == truth
    lost, won = int((right_before & ~right_after).sum()), int((~right_before & right_after).sum())
    counts = {"reference": confusion(truth, before, labels), "artifact": confusion(truth, after, labels)}

    cells = [one_hot(truth * labels + given, labels**2) for given in (before, after)]
    gaps = [confidence_gaps(truth, x, answers.temperature) for x in (answers.reference, answers.artifact)]

    def f1(sums: Floats) -> Floats:
        return macro_f1(sums.reshape(*sums.shape[:-1], labels, labels))

    def ece(sums: Floats) -> Floats:
        return calibration_error(sums, len(answers))

    areas = auc_difference(truth, answers.reference, answers.artifact, answers.temperature)
    pairs = {
        "accuracy": paired_difference(right_after, right_before),
        "f1": bootstrap(cells[0], cells[1], f1),
        "ece": bootstrap(gaps[0], gaps[1], ece),
        "auc": areas[2],
    }
    own = {
        "accuracy": [float(right.mean()) for right in (right_before, right_after)],
        "f1": [float(f1(x.sum(0))) for x in cells],
        "ece": [float(ece(x.sum(0))) for x in gaps],
        "auc": list(areas[:2]),
    }
    figures: dict[str, Any] = {
        "texts": len(answers),
        **rate(int((before == after).sum()), len(answers)).fields("agreement"),
        **rate(int((before != after).sum()), len(answers)).fields("flips"),
        "lost": lost,
        "won": won,
        "mcnemar_p": mcnemar(lost, won),
        "confusion": {name: matrix.tolist() for name, matrix in counts.items()},
        "reliability": {
            "reference": reliability(truth, answers.reference, answers.temperature),
            "artifact": reliability(truth, answers.artifact, answers.temperature),
        },
    }
    for name, difference in pairs.items():
        figures[f"{name}_reference"], figures[f"{name}_artifact"] = own[name]
        figures |= difference.fields(f"{name}_difference")
    figures["fpr"] = {
        name: _false_positive_rates(truth, before, after, number) for number, name in enumerate(names)
    }
    return figures


def _false_positive_rates(truth: Ints, before: Ints, after: Ints, label: int) -> dict[str, Any]:
    one, other = (false_positives(truth, answers, label) for answers in (before, after))
    total = len(one)
    return {
        "texts": total,
        "reference": rate(int(one.sum()), total).mean,
        "artifact": rate(int(other.sum()), total).mean,
        **paired_difference(other, one).fields("increase"),
    }
