"""Record golden vectors: what the reference and every artifact of a bundle say about the golden sequences.

A phone computes the artifact in other kernels, whose sums round differently, and int8 activations amplify that as
they amplify any noise (edgellama.parity). So the limits follow from a noise floor measured here, on the very
positions that are scored: the quantized torch model against itself with 1e-6 relative noise, under the target's
numerics. A passed gate is no condition: a bundle that was exported without validation has golden vectors too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellama import parity
from edgellama.bundle import Bundle
from edgellama.chat import ChatFormat
from edgellama.checkpoint import Checkpoint
from edgellama.export.golden import choose_sequences, top_k, write_golden
from edgellama.golden import REFERENCE, Expectation, Float, Rows, Sequence
from edgellama.llama import Llama
from edgellama.load import load
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.streamed import streamed_logits
from edgellama.targets import find_target
from edgellama.text import default_texts


def record_golden(bundle: Bundle, checkpoint: Checkpoint, quantized: Llama) -> None:
    """Write golden/ into the bundle's directory; its manifest is to be written again afterwards.

    quantized: the quantized torch model that the bundle's artifacts were lowered from.
    """
    flat = bundle.manifest["chat"]["format"]
    sequences = choose_sequences(
        bundle.tokenizer,
        None if flat is None else ChatFormat.from_dict(flat),
        default_texts(),
        bundle.context_length,
    )
    k = top_k(bundle.config.vocab_size)
    reference = _reference(checkpoint, sequences, bundle.context_length, k)
    expected = {REFERENCE: Expectation.joined(reference)}
    artifacts: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for name in bundle.targets:
        row = find_target(name)
        with load(bundle, name) as runtime:
            logits = [feed(runtime, sequence) for sequence in sequences]
            artifacts[name] = {"sha256": bundle.artifact_sha256(name), "runtime": runtime.name}
        expected[name] = Expectation.joined(Expectation.of(rows, k) for rows in logits)
        artifacts[name] |= _accuracy(reference, logits)
        mean, worst = _noise_floor(quantized, row.numerics_for(bundle.recipe), sequences, k)
        artifacts[name] |= {"noise_floor_kl_mean": mean, "noise_floor_kl_sequence": worst}
        limits[name] = {
            "parity_kl_mean": parity.limit(mean, row.parity_kl),
            "parity_kl_sequence": parity.limit(worst, row.parity_kl),
        }
    write_golden(bundle.path, sequences, expected, artifacts, limits)


def feed(runtime: Runtime, sequence: Sequence) -> Rows:
    """Logits at the scored positions, float32 [scored, vocab_size], as a phone feeds them: the tokens up to the
    first scored position at once (prefill), the others one by one (decode)."""
    runtime.reset()
    first = sequence.score_from + 1
    rows = [runtime.forward(sequence.tokens[:first]).copy()]
    rows += [runtime.forward([token]).copy() for token in sequence.tokens[first:]]
    return np.stack(rows)


def _reference(
    checkpoint: Checkpoint, sequences: list[Sequence], context_length: int, k: int
) -> list[Expectation]:
    length = min(context_length, max(len(sequence.tokens) for sequence in sequences))
    tokens = [sequence.tokens for sequence in sequences]
    logits = streamed_logits(checkpoint, tokens, [sequence.score_from for sequence in sequences], length)
    return [Expectation.of(rows, k) for rows in logits]


def _accuracy(reference: list[Expectation], logits: list[Rows]) -> dict[str, float]:
    pairs = list(zip(reference, logits, strict=True))
    kl = np.concatenate([expectation.kl(rows) for expectation, rows in pairs])
    top1 = np.concatenate([expectation.top1(rows) for expectation, rows in pairs])
    return {"kl_mean": float(kl.mean()), "top1_agreement": float(top1.mean())}


def _noise_floor(
    quantized: Llama, numerics: parity.Numerics, sequences: list[Sequence], k: int
) -> tuple[float, float]:
    """KL of the quantized model to itself with noise: mean over positions, and of the worst sequence."""
    runtime = ReferenceRuntime(quantized)
    floors: list[Float] = []
    with numerics(quantized):
        for seed, sequence in enumerate(sequences):
            exact = Expectation.of(_all_at_once(runtime, sequence), k)
            with parity.perturbed(quantized, seed=seed):
                floors.append(exact.kl(_all_at_once(runtime, sequence)))
    return float(np.concatenate(floors).mean()), max(float(floor.mean()) for floor in floors)


def _all_at_once(runtime: ReferenceRuntime, sequence: Sequence) -> Rows:
    runtime.reset()
    rows: Rows = runtime.forward_all(sequence.tokens)[sequence.score_from :].numpy()
    return rows
