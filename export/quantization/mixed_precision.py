"""Mixed precision: which scheme each part of the model gets, so that a budget of bytes or of KL is met.

Losses of parts are taken to add up, as they do while each is small. Then the best choices lie on one curve from the
smallest model to the best one: each step gives one part a finer scheme, the steps in the order of KL won per byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from edgellama.errors import CheckFailed, RecipeError
from edgellama.recipe import Recipe, Rule, Scheme


@dataclass(frozen=True)
class Option:
    """One scheme for a part (None: float32), the bytes that the part then has, and the KL that it then costs."""

    scheme: Scheme | None
    bytes: int
    kl: float


@dataclass(frozen=True)
class Part:
    """Modules that get one scheme, by a pattern of a recipe's rule."""

    modules: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Point:
    """A choice for every part, with its bytes and expected KL."""

    chosen: tuple[Option, ...]
    bytes: int
    kl: float


def frontier(parts: Sequence[Part], fixed_bytes: int) -> list[Point]:
    """The choices worth making, from the fewest bytes to the least KL. fixed_bytes: of all that is not a part."""
    hulls = [_hull(part.options) for part in parts]
    chosen = [hull[0] for hull in hulls]
    steps = [
        ((before.kl - after.kl) / (after.bytes - before.bytes), index, after)
        for index, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    ]
    # Within a part gains per byte fall along its hull, so this order takes each part's steps in theirs.
    points = [_point(chosen, fixed_bytes)]
    for _, index, option in sorted(steps, key=lambda step: (-step[0], step[1], step[2].bytes)):
        chosen[index] = option
        points.append(_point(chosen, fixed_bytes))
    return points


def pick(points: Sequence[Point], max_bytes: int | None, max_kl: float | None) -> Point:
    """The smallest point that keeps to `max_kl`, or the best that keeps to `max_bytes` where no KL is asked for.

    Raises CheckFailed with the nearest points when no point keeps to both.
    """
    small = [p for p in points if max_bytes is None or p.bytes <= max_bytes]
    good = [p for p in small if max_kl is None or p.kl <= max_kl]
    if good:
        return good[0] if max_kl is not None else good[-1]
    close = small[-1] if small else points[0]
    enough = next((p for p in points if max_kl is None or p.kl <= max_kl), points[-1])
    raise CheckFailed(
        f"budget: no choice of schemes has at most {_said(max_bytes, max_kl)}; expected are KL {close.kl:.4f} with "
        f"{close.bytes} bytes, and KL {enough.kl:.4f} with {enough.bytes} bytes",
        remedy="Nothing was written. Allow one of these, or more; --plan shows all choices.",
    )


def mixed_recipe(base: Recipe, parts: Sequence[Part], point: Point) -> Recipe:
    """`base` with a rule in front for every part: what is exported, and what the manifest says."""
    rules = tuple(Rule(p.modules, o.scheme) for p, o in zip(parts, point.chosen, strict=True))
    patterns = {rule.modules for rule in rules}
    rest = tuple(r for r in base.rules if r.modules not in patterns and not _covered(r, rules))
    return replace(base, rules=(*rules, *rest))


def check_parts(parts: Sequence[Part]) -> None:
    """Raises RecipeError for a model none of whose layers any scheme fits."""
    empty = [part.modules for part in parts if not part.options]
    if empty:
        raise RecipeError(
            f"no scheme fits {', '.join(empty[:3])}", remedy="Use a recipe of your own (-r FILE.json)."
        )


def _covered(rule: Rule, rules: Iterable[Rule]) -> bool:
    """A rule for all layers has nothing left to say when every layer has its own."""
    return rule.modules == "model.layers.*" and any(r.modules.startswith("model.layers.") for r in rules)


def _point(chosen: Sequence[Option], fixed_bytes: int) -> Point:
    return Point(tuple(chosen), fixed_bytes + sum(o.bytes for o in chosen), sum(o.kl for o in chosen))


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of KL over bytes, by rising bytes and falling KL."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """KL won per byte."""
    return (before.kl - after.kl) / (after.bytes - before.bytes)


def _said(max_bytes: int | None, max_kl: float | None) -> str:
    limits = [f"{max_bytes} bytes"] if max_bytes is not None else []
    return " and ".join([*limits, *([f"a KL of {max_kl:g}"] if max_kl is not None else [])])
