"""Replay of golden vectors on this machine: the accuracy check of the apps, in Python.

The apps are tested against its numbers (tests/vectors/golden.json).
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.golden import REFERENCE, Golden, GoldenSequence, Rows, read_golden
from edgellama.gate.device import SCHEMA, measure
from edgellama.gate.golden import feed
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.load import load
from edgellama.targets import find_target
from edgellama.text.chat import ChatFormat


def replay(bundle: Bundle, target: str | None = None, runtime: Runtime | None = None) -> dict[str, Any]:
    """Replays the golden vectors and returns the device log (edgellama.device/1) of this machine.

    target: None for the bundle's first. runtime: None for the runtime of the target.
    """
    target = target or bundle.targets[0]
    golden = read_golden(bundle)
    family = golden.family(target) and find_target(target).family_here(bundle.recipe)
    if family:
        golden = golden.for_family(target, family.name)
    start = time.perf_counter()
    with runtime or load(bundle, target) as opened:
        load_ms = 1000 * (time.perf_counter() - start)
        logits = [feed(opened, sequence) for sequence in golden.sequences]
        log = {
            "schema": SCHEMA,
            "device": platform.machine() or "unknown",
            "os": platform.system() or "unknown",
            "runtime": opened.name,
            "target": target,
            "family": family and family.name,
            "artifact_sha256": bundle.artifact_sha256(target),
            "golden_sha256": golden.sha256,
            **compare(golden, target, logits, [_tokens(bundle, s) for s in golden.sequences]),
            "prefill_tok_s": None,
            "decode_tok_s": None,
            "load_ms": load_ms,
            "peak_bytes": None,
        }
    checks = measure(bundle, golden, log)
    passed = all(c.verdict == "pass" for c in checks)
    return log | {
        "checks": [
            {"name": c.name.removeprefix("device."), "value": c.value, "limit": c.limit, "verdict": c.verdict}
            for c in checks
        ],
        "verdict": "pass" if passed else "fail",
    }


def compare(
    golden: Golden, target: str, logits: Sequence[Rows], tokens: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Sections of a device log that follow from the results of each sequence.

    Args:
        golden: golden vectors of the bundle, for the family of the machine that computed `logits`.
        target: name of the target.
        logits: float32 [scored, vocab_size] for each sequence.
        tokens: ids of each sequence, as this machine encodes it.
    """
    sequences = []
    for number, (sequence, rows, ids) in enumerate(zip(golden.sequences, logits, tokens, strict=True)):
        span = golden.rows(number)
        reference, host = golden.expected[REFERENCE][span], golden.expected[target][span]
        sequences.append(
            {
                "name": sequence.name,
                "tokens_match": list(ids) == list(sequence.tokens),
                "kl": [_finite(x) for x in reference.kl(rows)],
                "top1": reference.top1(rows).tolist(),
                "parity_kl": [_finite(x) for x in host.kl(rows)],
                "parity_top1": host.top1(rows).tolist(),
            }
        )
    return {
        "sequences": sequences,
        **{f"{key}_mean": _mean([s[key] for s in sequences]) for key in ("kl", "parity_kl")},
        "top1_agreement": float(np.mean([x for s in sequences for x in s["top1"]])),
        "parity_top1_agreement": float(np.mean([x for s in sequences for x in s["parity_top1"]])),
    }


def _tokens(bundle: Bundle, sequence: GoldenSequence) -> list[int]:
    """Token ids of the sequence, encoded on this machine from its conversation, or else from its text."""
    text, format_data = sequence.text, bundle.manifest["chat"]["format"]
    if sequence.messages is not None and format_data is not None:
        text = ChatFormat.from_dict(format_data).render(sequence.messages, add_generation_prompt=True)
    return bundle.tokenizer.encode(text, add_special_tokens=sequence.add_special_tokens)


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _mean(parts: Sequence[Sequence[float | None]]) -> float | None:
    values = [x for part in parts for x in part]
    finite = [x for x in values if x is not None]
    return sum(finite) / len(finite) if finite and len(finite) == len(values) else None
