"""Tests of the looks at a growing sample: their sizes, their shares of the error, and the errors in a simulation."""

from __future__ import annotations

import numpy as np
import pytest

from edgellama.gate.limits import ERROR
from edgellama.gate.looks import plan_looks
from edgellama.gate.metrics import clustered_mean


@pytest.mark.parametrize(
    ("first", "available", "windows"),
    [
        (16, 174, [16, 32, 64, 174]),
        (4, 174, [4, 8, 16, 32, 64, 174]),
        (16, 16, [16]),
        (16, 3, [3]),
        (16, 17, [16, 17]),
        (16, 48, [16, 32, 48]),
        (1, 4, [1, 2, 4]),
    ],
)
def test_looks_double_up_to_the_whole_text(first: int, available: int, windows: list[int]) -> None:
    looks = plan_looks(first, available)
    assert [look.windows for look in looks] == windows
    assert [look.number for look in looks] == list(range(1, len(windows) + 1))
    assert {look.planned for look in looks} == {len(windows)}
    assert sum(look.error for look in looks) == pytest.approx(ERROR)


@pytest.mark.slow
def test_looks_together_err_no_more_often_than_one() -> None:
    """The true mean is at the limit. With 2.5 % at each look, one run in fourteen would pass."""
    generator = np.random.default_rng(0)
    looks, runs = plan_looks(8, 128), 3000
    passes = {"shared": 0, "unshared": 0}
    for _ in range(runs):
        values = [generator.normal(1.0, 0.3, size=1) for _ in range(128)]
        for name in passes:
            passes[name] += any(
                clustered_mean(values[: look.windows], error=look.error if name == "shared" else ERROR).high
                < 1.0
                for look in looks
            )
    assert passes["shared"] / runs <= ERROR + 0.005
    assert passes["unshared"] / runs > 0.05
