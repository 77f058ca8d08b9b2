"""Lines of long work: time left, and shares of the stages."""

from __future__ import annotations

import pytest

from edgellama.host.progress import Pace, Progress


def test_time_left_is_judged_by_the_steps_that_were_work(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 101.0, 201.0, 301.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    pace = Pace(4)
    assert pace.step(worked=False) == "1 of 4"
    assert pace.step() == "2 of 4, about 3 min left"
    assert pace.step() == "3 of 4, about 2 min left"
    assert pace.step() == "4 of 4"


def test_summary_adds_stages_of_one_name_and_leaves_out_short_ones() -> None:
    work = Progress()
    work.stages = [{"name": n, "seconds": s} for n, s in [("score", 20.0), ("open", 2.0), ("score", 40.0)]]
    work.stages.append({"name": "calibrate", "seconds": 38.0})
    assert work.summary() == "100 s in all: score 60%, calibrate 38%"
