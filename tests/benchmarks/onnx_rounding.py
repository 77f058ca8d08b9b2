"""Quality and noise floor of a bundle's quantized model under every rounding that a target meets.

    python -m tests.benchmarks.onnx_rounding BUNDLE CHECKPOINT [--tokens 4096]

The roundings are those of the kernels: MatMulNBits per block (x86-64, and Arm with the session entry),
MatMulNBits per row for int4 and per block for int8 (KleidiAI), per row everywhere (XNNPACK), and none (Arm without
dotprod). torch computes them all on the same windows, so differences are paired. The floors are those of the golden
vectors: the model against itself with noise, on the golden sequences. The distances are those of a device log: KL
from the model per block, on the golden sequences that emulation runs. `--tokens 0` measures the distances alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from edgellama.bundle import Bundle
from edgellama.bundle.golden import Expectation, GoldenSequence, Rows, read_golden
from edgellama.bundle.restore import restored_llama
from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.gate.emulation import MOST_TOKENS
from edgellama.gate.golden import noise_floor
from edgellama.gate.limits import parity_limit
from edgellama.gate.metrics import clustered_mean
from edgellama.gate.references import QuantizedReference
from edgellama.host.threads import one_thread, workers
from edgellama.model.activations import INT8_PER_TOKEN
from edgellama.model.layerwise import LayerwiseModel
from edgellama.model.llama import Llama
from edgellama.targets import find_target
from edgellama.targets.onnx.families import FLOAT, PER_BLOCK, PER_ROW
from edgellama.targets.onnx.numerics import ROUNDINGS as ONNX_ROUNDINGS
from edgellama.targets.onnx.target import OnnxTarget
from edgellama.text.windows import WINDOW, default_texts, windows

ROUNDINGS = {
    "per block": ONNX_ROUNDINGS[PER_BLOCK],
    "int4 per row, int8 per block": ONNX_ROUNDINGS[PER_ROW],
    "per row": INT8_PER_TOKEN,
    "float": ONNX_ROUNDINGS[FLOAT],
}


def golden_rows(model: LayerwiseModel, sequences: Sequence[GoldenSequence]) -> list[Rows]:
    """Logits at the scored positions of each sequence, float32 [scored, vocab_size]."""
    states = model.embed([sequence.tokens for sequence in sequences])
    for index in range(model.model.config.num_hidden_layers):
        (states,) = model.layer(index, [states])
    logits = model.head()
    pairs = zip(states, sequences, strict=True)
    return [logits(x[sequence.score_from :]).numpy() for x, sequence in pairs]


def distances(quantized: Llama, bundle: Bundle) -> None:
    """Prints the KL from the model per block to every other rounding."""
    golden = read_golden(bundle)
    sequences = [s for s in golden.sequences if len(s.tokens) <= MOST_TOKENS]
    host: list[Expectation] = []
    with workers() as pool:
        for name, rounding in ROUNDINGS.items():
            model = LayerwiseModel.as_target(quantized, bundle.recipe, rounding, pool)
            rows = golden_rows(model, sequences)
            host = host or [Expectation.of(x, golden.top_k) for x in rows]
            kl = [expected.kl(x) for expected, x in zip(host, rows, strict=True)]
            worst = max(float(x.mean()) for x in kl)
            print(
                f"{name}: KL from per block {np.concatenate(kl).mean():.4f}, worst sequence {worst:.4f}",
                flush=True,
            )


def quality(quantized: Llama, bundle: Bundle, checkpoint: Checkpoint, count: int) -> None:
    """Prints the KL from the full-precision model on `count` windows, paired, and the noise floors."""
    scored = list(islice(windows(default_texts(), bundle.tokenizer, WINDOW), count))
    tokens = [window.tokens for window in scored]
    full = StreamedLlama(checkpoint)
    full.read_ahead(tokens)
    reference = [full.logits(window).log_softmax(-1) for window in tokens]
    kl = {}
    with workers() as pool:
        for name, rounding in ROUNDINGS.items():
            model = LayerwiseModel.as_target(quantized, bundle.recipe, rounding, pool)
            states = model.embed(tokens)
            for index in range(quantized.config.num_hidden_layers):
                (states,) = model.layer(index, [states])
            (kl[name],) = model.kl([states], reference)
    domains = [str(window.domain) for window in scored]
    golden = read_golden(bundle)
    for name, rounding in ROUNDINGS.items():
        mean = clustered_mean(kl[name], domains)
        pairs = [now - first for now, first in zip(kl[name], kl["per block"], strict=True)]
        difference = clustered_mean(pairs, domains)
        replica = QuantizedReference(quantized, bundle.recipe, find_target("onnx"))
        replica.rounding = rounding
        floors = noise_floor(replica, golden.sequences, golden.top_k)
        limits = [parity_limit(floor, OnnxTarget.parity_kl) for floor in floors]
        print(
            f"{name}: KL {mean.mean:.4f} [{mean.low:.4f}, {mean.high:.4f}], "
            f"minus per block {difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]; "
            f"floor {floors[0]:.3g}, worst sequence {floors[1]:.3g}; limits {limits[0]:.3g}, {limits[1]:.3g}",
            flush=True,
        )


@one_thread()
@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    quantized = restored_llama(bundle, find_target(bundle.targets[0]))
    distances(quantized, bundle)
    if args.tokens:
        quality(quantized, bundle, open_checkpoint(args.checkpoint), -(-args.tokens // WINDOW))


if __name__ == "__main__":
    main()
