"""Area under the ROC curve of a classifier, and its paired difference between two classifiers.

The AUC of a label is the share of pairs of a text of it and another text that the label's probability orders right
(Mann and Whitney 1947; ties count half). Of several labels it is the mean, each against the rest. The interval of a
difference follows DeLong et al. (1988): the pairs that each text is in give its influence, and texts are independent.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from edgellama.gate.limits import ERROR
from edgellama.gate.metrics import Estimate
from edgellama.model.labels import Floats, log_probabilities

Ints = npt.NDArray[np.int64]


def auc_difference(
    truth: Ints, reference: Floats, artifact: Floats, temperature: float, error: float = ERROR
) -> tuple[float, float, Estimate]:
    """(AUC of the reference, AUC of the artifact, their difference with its interval).

    Args:
        truth: number of the true label of each text, int64 [N].
        reference, artifact: scores of the labels, float64 [N, L].
        temperature: both scores are divided by it.
        error: probability that the true difference lies above the interval, and that it lies below.

    All are NaN, and the interval is that of every difference, if no label has both texts of it and others.
    """
    labels = [
        label for label in range(reference.shape[1]) if 1 < int((truth == label).sum()) < len(truth) - 1
    ]
    if not labels:
        return math.nan, math.nan, Estimate(math.nan, -1.0, 1.0)
    areas, influences = [], []
    for scores in (reference, artifact):
        logs = log_probabilities(scores, temperature)
        found = [area_and_influence(logs[:, label], truth == label) for label in labels]
        areas.append(float(np.mean([area for area, _ in found])))
        influences.append(np.mean([influence for _, influence in found], axis=0))
    spread = math.sqrt(float(np.square(influences[1] - influences[0]).sum()))
    mean, margin = areas[1] - areas[0], float(special.ndtri(1 - error)) * spread
    return areas[0], areas[1], Estimate(mean, mean - margin, mean + margin)


def area_and_influence(scores: Floats, positive: npt.NDArray[np.bool_]) -> tuple[float, Floats]:
    """(AUC, influence of each text on it: float64 [N]). The squares of the influences add up to the variance.

    scores: float64 [N], larger for the positive texts. positive: bool [N], at least two of each kind.

    >>> area_and_influence(np.array([0.9, 0.4, 0.6, 0.1]), np.array([True, True, False, False]))[0]
    0.75
    """
    ones, others = scores[positive], scores[~positive]
    counts = len(ones), len(others)
    ranks = stats.rankdata(np.concatenate([ones, others]))
    # Share of the other kind that each text beats: its rank among all, less that among its own kind.
    beaten = (ranks[: counts[0]] - stats.rankdata(ones)) / counts[1]
    beating = 1 - (ranks[counts[0] :] - stats.rankdata(others)) / counts[0]
    area = float(beaten.mean())
    influence = np.empty(len(scores))
    for kind, shares in ((positive, beaten), (~positive, beating)):
        influence[kind] = (shares - area) / math.sqrt(len(shares) * (len(shares) - 1))
    return area, influence
