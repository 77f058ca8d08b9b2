"""Challenges: tokens that nobody knew before, whose answer only a run of the artifact gives.

A device log can be written by hand from the bundle's golden vectors. A challenge cannot be answered by hand,
because the host's results do not exist until the answer is judged. The device returns its most probable tokens
with their log-probabilities. The host then runs its own copy of the artifact on the same tokens.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from edgellama._version import __version__
from edgellama.bundle import Bundle
from edgellama.bundle.golden import GoldenSequence, Rows, buckets
from edgellama.bundle.schema import conforming
from edgellama.errors import InputError
from edgellama.files import read_named_json
from edgellama.gate.challenge_text import draw_sequences
from edgellama.gate.golden import feed
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.load import load
from edgellama.targets import find_target
from edgellama.text.windows import Text, default_texts

SCHEMA = "edgellama.challenge/1"
RESPONSE_SCHEMA = "edgellama.response/1"
TOP_K = 64  # tokens of a position that the device returns
TIME = "%Y-%m-%dT%H:%M:%SZ"


def make_challenge(
    bundle: Bundle,
    target: str,
    *,
    nonce: str,
    now: datetime,
    lifetime: timedelta,
    device: str | None = None,
    texts: Sequence[Text] | None = None,
    top_k: int = TOP_K,
) -> dict[str, Any]:
    """A challenge (edgellama.challenge/1) for one artifact.

    Args:
        bundle: the bundle that the device holds.
        target: name of the target.
        nonce: 64 hexadecimal digits, which no earlier challenge had.
        now: time from which the challenge is valid.
        lifetime: time until it expires.
        device: name, or part of the name, of the device that must answer; None for any.
        texts: texts of the passages; None for the evaluation texts.
        top_k: tokens to return for each position.
    """
    sequences = draw_sequences(nonce, bundle.tokenizer, texts or default_texts(), bundle.context_length)
    return {
        "schema": SCHEMA,
        "edgellama": __version__,
        "nonce": nonce,
        "created": now.astimezone(UTC).strftime(TIME),
        "expires": (now + lifetime).astimezone(UTC).strftime(TIME),
        "bundle": bundle.manifest["name"],
        "target": target,
        "artifact_sha256": bundle.artifact_sha256(target),
        "device": device,
        "top_k": min(top_k, bundle.config.vocab_size - 1),
        "sequences": [
            {"name": s.name, "tokens": list(s.tokens), "score_from": s.score_from} for s in sequences
        ],
    }


def read_challenge(path: Path) -> dict[str, Any]:
    """Reads a challenge. Raises InputError if the file is not one."""
    remedy = "Give the file that `edgellama challenge` wrote."
    data = read_named_json(path, "challenge", remedy=remedy)
    challenge = conforming(data, "challenge", label="challenge", where=str(path), remedy=remedy)
    for key in ("created", "expires"):
        try:
            parse_time(challenge[key])
        except ValueError as error:
            raise InputError(f"{path}: challenge.{key} is no day ({error})", remedy=remedy) from error
    return challenge


def read_response(path: Path) -> dict[str, Any]:
    """Reads a response. Raises InputError if the file is not one."""
    remedy = "Copy the response from the device again, or answer the challenge there again."
    data = read_named_json(path, "response", remedy=remedy)
    return conforming(data, "response", label="response", where=str(path), remedy=remedy)


def answer(bundle: Bundle, challenge: Mapping[str, Any], runtime: Runtime | None = None) -> dict[str, Any]:
    """Answers a challenge on this machine: the response (edgellama.response/1), as the apps write it.

    runtime: None for the runtime of the challenge's target.
    """
    target = challenge["target"]
    start = time.perf_counter()
    with runtime or load(bundle, target) as opened:
        load_ms = 1000 * (time.perf_counter() - start)
        logits = [feed(opened, sequence) for sequence in sequences_of(challenge)]
        name = opened.name
    family = find_target(target).family_here(bundle.recipe)
    return {
        "schema": RESPONSE_SCHEMA,
        "nonce": challenge["nonce"],
        "target": target,
        "family": family and family.name,
        "artifact_sha256": bundle.artifact_sha256(target),
        "device": platform.machine() or "unknown",
        "os": platform.system() or "unknown",
        "runtime": name,
        "sequences": answers(challenge, logits),
        "prefill_tok_s": None,
        "decode_tok_s": None,
        "load_ms": load_ms,
        "peak_bytes": None,
    }


def answers(challenge: Mapping[str, Any], logits: Sequence[Rows]) -> list[dict[str, Any]]:
    """The section `sequences` of a response. logits: float32 [scored, vocab_size] of each sequence.

    A position whose logits are not all finite has the first ids, and null for every log-probability. `rest` is
    null there, and where it is zero to float64.
    """
    k, sections = challenge["top_k"], []
    for sequence, rows in zip(challenge["sequences"], logits, strict=True):
        finite = np.array([bool(np.isfinite(row).all()) for row in rows])
        ids = np.argsort(-np.where(finite[:, None], rows, 0), axis=-1, kind="stable")[:, :k]
        logp, rest = buckets(rows, ids)
        counted = finite & np.isfinite(rest)
        sections.append(
            {
                "name": sequence["name"],
                "ids": ids.tolist(),
                "logp": [row.tolist() if ok else [None] * k for ok, row in zip(finite, logp, strict=True)],
                "rest": [float(x) if ok else None for ok, x in zip(counted, rest, strict=True)],
            }
        )
    return sections


def sequences_of(challenge: Mapping[str, Any]) -> list[GoldenSequence]:
    """The sequences of a challenge, to be fed as golden sequences are."""
    return [
        GoldenSequence(s["name"], "", False, None, tuple(s["tokens"]), s["score_from"])
        for s in challenge["sequences"]
    ]


def parse_time(text: str) -> datetime:
    """Time of a challenge. Raises ValueError for other text."""
    return datetime.strptime(text, TIME).replace(tzinfo=UTC)
