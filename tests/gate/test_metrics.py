"""Tests of metrics against their formulas in float64, and of intervals against their nominal coverage."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgellama.files import to_json
from edgellama.gate.metrics import (
    Estimate,
    Positions,
    clustered_mean,
    common_prefix,
    compare,
    kl_divergence,
    means,
    student_t,
    summarize,
)
from edgellama.report import Check, Report, above, below, check

Float = npt.NDArray[np.float64]


def logits(seed: int, rows: int = 70, size: int = 300) -> torch.Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def softmax(x: Float) -> Float:
    e = np.exp(x - x.max(-1, keepdims=True))
    p: Float = e / e.sum(-1, keepdims=True)
    return p


def test_metrics_equal_the_formulas() -> None:
    reference, candidate = logits(0), logits(0) + 0.5 * logits(1)
    targets = [(17 * i) % 300 for i in range(70)]
    compared = compare(reference, candidate, targets)
    p, q = softmax(reference.double().numpy()), softmax(candidate.double().numpy())
    rows = np.arange(70)
    np.testing.assert_allclose(compared.kl, (p * np.log(p / q)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(compared.nll_reference, -np.log(p[rows, targets]), rtol=1e-12)
    np.testing.assert_allclose(compared.nll_candidate, -np.log(q[rows, targets]), rtol=1e-12)
    np.testing.assert_allclose(compared.dp, (q - p)[rows, targets], atol=1e-14)
    assert compared.top1.tolist() == (p.argmax(-1) == q.argmax(-1)).astype(float).tolist()
    assert 0 < compared.top1.mean() < 1
    # KL is directed: it weighs differences by the probabilities of the reference.
    assert not np.allclose(compared.kl, (q * np.log(q / p)).sum(-1), rtol=0.01)


def test_small_differences_are_not_lost() -> None:
    reference = logits(0).double()
    noise = logits(1).double() * 1e-6
    p, q = softmax(reference.numpy()), softmax((reference + noise).numpy())
    exact = (p * np.log1p((p - q) / q)).sum(-1)
    np.testing.assert_allclose(kl_divergence(reference, reference + noise), exact, rtol=1e-3, atol=1e-15)


def test_an_offset_of_logits_is_no_difference() -> None:
    compared = compare(logits(0), logits(0) + 100, [0] * 70)
    assert compared.kl.max() < 1e-9 and compared.top1.min() == 1
    assert kl_divergence(logits(0), logits(0)).tolist() == [0.0] * 70


def test_nan_logits_fail_every_limit() -> None:
    broken = logits(0)
    broken[3, 5] = math.nan
    kl = float(kl_divergence(logits(0), broken).mean())
    assert math.isnan(kl)
    assert below("quality.kl", kl, 100.0, interval=(kl, kl)).verdict == "fail"
    assert above("quality.top1", kl, 0.1, interval=(kl, kl)).verdict == "fail"


def test_of_equal_logits_any_is_the_best() -> None:
    """Rows of lm_head that are equal give equal logits, and rounding decides which of them comes first."""
    reference = torch.tensor([[1.0, 5.0, 5.0, 2.0]] * 6)
    candidate = torch.tensor(
        [
            [1.0, 5.0, 5.0 + 2e-6, 2.0],  # the other of the two
            [1.0, 5.0, 4.9, 2.0],
            [5.0, 5.0, 4.0, 2.0],  # tied as well, with one in common
            [5.1, 5.0, 5.0, 2.0],  # neither
            [5.0, 1.0, 1.0, 5.0],  # tied, none in common
            [math.nan, 5.0, 5.0, 2.0],
        ]
    )
    assert compare(reference, candidate, [0] * 6).top1.tolist() == [1, 1, 1, 0, 0, 0]
    assert compare(candidate, reference, [0] * 6).top1.tolist() == [1, 1, 1, 0, 0, 0]


def positions(kl: Float, nll: Float | None = None) -> Positions:
    zeros = np.zeros_like(kl) if nll is None else nll
    return Positions(kl, np.ones_like(kl), zeros + 1, zeros + 1.5, zeros + 1)


def test_the_summary_covers_all_positions() -> None:
    kl = [np.linspace(0, 1, 100), np.linspace(0, 3, 100)]
    summary = summarize([positions(k) for k in kl])
    all_kl = np.concatenate(kl)
    assert summary["kl_mean"] == pytest.approx(1.0)
    assert summary["kl_median"] == pytest.approx(np.median(all_kl))
    assert summary["kl_p99"] == pytest.approx(np.quantile(all_kl, 0.99))
    assert summary["kl_p999"] == pytest.approx(np.quantile(all_kl, 0.999))
    assert summary["kl_max"] == 3.0
    assert summary["ppl_reference"] == pytest.approx(math.e)
    assert summary["ppl_artifact"] == pytest.approx(math.exp(1.5))
    assert summary["ln_ppl_ratio"] == pytest.approx(0.5)
    assert summary["rms_dp"] == pytest.approx(math.exp(-1) - math.exp(-1.5))
    assert summary["top1_agreement_ci95"] == [1.0, 1.0]
    assert summary["kl_mean_ci95"][0] == 0.0, "an interval of KL does not reach below zero"


# Source of the table: https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (100, 1.984)],
)
def test_student_t_against_the_table(degrees: int, value: float) -> None:
    assert student_t(degrees) == pytest.approx(value, abs=5.1e-4)


def test_student_t_of_many_degrees_is_normal() -> None:
    assert student_t(10**6) == pytest.approx(1.959964, abs=1e-4)
    assert student_t(10**6, 0.0125) == pytest.approx(2.241403, abs=1e-4)


@pytest.mark.parametrize("clusters", [4, 16])
def test_intervals_of_clustered_values_have_their_nominal_coverage(clusters: int) -> None:
    """Tokens of a window share an offset. An interval for independent tokens would cover 40 %."""
    generator = np.random.default_rng(0)
    runs, covered, naive = 2000, 0, 0
    for _ in range(runs):
        windows = [
            generator.normal(generator.normal(5, 1), 1, size=size)
            for size in generator.integers(30, 60, size=clusters)
        ]
        estimate = clustered_mean(windows)
        mean, low, high = estimate.mean, estimate.low, estimate.high
        assert low < mean < high
        covered += low <= 5 <= high
        values = np.concatenate(windows)
        naive += abs(values.mean() - 5) <= 1.96 * values.std() / math.sqrt(len(values))
    assert covered / runs == pytest.approx(0.95, abs=0.025)
    assert naive / runs < 0.6


@pytest.mark.parametrize("sizes", [(2, 2), (4, 4), (8, 8), (12, 3), (9, 1), (1, 1, 1, 1)])
def test_strata_leave_the_difference_between_texts_out(sizes: tuple[int, ...]) -> None:
    """Windows of two texts whose means are far apart. Each text keeps its share, so only its own spread counts."""
    generator = np.random.default_rng(0)
    names = [str(text) for text, size in enumerate(sizes) for _ in range(size)]
    true = float(np.mean([4.0 * int(name) for name in names]))
    runs, covered, narrower = 2000, 0, 0
    for _ in range(runs):
        windows = [generator.normal(4.0 * int(name), 1, size=1).repeat(20) for name in names]
        estimate, pooled = clustered_mean(windows, names), clustered_mean(windows)
        covered += estimate.low <= true <= estimate.high
        narrower += estimate.high - estimate.low < pooled.high - pooled.low
    assert covered / runs > 0.935
    if min(sizes) >= 4:
        assert covered / runs < 0.975 and narrower > 0.99 * runs


def test_the_error_of_an_interval_is_chosen() -> None:
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(4000):
        estimate = clustered_mean([generator.normal(size=1) for _ in range(10)], error=0.1)
        missed += estimate.high < 0
    assert missed / 4000 == pytest.approx(0.1, abs=0.015)


def test_means_have_the_summarys_names() -> None:
    windows = [positions(np.linspace(0, 1, 8)), positions(np.linspace(0, 2, 8))]
    summary, wide = summarize(windows, ["a", "b"]), means(windows, ["a", "b"], error=0.01)
    assert wide.keys() == {"kl_mean", "top1_agreement", "ln_ppl_ratio"}
    low, high = summary["kl_mean_ci95"]
    assert wide["kl_mean"].low <= low < high < wide["kl_mean"].high


def test_intervals_of_independent_values_are_normal() -> None:
    values = np.random.default_rng(0).normal(size=4000)
    estimate = clustered_mean(np.split(values, 400))
    low, high = estimate.low, estimate.high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(4000), rel=0.1)


def test_the_interval_of_one_window_is_infinite() -> None:
    assert clustered_mean([np.array([1.0, 2.0])]) == Estimate(1.5, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.1, 0.2), "pass"), ((0.2, 0.3), "pass"), ((0.25, 0.35), "inconclusive"), ((0.31, 0.4), "fail")],
)
def test_three_way_verdicts(interval: tuple[float, float], verdict: str) -> None:
    mean = sum(interval) / 2
    assert below("q", mean, 0.3, interval=interval).verdict == verdict
    low, high = interval
    assert above("q", -mean, -0.3, interval=(-high, -low)).verdict == verdict


def test_without_an_interval_the_value_decides() -> None:
    assert [below("q", v, 0.3).verdict for v in (0.3, 0.30001)] == ["pass", "fail"]
    assert [above("q", v, 0.3).verdict for v in (0.3, 0.29999)] == ["pass", "fail"]


def report(*checks: Check, **sections: Any) -> Report:
    empty: dict[str, Any] = {"structure": {}, "parity": {}, "quality": {}, "domains": {}}
    return Report("xnnpack", "test", None, 0, 0, **{**empty, **sections}, checks=checks)


def test_the_worst_check_is_the_verdict() -> None:
    passed, failed, inconclusive = check("a", True), check("b", False), Check("c", "inconclusive")
    assert report(passed).verdict == "pass" and report(passed).passed
    undecided = report(passed, inconclusive)
    assert undecided.verdict == "inconclusive" and not undecided.passed
    assert report(inconclusive, failed, passed).verdict == "fail"


def test_nan_and_infinity_are_null_in_json() -> None:
    """JSON has no NaN or infinity, and readers outside Python refuse Python's spelling."""
    text = to_json({"interval": [0.0, math.inf], "value": math.nan, "fine": 1.5, "rows": [{"x": -math.inf}]})
    assert json.loads(text) == {"interval": [0.0, None], "value": None, "fine": 1.5, "rows": [{"x": None}]}
    assert "Infinity" not in text and "NaN" not in text


def test_the_text_of_a_report_names_every_check_and_its_limit() -> None:
    kl = summarize([positions(np.linspace(0, 0.2, 64)), positions(np.linspace(0, 0.4, 64))])
    text = report(
        below("quality.kl", 0.15, 0.1), check("structure.files", True), quality=kl, domains={"prose": kl}
    ).to_text()
    assert "FAIL quality.kl" in text and "limit 0.1000" in text
    assert "ok   structure.files" in text
    assert "prose: KL 0.1500" in text
    assert text.endswith("verdict: fail")


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([], [1], 0), ([1], [1, 2], 1)],
)
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(a, b) == length
