"""Mixed precision: chooses the scheme of each part of the model to meet a budget of bytes or KL.

The KLs of the parts are assumed to add up, which holds while each is small. The best choices then lie on one
curve from the smallest model to the best one. Each step of it gives one part a finer scheme, in the order of
KL saved per byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from edgellama.errors import CheckFailed, RecipeError
from edgellama.recipe import Recipe, Rule, Scheme


@dataclass(frozen=True)
class Option:
    """One scheme for a part (None: float32), with the bytes and the KL in nats of the part under it."""

    scheme: Scheme | None
    bytes: int
    kl: float


@dataclass(frozen=True)
class Part:
    """Modules that share one scheme, as the pattern of a recipe rule, with their options."""

    modules: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Point:
    """One option for every part, with the bytes of the model and the expected KL."""

    chosen: tuple[Option, ...]
    bytes: int
    kl: float


def frontier(parts: Sequence[Part], fixed_bytes: int) -> list[Point]:
    """Points of the curve, from the fewest bytes to the lowest KL.

    fixed_bytes: bytes of the model outside the parts.
    """
    hulls = [_hull(part.options) for part in parts]
    chosen = [hull[0] for hull in hulls]
    steps = [
        ((before.kl - after.kl) / (after.bytes - before.bytes), index, after)
        for index, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    ]
    # Gains per byte fall along each hull, so this order keeps the steps of each part in sequence.
    points = [_point(chosen, fixed_bytes)]
    for _, index, option in sorted(steps, key=lambda step: (-step[0], step[1], step[2].bytes)):
        chosen[index] = option
        points.append(_point(chosen, fixed_bytes))
    return points


def pick(points: Sequence[Point], max_bytes: int | None, max_kl: float | None) -> Point:
    """The smallest point within both limits. Without `max_kl`, the best point within `max_bytes`.

    Raises CheckFailed with the nearest points if no point meets both limits.
    """
    small_enough = [p for p in points if max_bytes is None or p.bytes <= max_bytes]
    within_limits = [p for p in small_enough if max_kl is None or p.kl <= max_kl]
    if within_limits:
        return within_limits[0] if max_kl is not None else within_limits[-1]
    best_small = small_enough[-1] if small_enough else points[0]
    smallest_good = next((p for p in points if max_kl is None or p.kl <= max_kl), points[-1])
    raise CheckFailed(
        f"budget: no choice of schemes has at most {_said(max_bytes, max_kl)}; expected are "
        f"KL {best_small.kl:.4f} with {best_small.bytes} bytes, and "
        f"KL {smallest_good.kl:.4f} with {smallest_good.bytes} bytes",
        remedy="Nothing was written. Allow one of these, or more; --plan shows all choices.",
    )


def mixed_recipe(base: Recipe, parts: Sequence[Part], point: Point) -> Recipe:
    """`base` with a rule for every part in front: the recipe that is exported and in the manifest."""
    rules = tuple(Rule(p.modules, o.scheme) for p, o in zip(parts, point.chosen, strict=True))
    patterns = {rule.modules for rule in rules}
    rest = tuple(r for r in base.rules if r.modules not in patterns and not _covered(r, rules))
    return replace(base, rules=(*rules, *rest))


def check_parts(parts: Sequence[Part]) -> None:
    """Raises RecipeError if a part has no options, because no scheme fits it."""
    empty = [part.modules for part in parts if not part.options]
    if empty:
        raise RecipeError(
            f"no scheme fits {', '.join(empty[:3])}", remedy="Use a recipe of your own (-r FILE.json)."
        )


def _covered(rule: Rule, rules: Iterable[Rule]) -> bool:
    """True for a rule for all layers that layer rules in `rules` replace."""
    return rule.modules == "model.layers.*" and any(r.modules.startswith("model.layers.") for r in rules)


def _point(chosen: Sequence[Option], fixed_bytes: int) -> Point:
    return Point(tuple(chosen), fixed_bytes + sum(o.bytes for o in chosen), sum(o.kl for o in chosen))


def _hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of KL over bytes, by rising bytes and falling KL."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """KL saved per byte."""
    return (before.kl - after.kl) / (after.bytes - before.bytes)


def _said(max_bytes: int | None, max_kl: float | None) -> str:
    limits = [f"{max_bytes} bytes"] if max_bytes is not None else []
    return " and ".join([*limits, *([f"a KL of {max_kl:g}"] if max_kl is not None else [])])
