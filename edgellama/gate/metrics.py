"""Metrics of two logit streams over the same tokens, with intervals clustered by window.

KL is D(reference || candidate) in nats per token. Tokens of one window depend on each other. Measured block
errors are 1.1 to 2.3 times those that assume independent tokens. Windows are spread over each text, so the
difference between texts is no part of the error: it is estimated within each text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from edgellama.gate.limits import ERROR, SAME_LOGIT
from edgellama.host.threads import side_by_side
from edgellama.model.layerwise import Float
from edgellama.report.metrics import perplexity

_VALUES = 1 << 17  # logits that a work item compares: in float64 they stay in the processor's cache
LEAST_STRATUM = 4  # windows; the spread of fewer is known too badly to stand alone


@dataclass(frozen=True)
class Estimate:
    """A mean with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def clipped(self, least: float, most: float = math.inf) -> Estimate:
        """The estimate with its bounds limited to [least, most]. The mean is unchanged."""
        return Estimate(self.mean, max(least, self.low), min(most, self.high))

    def fields(self, name: str) -> dict[str, Any]:
        """JSON fields of a report: `name` and `name_ci95`.

        >>> Estimate(0.5, 0.25, 0.75).fields("kl_mean")
        {'kl_mean': 0.5, 'kl_mean_ci95': [0.25, 0.75]}
        """
        return {name: self.mean, f"{name}_ci95": [self.low, self.high]}


@dataclass(frozen=True)
class Positions:
    """Metrics of each position of one window, all float64 [T].

    Attributes:
        kl: KL, nats.
        top1: 1 if the top tokens agree, else 0. Of tokens with equal logits any is the top token.
        nll_reference, nll_candidate: negative log-likelihood of the true next token, nats. Empty where there is
            none, because the logits are those of labels.
        gap: lead of the reference's best token over its second, nats.
    """

    kl: Float
    top1: Float
    nll_reference: Float
    nll_candidate: Float
    gap: Float

    @property
    def dp(self) -> Float:
        """Change of the true token's probability."""
        change: Float = np.exp(-self.nll_candidate) - np.exp(-self.nll_reference)
        return change


def compare(reference: Tensor, candidate: Tensor, targets: Sequence[int] | None) -> Positions:
    """Metrics of one window.

    reference, candidate: logits float32 [T, output_size].
    targets: the T tokens that came next; None for logits of labels, which predict no token.
    """
    no_token = torch.empty(0, 1, dtype=torch.int64)
    next_tokens = no_token if targets is None else torch.tensor(list(targets))[:, None]

    def compared(start: int) -> tuple[Tensor, ...]:
        rows = slice(start, start + count)
        r = reference[rows].double().log_softmax(-1)
        c = candidate[rows].double().log_softmax(-1)
        token = next_tokens[rows]
        kl = (r.exp() * (r - c)).sum(-1).clamp_min(0)
        top1 = (_best(r) & _best(c)).any(-1).double()
        best = r.topk(2).values
        gap = best[:, 0] - best[:, 1]
        return kl, top1, -r.gather(1, token)[:, 0], -c.gather(1, token)[:, 0], gap

    count = max(2, _VALUES // reference.shape[-1])
    parts = side_by_side(compared, range(0, len(reference), count))
    return Positions(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))


def _best(logits: Tensor) -> Tensor:
    """Tokens that may be the best of their row: bool [T, vocab_size]. Rounding alone orders them."""
    return logits >= logits.amax(-1, keepdim=True) - SAME_LOGIT


def kl_divergence(reference: Tensor, candidate: Tensor) -> Float:
    """KL D(reference || candidate) of each row, nats: logits float32 [T, vocab_size] -> float64 [T]."""
    return compare(reference, candidate, None).kl


