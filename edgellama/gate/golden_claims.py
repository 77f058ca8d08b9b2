"""Golden vectors, judged on the host: a phone is held to them, so they are held to the model.

The sequences are chosen again. The reference's and the artifact's rows are compared with logits that are
computed now. The limits follow from the noise floor, and the floor is measured again where parity's own floor
does not explain it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgellama.bundle.golden import (
    FILE,
    REFERENCE,
    Expectation,
    Float,
    Golden,
    GoldenSequence,
    Rows,
    read_golden,
)
from edgellama.errors import BundleError
from edgellama.gate.differences import claim, differences, read_canonical
from edgellama.gate.effort import effort_for
from edgellama.gate.golden import accuracy, feed, golden_sequences, limits_of, noise_floor, scored_logits
from edgellama.gate.golden_sequences import top_k
from edgellama.gate.limits import GOLDEN_EXACT, GOLDEN_FLOOR, parity_limit
from edgellama.gate.subject import Section, Subject
from edgellama.report import Check, below
from edgellama.targets import Target

# Figures of the section `parity` that explain a recorded noise floor.
FLOORS = ("noise_floor_kl", "noise_floor_kl_first_positions", "noise_floor_kl_long")
# Tokens that the interpreter of Core ML programs is fed. It takes a second for a few steps.
INTERPRETED_TOKENS = 48


def examine_golden(subject: Subject, parity_floors: Sequence[float]) -> Section:
    """The checks named `golden.*`. None for a bundle in the making, which has no golden vectors.

    Args:
        subject: the target and its references.
        parity_floors: noise floors that parity measured, KL in nats.
    """
    bundle = subject.bundle
    if FILE not in bundle.manifest["files"]:
        return Section()
    try:
        golden = read_golden(bundle)
    except BundleError as error:
        return Section((claim("golden.sequences", [error.message]),))
    here = subject.target.family_here(bundle.recipe)
    if here is not None and here.name in golden.other_families(subject.target.name):
        golden = golden.for_family(subject.target.name, here.name)
    sequences = check_sequences(subject, golden)
    if sequences.verdict != "pass":
        return Section((sequences,))
    most = effort_for(subject.target).golden_tokens or bundle.context_length
    if subject.artifact.name == "mil-reference":
        most = INTERPRETED_TOKENS
    fed = [n for n, s in enumerate(golden.sequences) if len(s.tokens) <= most]
    logits = [feed(subject.artifact, golden.sequences[n]) for n in fed]
    return Section(
        (
            sequences,
            _check_reference(subject, golden),
            _check_artifact(subject, golden, fed, logits),
            _check_figures(subject, golden, fed, logits),
            _check_limits(subject, golden, parity_floors),
        )
    )


def check_sequences(subject: Subject, golden: Golden) -> Check:
    """Check that the sequences are those that an export chooses for this model, with their tokens and positions."""
    bundle = subject.bundle
    _, problems = read_canonical(bundle.path / FILE, FILE)
    expected = golden_sequences(bundle, subject.checkpoint.tokenizer)
    problems += differences(golden.top_k, top_k(bundle.config.output_size), "golden.top_k")
    actual = [_data(sequence) for sequence in golden.sequences]
    problems += differences(actual, [_data(sequence) for sequence in expected], "golden.sequences")
    named = {f"{name}.{part}" for name in golden.expected for part in ("ids", "logp", "rest")}
    problems += differences(sorted(golden.data["arrays"]), sorted(named), "golden.arrays")
    return claim("golden.sequences", problems, value=len(actual))


def _data(sequence: GoldenSequence) -> dict[str, Any]:
    messages = None if sequence.messages is None else [dict(message) for message in sequence.messages]
    return {**vars(sequence), "messages": messages, "tokens": list(sequence.tokens)}


def _check_artifact(subject: Subject, golden: Golden, fed: Sequence[int], logits: Sequence[Rows]) -> Check:
    """Check of the artifact's rows. Another processor may round as a device does, so its noise floor is allowed."""
    name = subject.target.name
    floor = golden.data["artifacts"][name]["noise_floor_kl_sequence"]
    limit = parity_limit(math.nan if floor is None else floor, max(GOLDEN_EXACT, subject.target.parity_kl))
    return check_rows(f"golden.{name}", golden, name, fed, logits, Expectation.kl, limit)


def _check_reference(subject: Subject, golden: Golden) -> Check:
    logits = scored_logits(subject.full, golden.sequences)
    numbers = range(len(golden.sequences))
    return check_rows("golden.reference", golden, REFERENCE, numbers, logits, divergence, GOLDEN_EXACT)


def check_rows(
    name: str,
    golden: Golden,
    model: str,
    fed: Sequence[int],
    logits: Sequence[Rows],
    distance: Callable[[Expectation, Rows], Float],
    limit: float,
) -> Check:
    """Check of a model's recorded rows against logits computed now.

    Args:
        name: name of the check.
        golden: golden vectors.
        model: `REFERENCE` or a target.
        fed: numbers of the sequences.
        logits: float32 [scored, vocab_size] for each of them.
        distance: of recorded rows and logits, nats: float64 [positions].
        limit: largest mean distance of a sequence.
    """
    recorded = [golden.expected[model][golden.rows(number)] for number in fed]
    if not fed:
        return claim(name, [], detail="every sequence is too long")
    malformed = [
        f"{golden.sequences[n].name}: {problem}"
        for n, expectation in zip(fed, recorded, strict=True)
        for problem in _malformed(expectation)
    ]
    if malformed:
        return claim(name, malformed)
    means = [
        float(distance(expectation, rows).mean()) for expectation, rows in zip(recorded, logits, strict=True)
    ]
    worst = int(np.argmax(np.nan_to_num(means, nan=math.inf)))
    sequence = golden.sequences[fed[worst]].name
    of = f"{len(fed)} of {len(golden.sequences)} sequences"
    return below(name, means[worst], limit, detail=f"worst of {of}: {sequence}")


