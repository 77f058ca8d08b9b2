"""Verdict about the answer to a challenge: the host runs its own copy of the artifact on the same tokens."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from edgellama._version import __version__
from edgellama.bundle import Bundle
from edgellama.bundle.golden import Float, Rows, buckets, nullable_floats
from edgellama.gate import limits
from edgellama.gate.challenge import TIME, parse_time, sequences_of
from edgellama.gate.challenge_text import draw_sequences
from edgellama.gate.device_origin import device_check, figures_check, runtime_check, system_check
from edgellama.gate.golden import feed
from edgellama.report import Check, below, check
from edgellama.runtimes.load import load
from edgellama.targets import find_target
from edgellama.targets.families import Family
from edgellama.text.windows import Text, default_texts

_X86 = {"x86_64", "amd64", "i686"}


@dataclass(frozen=True)
class Floor:
    """Limits of the KL to the host's run, nats, and their source in words.

    logits: of the replica for the family that the device names, in place of the host's run; None for the host's own.
    """

    mean: float
    sequence: float
    source: str
    logits: list[Rows] | None = None


def judge_response(
    bundle: Bundle,
    challenge: Mapping[str, Any],
    response: Mapping[str, Any],
    floor: Floor,
    *,
    now: datetime,
    texts: Sequence[Text] | None = None,
    machine: str | None = None,
) -> list[Check]:
    """The checks named `challenge.*` of a response. Runs the artifact unless the challenge is not this bundle's.

    Args:
        bundle: the bundle that the challenge was made from.
        challenge: the challenge as it was made, not as the device gave it back.
        response: the device's answer.
        floor: limits of the KL.
        now: present time.
        texts: texts of the passages; None for the evaluation texts.
        machine: processor of this machine; None to ask.
    """
    target = find_target(challenge["target"])
    expected = draw_sequences(
        challenge["nonce"], bundle.tokenizer, texts or default_texts(), bundle.context_length
    )
    drawn = [(s.name, list(s.tokens), s.score_from) for s in expected]
    given = [(s["name"], s["tokens"], s["score_from"]) for s in challenge["sequences"]]
    artifact = bundle.artifact_sha256(target.name)
    positions = _positions(challenge, response)
    checks = [
        check(
            "challenge.bundle",
            challenge["artifact_sha256"] == artifact,
            value=challenge["artifact_sha256"][:12],
            limit=artifact[:12],
            detail="the challenge is about another artifact"
            if challenge["artifact_sha256"] != artifact
            else "",
        ),
        _age(challenge, now),
        check(
            "challenge.tokens",
            drawn == given,
            detail=""
            if drawn == given
            else f"not the tokens of its nonce (made by edgellama {challenge['edgellama']}, this is {__version__})",
        ),
        check(
            "challenge.nonce",
            response["nonce"] == challenge["nonce"],
            value=response["nonce"][:12],
            limit=challenge["nonce"][:12],
            detail="" if response["nonce"] == challenge["nonce"] else "the answer to another challenge",
        ),
        check(
            "challenge.artifact",
            response["artifact_sha256"] == artifact and response["target"] == target.name,
            value=response["artifact_sha256"][:12],
            limit=artifact[:12],
            detail=f"{response['target']} on {response['device']}, {response['os']}",
        ),
        device_check("challenge.device", challenge["device"], response),
        runtime_check("challenge.runtime", target, response),
        system_check("challenge.system", target, response),
        figures_check("challenge.figures", bundle, target, response),
        check("challenge.positions", not positions, detail=positions),
    ]
    if families := target.families(bundle.recipe):
        here = target.family_here(bundle.recipe)
        checks.append(_family(response.get("family"), families, here, floor))
    needed = ("challenge.bundle", "challenge.tokens", "challenge.positions", "challenge.family")
    if all(c.verdict == "pass" for c in checks if c.name in needed):
        checks += _measured(bundle, challenge, response, floor, machine or platform.machine())
    return checks


def _age(challenge: Mapping[str, Any], now: datetime) -> Check:
    created, expires = parse_time(challenge["created"]), parse_time(challenge["expires"])
    lifetime = expires - created
    reason = ""
    if now > expires:
        reason = "expired"
    elif lifetime > timedelta(days=limits.CHALLENGE_DAYS):
        reason = f"valid for {lifetime.days} days, and so open to be answered by anyone at leisure"
    elif created > now + timedelta(minutes=5):
        reason = "made in the future"
    return check(
        "challenge.age", not reason, value=now.strftime(TIME), limit=challenge["expires"], detail=reason
    )


def _family(name: str | None, families: Sequence[Family], here: Family | None, floor: Floor) -> Check:
    """Check of the family of processors that a response names. Without a name it is judged as the host's."""
    own, known = here.name if here else None, [family.name for family in families]
    reason = ""
    if name is not None and name not in known:
        reason = "no family of this artifact"
    elif name not in (None, own) and floor.logits is None:
        reason = f"this machine rounds {own}, and only the quantized model tells the other: give --reference"
    return check("challenge.family", not reason, value=name or own, limit=", ".join(known), detail=reason)


