"""Where the error comes from: `validate --layers`.

Three views of one quantized model, in torch, on the same windows. The *curve* compares hidden states after each part
with the full-precision model's: how large the error has grown by there. The *causal* numbers change one part alone: by
how much the KL falls when it is restored to float, and the KL when nothing but it is quantized. The *split* says how
much of the whole loss is due to weights, to int8 activations, and to lowering.

Parts are the embedding, every decoder layer (with its norms, because scaling is folded within it), and the head with the
final norm. All variants pass through the layers side by side, each layer dequantized once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgellama.gate.metrics import clustered_mean
from edgellama.host.progress import Progress
from edgellama.host.threads import Workers, workers
from edgellama.model.activations import ActivationRounding
from edgellama.model.layerwise import Float, LayerwiseModel, States, _kl
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.report.tables import to_text
from edgellama.runtimes.base import Runtime
from edgellama.text.windows import Window

WINDOWS, TOKENS = 8, 64  # clusters for the intervals, and positions in each


@torch.no_grad()
def attribute_error(
    full: Llama,
    quantized: Llama,
    recipe: Recipe,
    windows: Sequence[Window],
    *,
    rounding: ActivationRounding | None,
    artifact: Runtime | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The section `layers` of a report.

    Args:
        rounding: what the target makes of the linears' inputs; None for nothing.
        artifact: what `quantized` was lowered to; None leaves the lowering out of the split.
    """
    progress = progress or Progress()
    count = full.config.num_hidden_layers
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(count)), "lm_head"]
    with workers() as pool, progress.bar("layers", count, "layer") as bar:
        one, other = (
            LayerwiseModel(full, {}, pool),
            LayerwiseModel.as_target(quantized, recipe, rounding, pool),
        )
        weights_only = LayerwiseModel(quantized, {}, pool)
        tokens = [window.tokens for window in windows]
        reference, candidate = one.embed(tokens), other.embed(tokens)
        plain = candidate
        curve = [_sqnr(reference, candidate)]
        restored, alone = [reference], [candidate]  # by part: all others quantized, or none
        for index in range(count):
            (next_reference,) = one.layer(index, [reference])
            (next_candidate,) = other.layer(index, [candidate])
            (restored_here,) = one.layer(index, [candidate])
            (alone_here,) = other.layer(index, [reference])
            restored = [*other.layer(index, restored), restored_here]
            alone = [*one.layer(index, alone), alone_here]
            (plain,) = weights_only.layer(index, [plain])
            reference, candidate = next_reference, next_candidate
            curve.append(_sqnr(reference, candidate))
            bar.update(1)
        logs = _logs(full, reference, pool)
        (whole,) = other.kl([candidate], logs)
        (weights,) = weights_only.kl([plain], logs)
        without = [*other.kl(restored, logs), *one.kl([candidate], logs)]
        only = [*one.kl(alone, logs), *other.kl([reference], logs)]
    parts = []
    for i, name in enumerate(names):
        gain = clustered_mean([a - b for a, b in zip(whole, without[i], strict=True)])
        parts.append(
            {
                "part": name,
                "sqnr_db": curve[i] if i < len(curve) else None,
                **clustered_mean(only[i]).fields("kl_alone"),
                **gain.fields("kl_restored"),
            }
        )
    split = _split(whole, weights, None if artifact is None else _artifact_kl(artifact, windows, logs))
    return {"tokens": sum(len(w) for w in whole), "windows": len(whole), "split": split, "parts": parts}


def worst(section: Mapping[str, Any]) -> str:
    """The part that costs most when it alone is quantized."""
    part: str = max(section["parts"], key=lambda row: row["kl_alone"])["part"]
    return part


def describe(section: Mapping[str, Any]) -> str:
    """The section as tables for people."""

    def cell(value: float, interval: Sequence[float]) -> str:
        return f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"

    rows = [
        {
            "part": row["part"],
            "SQNR after it, dB": "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
            "KL of it alone": cell(row["kl_alone"], row["kl_alone_ci95"]),
            "KL won by restoring it": cell(row["kl_restored"], row["kl_restored_ci95"]),
        }
        for row in section["parts"]
    ]
    split = [
        {"loss": name, "KL": cell(found["kl"], found["kl_ci95"])} for name, found in section["split"].items()
    ]
    return to_text({"tokens": section["tokens"], "where the error comes from": split, "by part": rows})


def _split(
    whole: list[Float], weights: list[Float], artifact: list[Float] | None
) -> dict[str, dict[str, Any]]:
    """The whole loss, and what each step adds to it: paired differences of the KL."""
    steps = {
        "weights": weights,
        "activations": [a - b for a, b in zip(whole, weights, strict=True)],
    }
    if artifact is not None:
        steps["lowering"] = [a - b for a, b in zip(artifact, whole, strict=True)]
    steps["all"] = whole if artifact is None else artifact
    return {name: clustered_mean(values).fields("kl") for name, values in steps.items()}


def _artifact_kl(artifact: Runtime, windows: Sequence[Window], logs: list[Tensor]) -> list[Float]:
    found = []
    for window, reference in zip(windows, logs, strict=True):
        artifact.reset()
        found.append(_kl(reference, artifact.forward_all(window.tokens).log_softmax(-1)))
    return found


def _logs(full: Llama, states: States, pool: Workers) -> list[Tensor]:
    """Log-probabilities of the full-precision model, float32 [T, vocab_size]."""
    return list(pool.map(lambda x: full.lm_head(full.model.norm(x)).log_softmax(-1), states))


def _sqnr(reference: States, candidate: States) -> float | None:
    """Signal to noise over all windows, dB; None where they are equal."""
    noise = sum(float((a - b).double().square().sum()) for a, b in zip(reference, candidate, strict=True))
    signal = sum(float(a.double().square().sum()) for a in reference)
    return 10 * math.log10(signal / noise) if noise and signal else None
