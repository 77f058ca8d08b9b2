"""Recording of golden vectors: logits of the reference and of every artifact on the golden sequences.

A phone runs the artifact in other kernels, whose sums round differently. Int8 activations amplify the
difference (edgellama.gate.parity). The limits therefore follow from a noise floor, measured here on the
scored positions. It is the KL of the quantized torch model to itself with noise (`Target.noise`), with its
inputs rounded as the target rounds them. Bundles that were exported without validation have
golden vectors too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgellama.bundle import Bundle
from edgellama.bundle.golden import REFERENCE, Expectation, Float, Golden, GoldenSequence, Rows, write_golden
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import layer_prefixes, load_weights
from edgellama.gate import parity
from edgellama.gate.effort import effort_for
from edgellama.gate.golden_sequences import choose_sequences, top_k
from edgellama.gate.limits import parity_limit
from edgellama.host.threads import one_thread, workers
from edgellama.model.layerwise import LayerwiseModel, layer_of, run_layer
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.load import load
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import Target, find_target
from edgellama.text.chat import ChatFormat
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import default_texts

PREFILL_PIECE = 512  # tokens of a call, as in the apps


@one_thread()
def record_golden(
    bundle: Bundle,
    checkpoint: Checkpoint,
    quantized: Llama | None,
    *,
    before: Golden | None = None,
    kept: Collection[str] = (),
) -> None:
    """Writes golden/ into the bundle's directory. The caller writes the manifest again afterwards.

    Args:
        bundle: the bundle, its artifacts in place.
        checkpoint: the full-precision checkpoint.
        quantized: the torch model that the artifacts were lowered from; None if all targets are in `kept`.
        before: golden vectors of the same quantized model; None to record everything again.
        kept: targets whose vectors are copied from `before`. The reference's are copied as well.
    """
    sequences = golden_sequences(bundle, bundle.tokenizer)
    k = top_k(bundle.config.vocab_size)
    if before is None:
        kept, reference = (), _reference(checkpoint, sequences, bundle.context_length, k)
    else:
        reference = [before.expected[REFERENCE][before.rows(n)] for n in range(len(sequences))]
    expected = {REFERENCE: Expectation.joined(reference)}
    artifacts: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for name in bundle.targets:
        target = find_target(name)
        if before is not None and name in kept:
            expected[name] = before.expected[name]
            artifacts[name], limits[name] = before.data["artifacts"][name], before.limits(name)
            continue
        assert quantized is not None
        with _recorder(bundle, target, quantized) as runtime:
            logits = [feed(runtime, sequence) for sequence in sequences]
            artifacts[name] = {"sha256": bundle.artifact_sha256(name), "runtime": runtime.name}
        expected[name] = Expectation.joined(Expectation.of(rows, k) for rows in logits)
        artifacts[name] |= accuracy(reference, logits)
        mean, worst = noise_floor(quantized, bundle.recipe, target, sequences, k)
        artifacts[name] |= {"noise_floor_kl_mean": mean, "noise_floor_kl_sequence": worst}
        limits[name] = {
            "parity_kl_mean": parity_limit(mean, target.device_kl),
            "parity_kl_sequence": parity_limit(worst, target.device_kl),
        }
    write_golden(bundle.path, sequences, expected, artifacts, limits)


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


def _reference(
    checkpoint: Checkpoint, sequences: list[GoldenSequence], context_length: int, k: int
) -> list[Expectation]:
    length = min(context_length, max(len(sequence.tokens) for sequence in sequences))
    tokens = [sequence.tokens for sequence in sequences]
    logits = streamed_logits(checkpoint, tokens, [sequence.score_from for sequence in sequences], length)
    return [Expectation.of(rows, k) for rows in logits]


def accuracy(reference: list[Expectation], logits: list[Rows]) -> dict[str, float]:
    """`kl_mean` and `top1_agreement` of a model with the reference, over the positions of all sequences."""
    pairs = list(zip(reference, logits, strict=True))
    kl = np.concatenate([expectation.kl(rows) for expectation, rows in pairs])
    top1 = np.concatenate([expectation.top1(rows) for expectation, rows in pairs])
    return {"kl_mean": float(kl.mean()), "top1_agreement": float(top1.mean())}


@torch.no_grad()
def noise_floor(
    quantized: Llama,
    recipe: Recipe,
    target: Target,
    sequences: list[GoldenSequence],
    k: int,
) -> tuple[float, float]:
    """KL of the quantized model to itself with noise, nats: mean of all positions and of the worst sequence.

    All sequences pass through the layers side by side, with noise and without, so that each layer is
    dequantized once.
    """
    generator = torch.Generator().manual_seed(0)
    with workers() as pool:
        layerwise = LayerwiseModel.as_target(quantized, recipe, target.rounding(recipe), pool)
        exact = layerwise.embed([sequence.tokens for sequence in sequences])
        noisy = exact
        for index in range(quantized.config.num_hidden_layers):
            noisy = [parity.with_noise(x, generator, target.noise) for x in noisy]
            exact, noisy = layerwise.layer(index, [exact, noisy])
        logits = layerwise.head()
        floors: list[Float] = []
        for sequence, exact_states, noisy_states in zip(sequences, exact, noisy, strict=True):
            expected = Expectation.of(logits(exact_states[sequence.score_from :]).numpy(), k)
            floors.append(expected.kl(logits(noisy_states[sequence.score_from :]).numpy()))
    return float(np.concatenate(floors).mean()), max(float(floor.mean()) for floor in floors)


_ROWS = 8192  # of the head that are converted to float32 at a time


@torch.inference_mode()
def streamed_logits(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], first: Sequence[int], context_length: int
) -> list[npt.NDArray[np.float32]]:
    """Logits of the full-precision model, float32 [positions, vocab_size] for each sequence.

    Weights are read layer by layer.

    Args:
        checkpoint: the full-precision checkpoint.
        sequences: token ids.
        first: first position to return, for each sequence.
        context_length: length of the KV cache, at least that of the longest sequence.
    """
    with torch.device("meta"):
        model = Llama(checkpoint.config, context_length)
    load_weights(model, checkpoint, "model.norm.")
    decoder = model.model
    table = checkpoint.read("model.embed_tokens.weight")
    states = [table[torch.tensor(tokens)].float() for tokens in sequences]
    with workers() as pool:
        for index, prefix in enumerate(layer_prefixes(checkpoint)):
            load_weights(model, checkpoint, prefix)
            states = run_layer(layer_of(model, index), states, checkpoint.config, {}, pool, lambda *_: None)
            decoder.layers[index] = nn.Identity()  # frees the layer's weights
    states = [decoder.norm(x[start:]) for x, start in zip(states, first, strict=True)]
    head = table if checkpoint.config.tie_word_embeddings else checkpoint.read("lm_head.weight")
    pieces = [rows.float() @ torch.cat(states).T for rows in head.split(_ROWS)]
    logits = torch.cat(pieces).T.contiguous()
    return [rows.numpy() for rows in logits.split([len(x) for x in states])]
