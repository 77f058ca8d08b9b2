"""Device logs and responses of phones that do not exist: logits of a real runtime with the noise of other kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.golden import Golden, GoldenSequence, Rows, read_golden
from edgellama.gate.challenge import answers
from edgellama.gate.device import SCHEMA, measure
from edgellama.gate.golden import feed
from edgellama.gate.replay import compare
from edgellama.runtimes.load import load

PHONES = {
    "xnnpack": ("Google Pixel 9", "Android 15 (API 35)", "executorch-android"),
    "coreml": ("iPhone17,1", "iOS 18.1.0", "coreml 18.1 cpuAndGPU"),
    "coreml-pte": ("iPhone17,1", "iOS 18.1.0", "executorch 1.5.1 coreml"),
    "onnx": ("Samsung SM-S931B", "Android 15 (API 35)", "onnxruntime-cpu"),
}


def logits_of(bundle: Bundle, target: str, sequences: Sequence[GoldenSequence]) -> list[Rows]:
    """Logits of the artifact on this machine at the scored positions of each sequence."""
    with load(bundle, target) as runtime:
        return [feed(runtime, sequence) for sequence in sequences]


def noisy(logits: Sequence[Rows], scale: float, seed: int = 0) -> list[Rows]:
    """The logits with relative noise of `scale`, larger at some positions, as int8 activations make it."""
    generator = np.random.default_rng(seed)
    noisy_logits = []
    for rows in logits:
        size = np.exp(generator.normal(size=(len(rows), 1))).clip(0, 5) * scale * rows.std()
        noisy_logits.append((rows + size * generator.normal(size=rows.shape)).astype(np.float32))
    return noisy_logits


def device_log(
    bundle: Bundle, target: str, logits: Sequence[Rows], *, golden: Golden | None = None, **changes: Any
) -> dict[str, Any]:
    """The log of a phone that computed `logits` on the golden sequences.

    golden: vectors for the phone's family; None for those of the host's. changes: fields to replace at last.
    """
    golden = golden or read_golden(bundle)
    device, system, runtime = PHONES[target]
    log = {
        "schema": SCHEMA,
        "device": device,
        "os": system,
        "runtime": runtime,
        "target": target,
        "artifact_sha256": bundle.artifact_sha256(target),
        "golden_sha256": golden.sha256,
        **compare(golden, target, logits, [s.tokens for s in golden.sequences]),
        "prefill_tok_s": 812.25,
        "decode_tok_s": 61.5,
        "load_ms": 240.75,
        "peak_bytes": 300_000_000,
    }
    return finished(bundle, log, golden) | changes


def finished(bundle: Bundle, log: dict[str, Any], golden: Golden | None = None) -> dict[str, Any]:
    """The log with means, checks and verdict that follow from its positions."""
    for key, parts in (("kl_mean", "kl"), ("parity_kl_mean", "parity_kl")):
        values = [x for s in log["sequences"] for x in s[parts]]
        log[key] = None if None in values else float(np.mean(values))
    for key, parts in (("top1_agreement", "top1"), ("parity_top1_agreement", "parity_top1")):
        log[key] = float(np.mean([x for s in log["sequences"] for x in s[parts]]))
    checks = measure(bundle, golden or read_golden(bundle), log)
    log["checks"] = [
        {"name": c.name.removeprefix("device."), "value": c.value, "limit": c.limit, "verdict": c.verdict}
        for c in checks
    ]
    log["verdict"] = "pass" if all(c.verdict == "pass" for c in checks) else "fail"
    return log


def response(
    bundle: Bundle, challenge: dict[str, Any], logits: Sequence[Rows], **changes: Any
) -> dict[str, Any]:
    """The answer of a phone that computed `logits` on the challenge's sequences."""
    device, system, runtime = PHONES[challenge["target"]]
    return {
        "schema": "edgellama.response/1",
        "nonce": challenge["nonce"],
        "target": challenge["target"],
        "artifact_sha256": bundle.artifact_sha256(challenge["target"]),
        "device": device,
        "os": system,
        "runtime": runtime,
        "sequences": answers(challenge, logits),
        "prefill_tok_s": 812.25,
        "decode_tok_s": 61.5,
        "load_ms": 240.75,
        "peak_bytes": 300_000_000,
    } | changes