def _positions(challenge: Mapping[str, Any], response: Mapping[str, Any]) -> str:
    """Fault of the response's shape, in words; empty for none."""
    k = challenge["top_k"]
    if [s["name"] for s in response["sequences"]] != [s["name"] for s in challenge["sequences"]]:
        return "not the sequences of the challenge"
    for asked, answered in zip(challenge["sequences"], response["sequences"], strict=True):
        scored = len(asked["tokens"]) - asked["score_from"]
        if not scored == len(answered["ids"]) == len(answered["logp"]) == len(answered["rest"]):
            return f"{asked['name']}: {len(answered['ids'])} positions, {scored} were asked for"
        if any(len(row) != k for key in ("ids", "logp") for row in answered[key]):
            return f"{asked['name']}: not {k} tokens for each position"
    return ""


def _measured(
    bundle: Bundle, challenge: Mapping[str, Any], response: Mapping[str, Any], floor: Floor, machine: str
) -> list[Check]:
    """Checks of the returned probabilities, against a run of the artifact on this machine or the replica's."""
    logits = floor.logits
    if logits is None:
        with load(bundle, challenge["target"]) as runtime:
            logits = [feed(runtime, sequence) for sequence in sequences_of(challenge)]
    kl, difference, faults, agreeing = [], 0.0, [], []
    for rows, answered in zip(logits, response["sequences"], strict=True):
        values = []
        for row, ids, logp, rest in zip(
            rows, answered["ids"], answered["logp"], answered["rest"], strict=True
        ):
            claim = _Claim(np.array(ids), nullable_floats(logp), -math.inf if rest is None else float(rest))
            fault = claim.fault(len(row))
            if fault:
                faults.append(f"{answered['name']}: {fault}")
                values.append(math.nan)
                continue
            values.append(claim.kl(row))
            agreeing.append(int(row.argmax()) == ids[0])
            difference = max(difference, claim.difference(row))
        kl.append(np.array(values))
    means = [float(values.mean()) for values in kl]
    worst = max(range(len(means)), key=lambda i: (math.isnan(means[i]), means[i]))
    top1 = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return [
        check("challenge.distribution", not faults, value=len(faults), limit=0, detail="; ".join(faults[:2])),
        below(
            "challenge.kl",
            float(np.concatenate(kl).mean()),
            floor.mean,
            detail=f"top-1 {top1:.1%} of the host's artifact; limit by {floor.source}",
        ),
        below(
            "challenge.kl_sequence",
            means[worst],
            floor.sequence,
            detail=f"worst: {challenge['sequences'][worst]['name']}",
        ),
        _own_bits(response, difference, machine),
    ]


def _own_bits(response: Mapping[str, Any], difference: float, machine: str) -> Check:
    """Check that a phone does not return the very bits of this machine's kernels."""
    phone = set(re.findall("[a-z]+", response["os"].lower())) & {"android", "ios", "ipados"}
    copied = bool(phone) and machine.lower() in _X86 and difference < limits.CHALLENGE_OWN_BITS
    return check(
        "challenge.own_bits",
        not copied,
        value=difference,
        limit=limits.CHALLENGE_OWN_BITS if phone and machine.lower() in _X86 else None,
        detail=f"the kernels of {machine} computed this, and no phone has them" if copied else "",
    )


@dataclass(frozen=True)
class _Claim:
    """Answer of a device at one position.

    Attributes:
        ids: most probable tokens, best first, [k].
        logp: their log-probabilities, float64 [k]. NaN for null.
        rest: log of the probability of all other tokens.
    """

    ids: Any
    logp: Float
    rest: float

    def fault(self, vocab_size: int) -> str:
        """Reason why this is no distribution, in words; empty for none."""
        if not np.isfinite(self.logp).all():
            return "log-probabilities that are no numbers"
        if len(set(self.ids.tolist())) != len(self.ids) or self.ids.max() >= vocab_size:
            return "ids that are no tokens, or that come twice"
        if (np.diff(self.logp) > 0).any():
            return "tokens that are not ordered by their probability"
        total = float(np.exp(self.logp).sum() + math.exp(min(self.rest, 1.0)))
        if abs(total - 1) > limits.CHALLENGE_SUM:
            return f"probabilities whose sum is {total:.4g}"
        return ""

    def kl(self, logits: Rows) -> float:
        """KL D(host || device), nats, over the returned tokens, the host's own best tokens, and all others.

        A token of the host that was not returned had at most the probability of the last one that was. So a
        device cannot hide the likely tokens among all others.
        """
        k = len(self.ids)
        own = np.argsort(-logits, kind="stable")[:k]
        missing = own[~np.isin(own, self.ids)]
        host, rest = buckets(logits[None], np.concatenate([self.ids, missing])[None])
        p = np.exp(np.append(host[0], rest[0]))
        left = float(np.exp(host[0, k:]).sum() + math.exp(rest[0]))
        share = np.exp(host[0, k:]) * (math.exp(self.rest) / left if left else 0.0)
        hidden = np.minimum(share, math.exp(self.logp[-1]))
        others = max(math.exp(self.rest) - float(hidden.sum()), 0.0)
        q = np.maximum(np.concatenate([np.exp(self.logp), hidden, [others]]), 1e-300)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p * np.log(p / q), 0.0)
        return max(0.0, float(terms.sum()))

    def difference(self, logits: Rows) -> float:
        """Largest difference of a log-probability to the host's, nats."""
        host, _ = buckets(logits[None], self.ids[None])
        return float(np.abs(host[0] - self.logp).max())