def divergence(recorded: Expectation, logits: Rows) -> Float:
    """Sum over the recorded buckets of |log p - log q| max(p, q), nats: logits [P, vocab_size] -> float64 [P].

    Unlike a KL it is symmetric, and it also sees recorded probabilities that do not add up to 1.
    """
    now = Expectation.of_ids(logits, recorded.ids)
    p = np.concatenate([recorded.logp, recorded.rest[:, None]], -1).astype(np.float64)
    q = np.concatenate([now.logp, now.rest[:, None]], -1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms = np.where(p == q, 0.0, np.abs(p - q) * np.exp(np.maximum(p, q)))
    total: Float = terms.sum(-1)
    return total


def _malformed(recorded: Expectation) -> list[str]:
    """Faults that no rows of logits have: repeated tokens, another order, another total than 1."""
    problems = []
    if any(len(np.unique(row)) < len(row) for row in recorded.ids):
        problems.append("a token is recorded twice")
    with np.errstate(invalid="ignore"):
        if bool((np.diff(recorded.logp, axis=-1) > 0).any()):
            problems.append("the tokens are not in the order of their probability")
        buckets = np.concatenate([recorded.logp, recorded.rest[:, None]], -1).astype(np.float64)
        if bool((np.abs(np.exp(buckets).sum(-1) - 1) > GOLDEN_EXACT).any()):
            problems.append("the probabilities do not add up to 1")
    return problems


def _check_figures(subject: Subject, golden: Golden, fed: Sequence[int], logits: Sequence[Rows]) -> Check:
    """Check of the artifact's hash, and of its recorded KL and agreement with the reference.

    They are compared if every sequence was fed.
    """
    bundle, target = subject.bundle, subject.target
    entry = golden.data["artifacts"][target.name]
    sha256 = bundle.artifact_sha256(target.name)
    problems = differences(entry["sha256"], sha256, f"artifacts.{target.name}.sha256")
    if len(fed) < len(golden.sequences):
        return claim("golden.accuracy", problems, detail="not every sequence was fed")
    reference = [golden.expected[REFERENCE][golden.rows(number)] for number in fed]
    now = accuracy(reference, list(logits))
    floor = golden.data["artifacts"][target.name]["noise_floor_kl_sequence"] or 0.0
    tolerance = parity_limit(floor, GOLDEN_EXACT)
    positions = sum(sequence.scored for sequence in golden.sequences)
    kl, top1 = entry["kl_mean"], entry["top1_agreement"]
    if (kl is None) == math.isfinite(now["kl_mean"]) or (
        kl is not None and abs(kl - now["kl_mean"]) > tolerance
    ):
        problems.append(f"artifacts.{target.name}.kl_mean is {kl}, measured now {now['kl_mean']:.6g}")
    # Another processor may break ties the other way: a tenth of the positions.
    if abs(top1 - now["top1_agreement"]) > max(1 / positions, 0.1 * (floor > GOLDEN_EXACT)):
        problems.append(
            f"artifacts.{target.name}.top1_agreement is {top1}, measured now {now['top1_agreement']:.6g}"
        )
    return claim("golden.accuracy", problems)


def _check_limits(subject: Subject, golden: Golden, parity_floors: Sequence[float]) -> Check:
    """Check that the device's limits follow from the noise floor, and that the floor is no higher than measured."""
    target = subject.target
    floors = recorded_floors(golden, target.name)
    problems = differences(
        dict(golden.limits(target.name)), limits_of(*floors, target), f"limits.{target.name}"
    )
    if not explained(floors, parity_floors, target.parity_kl):
        now = noise_floor(subject.expected, golden.sequences, golden.top_k)
        problems += unexplained(floors, now, target, f"artifacts.{target.name}")
    return claim("golden.limits", problems)


Floors = tuple[float, float]  # noise floors, nats: mean of all positions and of the worst sequence


def recorded_floors(golden: Golden, target: str) -> Floors:
    """The noise floors of a target; NaN for one that was not finite."""
    entry = golden.data["artifacts"][target]
    mean, worst = (entry[f"noise_floor_kl_{kind}"] for kind in ("mean", "sequence"))
    return math.nan if mean is None else mean, math.nan if worst is None else worst


def unexplained(recorded: Floors, now: Floors, target: Target, path: str) -> list[str]:
    """Recorded floors that are higher than those measured now allow, in words. path: of the entry that has them."""
    return [
        f"{path}.noise_floor_kl_{kind} is {old:.3g}, measured now {new:.3g}"
        for kind, old, new in zip(("mean", "sequence"), recorded, now, strict=True)
        if old > max(target.parity_kl, GOLDEN_FLOOR * new) and not math.isnan(new)
    ]


def explained(recorded: Sequence[float], parity_floors: Sequence[float], always_passes: float) -> bool:
    """True if the floors raise no limit, or are no more than a few times the floors of parity in this run."""
    most = max([x for x in parity_floors if math.isfinite(x)], default=0.0)
    return all(
        not math.isfinite(floor)
        or parity_limit(floor, always_passes) == always_passes
        or floor <= GOLDEN_FLOOR * most
        for floor in recorded
    )
