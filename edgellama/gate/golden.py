"""Recording of golden vectors: logits of the reference and of every artifact on the golden sequences.

A phone runs the artifact in other kernels, whose sums round differently. Int8 activations amplify the
difference (edgellama.gate.parity). The limits therefore follow from a noise floor, measured here on the
scored positions. It is the KL of the quantized torch model to itself with noise (`Target.noise`), with its
inputs rounded as the target rounds them. Bundles that were exported without validation have
golden vectors too.

Where processors round in different ways, this machine runs the artifact for one family of them. The rows of the
others are those of a replica (edgellama.gate.references), with a noise floor and limits of their own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.golden import (
    REFERENCE,
    Expectation,
    Golden,
    GoldenSequence,
    Rows,
    rows_of,
    write_golden,
)
from edgellama.checkpoints.streamed import StreamedLlama, Wanted
from edgellama.gate.effort import effort_for
from edgellama.gate.golden_sequences import choose_sequences, top_k
from edgellama.gate.limits import parity_limit
from edgellama.gate.references import QuantizedReference, References
from edgellama.host.threads import one_thread
from edgellama.model.activations import NO_ROUNDING
from edgellama.model.llama import Llama
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.load import load
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import Target, find_target
from edgellama.targets.families import Family
from edgellama.text.chat import ChatFormat
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import default_texts

# Tokens of a position that the rows of other families keep: a quarter of TOP_K, so that they stay small.
FAMILY_TOP_K = 64
PREFILL_PIECE = 512  # tokens of a call, as in the apps


@one_thread()
def record_golden(
    bundle: Bundle,
    references: References,
    *,
    before: Golden | None = None,
    kept: Collection[str] = (),
) -> None:
    """Writes golden/ into the bundle's directory. The caller writes the manifest again afterwards.

    Args:
        bundle: the bundle, its artifacts in place.
        references: the full-precision model, and the one that the artifacts were lowered from. The second may
            be None if all targets are in `kept`.
        before: golden vectors of the same quantized model; None to record everything again.
        kept: targets whose vectors are copied from `before`. The reference's are copied as well.
    """
    sequences = golden_sequences(bundle, bundle.tokenizer)
    k = top_k(bundle.config.output_size)
    if before is None:
        kept = ()
        reference = [Expectation.of(rows, k) for rows in scored_logits(references.full, sequences)]
    else:
        reference = [before.expected[REFERENCE][before.rows(n)] for n in range(len(sequences))]
    expected = {REFERENCE: Expectation.joined(reference)}
    artifacts: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for name in bundle.targets:
        target = find_target(name)
        if before is not None and name in kept:
            families = (rows_of(name, family) for family in before.other_families(name))
            expected |= {key: before.expected[key] for key in (name, *families)}
            artifacts[name], limits[name] = before.data["artifacts"][name], before.limits(name)
            continue
        quantized = references.quantized
        assert quantized is not None
        with _recorder(bundle, target, quantized) as runtime:
            logits = [feed(runtime, sequence) for sequence in sequences]
            artifacts[name] = {"sha256": bundle.artifact_sha256(name), "runtime": runtime.name}
        expected[name] = Expectation.joined(Expectation.of(rows, k) for rows in logits)
        artifacts[name] |= accuracy(reference, logits)
        mean, worst = noise_floor(references.of_target(quantized, bundle.recipe, target), sequences, k)
        artifacts[name] |= {"noise_floor_kl_mean": mean, "noise_floor_kl_sequence": worst}
        limits[name] = limits_of(mean, worst, target)
        if (here := target.family_here(bundle.recipe)) is not None:
            artifacts[name] |= {"family": here.name, "families": {}}
            for family in target.other_families(bundle.recipe):
                replica = QuantizedReference(quantized, bundle.recipe, target, family)
                rows, entry = _family(replica, family, sequences, reference)
                expected[rows_of(name, family.name)] = rows
                artifacts[name]["families"][family.name] = entry
    write_golden(bundle.path, sequences, expected, artifacts, limits)


def limits_of(mean: float, worst: float, target: Target) -> dict[str, float]:
    """Limits of a device (golden.schema.json) for a noise floor: its mean and that of the worst sequence, nats."""
    return {
        "parity_kl_mean": parity_limit(mean, target.device_kl),
        "parity_kl_sequence": parity_limit(worst, target.device_kl),
    }


def _family(
    replica: QuantizedReference,
    family: Family,
    sequences: list[GoldenSequence],
    reference: list[Expectation],
) -> tuple[Expectation, dict[str, Any]]:
    """Rows of a family that this machine does not belong to, and its entry in golden.json."""
    k = min(FAMILY_TOP_K, reference[0].ids.shape[1])
    # Without rounding nothing amplifies noise, so the target's own limit holds.
    rounds = replica.rounding not in (None, NO_ROUNDING)
    mean, worst = noise_floor(replica, sequences, k) if rounds else (math.nan, math.nan)
    logits = scored_logits(replica, sequences)
    entry = {
        "processors": list(family.processors),
        "top_k": k,
        **accuracy(reference, logits),
        "noise_floor_kl_mean": mean,
        "noise_floor_kl_sequence": worst,
        "limits": limits_of(mean, worst, replica.target),
    }
    return Expectation.joined(Expectation.of(rows, k) for rows in logits), entry


@contextmanager
def _recorder(bundle: Bundle, target: Target, quantized: Llama) -> Iterator[Runtime]:
    """Runtime whose logits are recorded: the artifact's own.

    Where it is slow, the quantized torch model with the target's arithmetic stands in, under a name of its
    own. Parity holds the two together, and the gate compares the short sequences with the artifact.
    """
    if effort_for(target).golden_tokens is None:
        with load(bundle, target.name) as runtime:
            yield runtime
    else:
        with target.arithmetic(quantized, bundle.recipe):
            yield ReferenceRuntime(quantized, name=f"torch-{target.name}")


def golden_sequences(bundle: Bundle, tokenizer: Tokenizer) -> list[GoldenSequence]:
    """The sequences of a bundle. tokenizer: the bundle's own or the checkpoint's."""
    format_data = bundle.manifest["chat"]["format"]
    return choose_sequences(
        tokenizer,
        None if format_data is None else ChatFormat.from_dict(format_data),
        default_texts(),
        bundle.context_length,
        bundle.chat_date,
    )


def feed(runtime: Runtime, sequence: GoldenSequence) -> Rows:
    """Logits at the scored positions, float32 [scored, vocab_size], computed in the order that a phone uses.

    The tokens up to the first scored position are prefill, in pieces of `PREFILL_PIECE`. Each later token is a
    decode step.
    """
    runtime.reset()
    first = sequence.score_from + 1
    for start in range(0, first, PREFILL_PIECE):
        logits = runtime.forward(sequence.tokens[start : min(start + PREFILL_PIECE, first)]).copy()
    rows = [logits]
    rows += [runtime.forward([token]).copy() for token in sequence.tokens[first:]]
    return np.stack(rows)


def scored_logits(
    model: StreamedLlama | QuantizedReference, sequences: Sequence[GoldenSequence]
) -> list[Rows]:
    """Logits at the scored positions of each sequence, float32 [scored, vocab_size]."""
    return [rows.numpy() for rows in model.logits_of(_scored_rows(sequences))]


def _scored_rows(sequences: Sequence[GoldenSequence]) -> list[Wanted]:
    return [(sequence.tokens, slice(sequence.score_from, None)) for sequence in sequences]


def accuracy(reference: list[Expectation], logits: list[Rows]) -> dict[str, float]:
    """`kl_mean` and `top1_agreement` of a model with the reference, over the positions of all sequences."""
    pairs = list(zip(reference, logits, strict=True))
    kl = np.concatenate([expectation.kl(rows) for expectation, rows in pairs])
    top1 = np.concatenate([expectation.top1(rows) for expectation, rows in pairs])
    return {"kl_mean": float(kl.mean()), "top1_agreement": float(top1.mean())}


def noise_floor(
    reference: QuantizedReference, sequences: Sequence[GoldenSequence], k: int
) -> tuple[float, float]:
    """KL of the quantized model to itself with noise, nats: mean of all positions and of the worst sequence."""
    disturbed = reference.logits_of(_scored_rows(sequences), noisy=True)
    pairs = zip(scored_logits(reference, sequences), disturbed, strict=True)
    floors = [Expectation.of(rows, k).kl(noisy.numpy()) for rows, noisy in pairs]
    return float(np.concatenate(floors).mean()), max(float(floor.mean()) for floor in floors)