@np.errstate(invalid="ignore")  # infinite figures give NaN ones, which fail every limit
def summarize(windows: Sequence[Positions], strata: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures of the section `quality` of a report, over all windows.

    strata: the text of each window; None for a single text.
    """
    kl = np.concatenate([w.kl for w in windows])
    fields: dict[str, Any] = {}
    for name, estimate in means(windows, strata).items():
        fields |= estimate.fields(name)
    return {
        **fields,
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_p999": float(np.quantile(kl, 0.999)),
        "kl_max": float(kl.max()),
        **_of_next_tokens(windows),
    }


def _of_next_tokens(windows: Sequence[Positions]) -> dict[str, float]:
    """Perplexities, and the change of the true token's probability; none for logits of labels."""
    reference = np.concatenate([w.nll_reference for w in windows])
    candidate = np.concatenate([w.nll_candidate for w in windows])
    if not len(reference):
        return {}
    dp = np.concatenate([w.dp for w in windows])
    return {
        "ppl_reference": perplexity(float(reference.mean())),
        "ppl_artifact": perplexity(float(candidate.mean())),
        "rms_dp": float(np.sqrt((dp**2).mean())),
    }


@np.errstate(invalid="ignore")  # two infinite losses give a NaN difference
def means(
    windows: Sequence[Positions], strata: Sequence[str] | None = None, *, error: float = ERROR
) -> dict[str, Estimate]:
    """The means that limits of quality judge, by the name of their figure.

    error: probability that the true mean lies above the interval, and that it lies below.
    """
    change = [w.nll_candidate - w.nll_reference for w in windows]
    compared = _kl_and_top1(windows, strata, error=error)
    if not sum(map(len, change)):
        return compared
    return {**compared, "ln_ppl_ratio": clustered_mean(change, strata, error=error)}


def kl_and_top1(
    windows: Sequence[Positions], strata: Sequence[str] | None = None, *, positions: slice = slice(None)
) -> dict[str, Any]:
    """Fields `kl_mean` and `top1_agreement` with their intervals, over the given positions of each window."""
    fields: dict[str, Any] = {}
    for name, estimate in _kl_and_top1(windows, strata, positions=positions).items():
        fields |= estimate.fields(name)
    return fields


def _kl_and_top1(
    windows: Sequence[Positions],
    strata: Sequence[str] | None,
    *,
    positions: slice = slice(None),
    error: float = ERROR,
) -> dict[str, Estimate]:
    kl = clustered_mean([w.kl[positions] for w in windows], strata, error=error)
    top1 = clustered_mean([w.top1[positions] for w in windows], strata, error=error)
    return {"kl_mean": kl.clipped(0.0), "top1_agreement": top1.clipped(0.0, 1.0)}


@np.errstate(invalid="ignore")  # an infinite mean gives a NaN interval
def clustered_mean(
    clusters: Sequence[Float], strata: Sequence[str] | None = None, *, error: float = ERROR
) -> Estimate:
    """Mean over all values with its interval, of 95 % unless `error` says otherwise.

    Values of one cluster may depend on each other. Clusters of one stratum are drawn from one text: the
    difference between strata does not widen the interval. Each stratum has the share of its values. Sandwich
    estimator within each stratum, with Student's t for Satterthwaite's degrees of freedom. A single cluster
    has no spread, so its interval is infinite.

    strata: name of each cluster's stratum; None for one stratum.

    >>> clustered_mean([np.array([1.0, 3.0]), np.array([2.0, 2.0])])
    Estimate(mean=2.0, low=2.0, high=2.0)
    """
    values = np.concatenate(clusters)
    mean = float(values.mean())
    if len(clusters) < 2:
        return Estimate(mean, -math.inf, math.inf)
    variances, degrees = [], []
    for group in _strata(clusters, strata):
        count, center = len(group), float(np.concatenate(group).mean())
        sums = np.array([(cluster - center).sum() for cluster in group])
        variances.append(count / (count - 1) * float((sums**2).sum()) / len(values) ** 2)
        degrees.append(count - 1)
    variance = math.fsum(variances)
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = 1 / math.fsum((v / variance) ** 2 / n for v, n in zip(variances, degrees, strict=True))
    margin = student_t(freedom, error) * math.sqrt(variance)
    return Estimate(mean, mean - margin, mean + margin)


def _strata(clusters: Sequence[Float], strata: Sequence[str] | None) -> list[list[Float]]:
    """Clusters by stratum. Those of small strata make one together, of two clusters at least."""
    by_name: dict[str, list[Float]] = {}
    for name, cluster in zip(strata or [""] * len(clusters), clusters, strict=True):
        by_name.setdefault(name, []).append(cluster)
    groups = sorted(by_name.values(), key=len)
    small = [cluster for group in groups if len(group) < LEAST_STRATUM for cluster in group]
    large = [group for group in groups if len(group) >= LEAST_STRATUM]
    if len(small) == 1:
        return [small + large[0], *large[1:]]
    return [small, *large] if small else large


def student_t(degrees: float, error: float = ERROR) -> float:
    """Student's t that is exceeded with probability `error`.

    >>> round(student_t(3), 3)
    3.182
    """
    return float(special.stdtrit(degrees, 1 - error))


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Number of equal leading tokens or characters."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
