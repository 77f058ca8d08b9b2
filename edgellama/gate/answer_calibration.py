"""Calibration of an artifact's answers on labelled texts that the gate does not judge.

A temperature divides the scores, such that the labels have the least negative log-likelihood (Guo et al. 2017). A
threshold then keeps a stated share of false positives. Both are computed from the answers of the artifact itself:
rounding moves scores, and numbers of the full-precision model would be those of another classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from edgellama.errors import UsageError
from edgellama.gate.flips import Ints
from edgellama.model.labels import Calibrated, Floats, Threshold, log_probabilities

# Bounds of the temperature. Texts that are all right would have the least loss at 0.
COLDEST, HOTTEST = 0.1, 10.0


def calibrated(
    scores: Floats,
    truth: Ints,
    *,
    names: Sequence[str],
    positive: str | None,
    fpr: float | None,
    artifact_sha256: str,
    data_sha256: str,
) -> Calibrated:
    """The calibration of an artifact.

    Args:
        scores: its scores of the labels, float64 [N, L].
        truth: number of the true label of each text.
        names: of the labels.
        positive: label of the threshold; None for no threshold.
        fpr: the stated share of false positives, in (0, 1).
        artifact_sha256: hash of the artifact.
        data_sha256: hash of the labelled texts.

    Raises UsageError if there are too few texts for the stated share.
    """
    temperature = best_temperature(scores, truth)
    threshold = None
    if positive is not None and fpr is not None:
        probabilities = np.exp(log_probabilities(scores, temperature))[:, list(names).index(positive)]
        negatives = probabilities[truth != list(names).index(positive)]
        value = threshold_for(negatives, fpr)
        threshold = Threshold(positive, value, fpr, float((negatives >= value).mean()))
    return Calibrated(
        artifact_sha256,
        data_sha256,
        len(truth),
        temperature,
        negative_log_likelihood(scores, truth, 1.0),
        negative_log_likelihood(scores, truth, temperature),
        threshold,
    )


def recomputed(recorded: Calibrated, scores: Floats, truth: Ints, names: Sequence[str]) -> Calibrated:
    """The calibration that the artifact's scores give for the label and the rate of a recorded threshold.

    recorded: as a manifest has it. scores, truth, names: as for `calibrated`.
    """
    threshold = recorded.threshold
    return calibrated(
        scores,
        truth,
        names=names,
        positive=None if threshold is None else threshold.label,
        fpr=None if threshold is None else threshold.stated_fpr,
        artifact_sha256=recorded.artifact_sha256,
        data_sha256=recorded.data_sha256,
    )


def deviations(recorded: Calibrated, computed: Calibrated) -> dict[str, float]:
    """Distances of recorded figures from computed ones, by name: relative for a temperature, else absolute."""
    found = {
        "temperature": abs(recorded.temperature / computed.temperature - 1),
        "nll_before": abs(recorded.nll_before - computed.nll_before),
        "nll_after": abs(recorded.nll_after - computed.nll_after),
    }
    if recorded.threshold is not None and computed.threshold is not None:
        one, other = recorded.threshold, computed.threshold
        found["threshold.probability"] = abs(one.probability - other.probability)
        found["threshold.measured_fpr"] = abs(one.measured_fpr - other.measured_fpr)
    return found


def negative_log_likelihood(scores: Floats, truth: Ints, temperature: float) -> float:
    """Mean negative log-likelihood of the true labels, nats a text."""
    logs = log_probabilities(scores, temperature)
    return float(-logs[np.arange(len(truth)), truth].mean())


def best_temperature(scores: Floats, truth: Ints) -> float:
    """The temperature of the least negative log-likelihood, within COLDEST and HOTTEST."""
    found = minimize_scalar(
        lambda log: negative_log_likelihood(scores, truth, math.exp(log)),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(math.exp(found.x))


def threshold_for(negatives: Floats, fpr: float) -> float:
    """Least probability that at most a share `fpr` of the negatives reaches.

    It lies halfway between the probabilities of two texts. Raises UsageError for fewer than 1 / fpr texts.

    >>> threshold_for(np.array([0.1, 0.2, 0.3, 0.9]), 0.25)
    0.6
    """
    least = math.ceil(1 / fpr)
    if len(negatives) < least:
        raise UsageError(
            f"a false-positive rate of {fpr:g} needs {least} texts of other labels at least, and there are {len(negatives)}",
            remedy="Give more texts for the calibration, or state a larger rate.",
        )
    ordered = np.sort(negatives)[::-1]
    allowed = math.floor(fpr * len(ordered) * (1 + 1e-12))
    excluded = float(ordered[allowed])
    larger = ordered[ordered > excluded]
    return (excluded + (float(larger.min()) if len(larger) else 1.0)) / 2
