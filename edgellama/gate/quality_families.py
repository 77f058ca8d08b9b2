"""Quality on processors that round otherwise than this machine, computed by the replica.

An artifact that is good here may be bad on a phone whose kernels round the same activations more coarsely. The
windows, the limits and the looks are those of the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgellama.gate.references import QuantizedReference
from edgellama.gate.subject import Subject
from edgellama.model.activations import NO_ROUNDING
from edgellama.report import Check, check


def scored_families(subject: Subject) -> dict[str, QuantizedReference]:
    """Replicas of the families that round inputs, and that this machine does not belong to, by name.

    A family that rounds nothing loses less than every other, so it is not scored.
    """
    recipe, target = subject.bundle.recipe, subject.target
    return {
        family.name: QuantizedReference(subject.quantized, recipe, target, family)
        for family in target.other_families(recipe)
        if target.rounding_of(recipe, family) not in (None, NO_ROUNDING)
    }


def check_unscored(subject: Subject, scores: Mapping[str, object]) -> list[Check]:
    """The check `quality.families`, which says why no other family was scored; none where all round alike."""
    families = subject.target.families(subject.bundle.recipe)
    if scores or not families:
        return []
    here = subject.target.family_here(subject.bundle.recipe)
    rounded = here.name if here else "float"
    detail = f"inputs are rounded {rounded} here, and nowhere otherwise but where they are not rounded at all"
    return [check("quality.families", True, value=len(families), detail=detail)]
