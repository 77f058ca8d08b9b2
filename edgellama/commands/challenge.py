"""Verb `challenge`: a challenge for a device, an answer to one, and the judgement of an answer."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.golden import read_golden
from edgellama.checkpoints import Checkpoint
from edgellama.commands.validate_phases import quantized_model
from edgellama.errors import UsageError
from edgellama.gate import challenge as gate
from edgellama.gate.device_origin import device_check
from edgellama.gate.golden import noise_floor, scored_logits
from edgellama.gate.limits import CHALLENGE_DAYS, parity_limit
from edgellama.gate.references import QuantizedReference
from edgellama.gate.response import Floor, judge_response
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.report import Report
from edgellama.runtimes.classify import refuse_classifier
from edgellama.targets import find_target

DEFAULT_HOURS = 24


@dataclass(frozen=True)
class Pair:
    """A challenge with the answer to it, as they were read."""

    challenge: Mapping[str, Any]
    response: Mapping[str, Any]


def make(
    bundle: Bundle | str | Path,
    *,
    target: str | None = None,
    device: str | None = None,
    hours: int = DEFAULT_HOURS,
    seed: int | None = None,
) -> dict[str, Any]:
    """Makes a challenge (edgellama.challenge/1).

    Args:
        bundle: an open bundle, or the path of one.
        target: name of the target; None for the bundle's first.
        device: name, or part of the name, of the device that must answer; None for any.
        hours: time until it expires.
        seed: for tests, which need the same challenge again. None for a nonce of the operating system.

    Raises UsageError for a target that the bundle lacks, or for a validity beyond CHALLENGE_DAYS.

    >>> from edgellama.commands.challenge import make
    >>> challenge = make(bundle)
    >>> challenge["schema"], len(challenge["nonce"])
    ('edgellama.challenge/1', 64)
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    refuse_classifier(bundle)
    if not 1 <= hours <= 24 * CHALLENGE_DAYS:
        raise UsageError(
            f"a challenge is valid for 1 to {24 * CHALLENGE_DAYS} hours, got {hours}",
            remedy="Choose other --hours.",
        )
    name = find_target(target or bundle.targets[0]).name
    nonce = secrets.token_hex(32) if seed is None else hashlib.sha256(str(seed).encode()).hexdigest()
    return gate.make_challenge(
        bundle, name, nonce=nonce, now=datetime.now(UTC), lifetime=timedelta(hours=hours), device=device
    )


def answer(bundle: Bundle | str | Path, challenge: str | Path) -> dict[str, Any]:
    """Answers the challenge in a file on this machine: the response (edgellama.response/1).

    Raises InputError for a file that is no challenge, UsageError for one about another artifact.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    refuse_classifier(bundle)
    data = gate.read_challenge(Path(challenge))
    if data["target"] not in bundle.targets or data["artifact_sha256"] != bundle.artifact_sha256(
        data["target"]
    ):
        raise UsageError(
            f"{challenge} is about another artifact than that of {bundle.path}",
            remedy="Answer it with the bundle that it was made from.",
        )
    return gate.answer(bundle, data)


def read_pair(challenge: Path | None, response: Path | None, targets: Sequence[str]) -> Pair | None:
    """Reads a challenge and its answer; None if neither is given.

    Raises UsageError if one is missing or the target is not in `targets`, InputError for another file.
    """
    if challenge is None and response is None:
        return None
    if challenge is None or response is None:
        missing = "--challenge" if challenge is None else "--response"
        raise UsageError(
            f"{missing} is missing: an answer is judged with the challenge that it answers",
            remedy="Give both. The challenge is the file that you kept, not one that came from the device.",
        )
    pair = Pair(gate.read_challenge(challenge), gate.read_response(response))
    if pair.challenge["target"] not in targets:
        raise UsageError(
            f"{challenge} is about target {pair.challenge['target']!r}, "
            f"this validation is about {', '.join(targets)}",
            remedy="Validate that target too.",
        )
    return pair


@one_thread()
def with_response(
    bundle: Bundle,
    reports: Sequence[Report],
    pair: Pair,
    checkpoint: Checkpoint | None,
    *,
    device: str | None = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """Adds the checks named `challenge.*` to the report of the challenge's target.

    Args:
        bundle: the bundle that the reports are about.
        reports: one for each target.
        pair: the challenge and its answer.
        checkpoint: the full-precision checkpoint; None for the limits that the golden vectors record.
        device: name, or part of the name, of the device that must have answered; None for any.
        now: present time; None to ask the clock.
        progress: reporter of stages; None for a silent one.
    """
    progress, result = progress or Progress(), []
    for report in reports:
        sound = report.structure.get("files") == "pass"
        if report.target == pair.challenge["target"] and sound:
            with progress.stage("challenge"):
                floor = _floor(bundle, report.target, pair, checkpoint)
                checks = judge_response(
                    bundle, pair.challenge, pair.response, floor, now=now or datetime.now(UTC)
                )
            if device is not None:
                checks.append(device_check("challenge.name", device, pair.response))
            report = replace(report, checks=(*report.checks, *checks))
        result.append(report)
    return result


def _floor(bundle: Bundle, name: str, pair: Pair, checkpoint: Checkpoint | None) -> Floor:
    """Limits from the noise floor on the challenge's own tokens, or else on the golden vectors' tokens.

    With the logits of the replica for a device of another family of processors than this machine's.
    """
    target, challenge = find_target(name), pair.challenge
    known = all(t < bundle.config.vocab_size for s in challenge["sequences"] for t in s["tokens"])
    fits = all(len(s["tokens"]) <= bundle.context_length for s in challenge["sequences"])
    if not (known and fits) or (checkpoint is None and not bundle.recipe.calibration_tokens):
        limits = read_golden(bundle).limits(name)
        return Floor(limits["parity_kl_mean"], limits["parity_kl_sequence"], "the golden vectors")
    if bundle.recipe.calibration_tokens:
        from edgellama.bundle.restore import restored_llama

        quantized = restored_llama(bundle, target)
    else:
        assert checkpoint is not None
        quantized = quantized_model(bundle, target, checkpoint)
    named = pair.response.get("family")
    other = next((f for f in target.other_families(bundle.recipe) if f.name == named), None)
    replica, sequences = (
        QuantizedReference(quantized, bundle.recipe, target, other),
        gate.sequences_of(challenge),
    )
    mean, worst = noise_floor(replica, sequences, challenge["top_k"])
    return Floor(
        parity_limit(mean, target.device_kl),
        parity_limit(worst, target.device_kl),
        "noise on the same tokens",
        None if other is None else scored_logits(replica, sequences),
    )
