"""Record golden vectors: what the reference and every artifact of a bundle say about the golden sequences.

A phone computes the artifact in other kernels, whose sums round differently, and int8 activations amplify that as
they amplify any noise (edgellama.gate.parity). So the limits follow from a noise floor measured here, on the very
positions that are scored: the quantized torch model against itself with 1e-6 relative noise, its inputs rounded as
the target rounds them. A passed gate is no condition: a bundle that was exported without validation has golden vectors too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
from edgellama.gate.golden_sequences import choose_sequences, top_k
from edgellama.gate.limits import parity_limit
from edgellama.host.threads import one_thread, workers
from edgellama.model.activations import ActivationRounding
from edgellama.model.layerwise import LayerwiseModel, layer_of, run_layer
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.load import load
from edgellama.targets import find_target
from edgellama.text.chat import ChatFormat
from edgellama.text.windows import default_texts


@one_thread()
def record_golden(
    bundle: Bundle,
    checkpoint: Checkpoint,
    quantized: Llama | None,
    *,
    before: Golden | None = None,
    kept: Collection[str] = (),
) -> None:
    """Write golden/ into the bundle's directory; its manifest is to be written again afterwards.

    quantized: the quantized torch model that the bundle's artifacts were lowered from; None where all are in `kept`.
    before: golden vectors of the same quantized model, from which the reference is taken, and the artifacts in `kept`.
    """
    flat = bundle.manifest["chat"]["format"]
    sequences = choose_sequences(
        bundle.tokenizer,
        None if flat is None else ChatFormat.from_dict(flat),
        default_texts(),
        bundle.context_length,
    )
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
        with load(bundle, name) as runtime:
            logits = [feed(runtime, sequence) for sequence in sequences]
            artifacts[name] = {"sha256": bundle.artifact_sha256(name), "runtime": runtime.name}
        expected[name] = Expectation.joined(Expectation.of(rows, k) for rows in logits)
        artifacts[name] |= _accuracy(reference, logits)
        mean, worst = _noise_floor(quantized, bundle.recipe, target.rounding(bundle.recipe), sequences, k)
        artifacts[name] |= {"noise_floor_kl_mean": mean, "noise_floor_kl_sequence": worst}
        limits[name] = {
            "parity_kl_mean": parity_limit(mean, target.parity_kl),
            "parity_kl_sequence": parity_limit(worst, target.parity_kl),
        }
    write_golden(bundle.path, sequences, expected, artifacts, limits)


def feed(runtime: Runtime, sequence: GoldenSequence) -> Rows:
    """Logits at the scored positions, float32 [scored, vocab_size], as a phone feeds them: the tokens up to the
    first scored position at once (prefill), the others one by one (decode)."""
    runtime.reset()
    first = sequence.score_from + 1
    rows = [runtime.forward(sequence.tokens[:first]).copy()]
    rows += [runtime.forward([token]).copy() for token in sequence.tokens[first:]]
    return np.stack(rows)


def _reference(
    checkpoint: Checkpoint, sequences: list[GoldenSequence], context_length: int, k: int
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


@torch.no_grad()
def _noise_floor(
    quantized: Llama,
    recipe: Recipe,
    rounding: ActivationRounding | None,
    sequences: list[GoldenSequence],
    k: int,
) -> tuple[float, float]:
    """KL of the quantized model to itself with noise: mean over positions, and of the worst sequence.

    All sequences pass through the layers side by side, without noise and with it, so that a layer's codes become
    floats once.
    """
    generator = torch.Generator().manual_seed(0)
    with workers() as pool:
        side = LayerwiseModel.as_target(quantized, recipe, rounding, pool)
        exact = side.embed([sequence.tokens for sequence in sequences])
        noisy = exact
        for index in range(quantized.config.num_hidden_layers):
            exact, noisy = side.layer(index, [exact, [parity.with_noise(x, generator) for x in noisy]])
        logits = side.head()
        floors: list[Float] = []
        for sequence, one, other in zip(sequences, exact, noisy, strict=True):
            expected = Expectation.of(logits(one[sequence.score_from :]).numpy(), k)
            floors.append(expected.kl(logits(other[sequence.score_from :]).numpy()))
    return float(np.concatenate(floors).mean()), max(float(floor.mean()) for floor in floors)


_ROWS = 8192  # of the head that are floats at a time


@torch.inference_mode()
def streamed_logits(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], first: Sequence[int], context_length: int
) -> list[npt.NDArray[np.float32]]:
    """Logits of each sequence's positions from its `first` on: float32 [positions, vocab_size].

    context_length: of the KV cache, as long as the longest sequence.
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
            decoder.layers[index] = nn.Identity()  # its weights are not needed again
    states = [decoder.norm(x[start:]) for x, start in zip(states, first, strict=True)]
    head = table if checkpoint.config.tie_word_embeddings else checkpoint.read("lm_head.weight")
    pieces = [rows.float() @ torch.cat(states).T for rows in head.split(_ROWS)]
    logits = torch.cat(pieces).T.contiguous()
    return [rows.numpy() for rows in logits.split([len(x) for x in states])]
