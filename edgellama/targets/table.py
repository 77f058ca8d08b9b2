"""Targets by name. A new target needs a folder, a class and an entry here."""

from __future__ import annotations

from edgellama.errors import UsageError, did_you_mean
from edgellama.targets.base import Target
from edgellama.targets.coreml.target import CoremlPteTarget, CoremlTarget
from edgellama.targets.gguf.target import GgufTarget
from edgellama.targets.mlx.target import MlxTarget
from edgellama.targets.onnx.target import OnnxTarget
from edgellama.targets.xnnpack.target import XnnpackTarget

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        XnnpackTarget(),
        CoremlTarget(),
        CoremlPteTarget(),
        OnnxTarget(),
        GgufTarget(),
        MlxTarget(),
    )
}


def find_target(name: str) -> Target:
    """Returns the target called `name`. Raises UsageError with the list and the closest name."""
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(name, TARGETS)
    raise UsageError(f"unknown target {name!r}", remedy=f"{hint}Targets: {', '.join(sorted(TARGETS))}.")
