"""Golden vectors of families of processors that this machine does not belong to, judged by a replica.

A phone of another family is held to rows that the host's own run says nothing about. The sequences of up to
OWN_PASS tokens are computed again, in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellama.bundle.golden import FILE, Expectation, Golden, read_golden
from edgellama.errors import BundleError
from edgellama.gate.differences import claim, differences
from edgellama.gate.golden import limits_of, noise_floor, scored_logits
from edgellama.gate.golden_claims import check_rows, explained, recorded_floors, unexplained
from edgellama.gate.golden_sequences import MIDDLE
from edgellama.gate.limits import GOLDEN_EXACT, parity_limit
from edgellama.gate.references import QuantizedReference
from edgellama.gate.subject import Section, Subject
from edgellama.report import Check
from edgellama.targets.families import Family

OWN_PASS = MIDDLE  # tokens of the longest sequence that is computed again


def examine_families(subject: Subject, parity_floors: Sequence[float]) -> Section:
    """The checks named `golden.families` and `golden.TARGET.FAMILY`; none where all processors round alike.

    Older bundles have rows of one family alone.

    Args:
        subject: the target and its references.
        parity_floors: noise floors that parity measured, KL in nats.
    """
    bundle, target = subject.bundle, subject.target
    families = target.families(bundle.recipe)
    if not families or FILE not in bundle.manifest["files"]:
        return Section()
    try:
        golden = read_golden(bundle)
    except BundleError:
        return Section()  # `golden.sequences` says so
    known = golden.family(target.name)
    if known is None:
        detail = "an older bundle: no rows for processors that round otherwise than this machine"
        return Section((claim("golden.families", [], detail=detail),))
    names = [family.name for family in families]
    recorded = {name: entry["processors"] for name, entry in golden.other_families(target.name).items()}
    expected = {family.name: list(family.processors) for family in families if family.name != known}
    problems = differences(recorded, expected, f"artifacts.{target.name}.families")
    if known not in names:
        problems.append(f"artifacts.{target.name}.family is {known}, expected one of {', '.join(names)}")
    checks = [claim("golden.families", problems, value=len(names))]
    if not problems:
        checks += [
            _check_family(subject, golden.for_family(target.name, family.name), family, parity_floors)
            for family in target.other_families(bundle.recipe)
        ]
    return Section(tuple(checks))


def _check_family(subject: Subject, golden: Golden, family: Family, parity_floors: Sequence[float]) -> Check:
    """Check of a family's rows and limits. golden: the vectors for that family."""
    target = subject.target
    name = f"golden.{target.name}.{family.name}"
    fed = [n for n, sequence in enumerate(golden.sequences) if len(sequence.tokens) <= OWN_PASS]
    k = golden.expected[target.name].ids.shape[1]
    floors = recorded_floors(golden, target.name)
    measured = not explained(floors, parity_floors, target.parity_kl)
    sequences = [golden.sequences[n] for n in fed]
    replica = QuantizedReference(subject.quantized, subject.bundle.recipe, target, family)
    problems = differences(dict(golden.limits(target.name)), limits_of(*floors, target), f"limits.{name}")
    if measured:
        now = noise_floor(replica, sequences, k)
        problems += unexplained(floors, now, target, f"artifacts.{target.name}.families.{family.name}")
    if problems:
        return claim(name, problems)
    limit = parity_limit(floors[1], max(GOLDEN_EXACT, target.parity_kl))
    return check_rows(
        name, golden, target.name, fed, scored_logits(replica, sequences), Expectation.kl, limit
    )
