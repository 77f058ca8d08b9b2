"""Checks: one question with its value, its limit and its verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "inconclusive"]


Interval = tuple[float, float]


@dataclass(frozen=True)
class Check:
    """One question with its answer.

    value: the measured value. limit: the allowed value. detail: explanation in words.
    """

    name: str
    verdict: Verdict
    value: float | int | str | None = None
    limit: float | int | str | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "verdict": self.verdict,
            "detail": self.detail,
        }


def check(name: str, passed: bool, *, value: Any = None, limit: Any = None, detail: str = "") -> Check:
    """Returns a check that passes or fails, never inconclusive."""
    return Check(name, "pass" if passed else "fail", value, limit, detail)


def below(
    name: str, value: float, limit: float, *, interval: Interval | None = None, detail: str = ""
) -> Check:
    """Returns a check that `value` does not exceed `limit`.

    Inconclusive if `interval` straddles the limit.
    """
    low, high = interval or (value, value)
    verdict: Verdict = "pass" if high <= limit else "fail" if not low <= limit else "inconclusive"
    return Check(name, verdict, value, limit, detail)


def above(
    name: str, value: float, limit: float, *, interval: Interval | None = None, detail: str = ""
) -> Check:
    """Returns a check that `value` reaches `limit`: the mirror image of `below`."""
    low, high = interval or (value, value)
    verdict: Verdict = "pass" if low >= limit else "fail" if not high >= limit else "inconclusive"
    return Check(name, verdict, value, limit, detail)


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """Returns `fail` if any verdict is, else `inconclusive` if any is, else `pass`."""
    distinct = set(verdicts)
    return "fail" if "fail" in distinct else "inconclusive" if "inconclusive" in distinct else "pass"


def listed(prefix: str, names: list[str], limit: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{prefix} {', '.join(names[:limit])}{more}".strip()
