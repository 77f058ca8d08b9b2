"""Attribution of the error to parts of the model: `validate --layers`.

Three views of one quantized model, computed in torch on the same windows:

- The *curve* is the SQNR of the hidden states after each part, against the full-precision model.
- The *causal* numbers change one part alone. One is the fall of the KL when the part is restored to float.
  The other is the KL when only this part is quantized.
- The *split* divides the whole loss into the shares of weights, int8 activations and lowering.

Parts are the embedding, every decoder layer, and the head with the final norm. A layer includes its norms,
because scaling is folded within it. All variants pass through the layers side by side, so each layer is
dequantized once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.gate.metrics import clustered_mean
from edgellama.host.progress import Progress
from edgellama.host.threads import Workers, workers
from edgellama.model.activations import ActivationRounding
from edgellama.model.layer_pass import States
from edgellama.model.layerwise import Float, LayerwiseModel, _kl
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.report.tables import to_text
from edgellama.runtimes.base import Runtime
from edgellama.text.windows import Window

WINDOWS, TOKENS = 8, 64  # clusters for the intervals, and positions in each


@torch.no_grad()
def attribute_error(
    full: StreamedLlama,
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
        full: the full-precision model, rotated if the recipe rotates.
        quantized: the quantized torch model.
        recipe: recipe of `quantized`.
        windows: windows of evaluation text. Intervals are clustered by window.
        rounding: the target's rounding of the linears' inputs; None if it leaves them in float.
        artifact: the artifact that `quantized` was lowered to; None leaves the lowering out of the split.
        progress: reporter of stages; None for a silent one.
    """
    progress = progress or Progress()
    count = full.config.num_hidden_layers
    full.load_tables()
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(count)), "lm_head"]
    with workers() as pool, progress.bar("layers", count, "layer") as bar:
        float_model, target_model = (
            LayerwiseModel(full.model, {}, pool),
            LayerwiseModel.as_target(quantized, recipe, rounding, pool),
        )
        weights_model = LayerwiseModel(quantized, {}, pool)
        tokens = [window.tokens for window in windows]
        reference, candidate = float_model.embed(tokens), target_model.embed(tokens)
        weights_states = candidate
        curve = [_sqnr(reference, candidate)]
        # For each part so far: states with it alone in float, and with it alone quantized.
        restored, alone = [reference], [candidate]
        for index, _ in enumerate(full.layers()):
            (next_reference,) = float_model.layer(index, [reference])
            (next_candidate,) = target_model.layer(index, [candidate])
            (newly_restored,) = float_model.layer(index, [candidate])
            (newly_alone,) = target_model.layer(index, [reference])
            restored = [*target_model.layer(index, restored), newly_restored]
            alone = [*float_model.layer(index, alone), newly_alone]
            (weights_states,) = weights_model.layer(index, [weights_states])
            reference, candidate = next_reference, next_candidate
            curve.append(_sqnr(reference, candidate))
            bar.update(1)
        logs = _logs(full.model, reference, pool)
        (target_kl,) = target_model.kl([candidate], logs)
        (weights_kl,) = weights_model.kl([weights_states], logs)
        restored_kl = [*target_model.kl(restored, logs), *float_model.kl([candidate], logs)]
        alone_kl = [*float_model.kl(alone, logs), *target_model.kl([reference], logs)]
    parts, strata = [], [window.domain for window in windows]
    for i, name in enumerate(names):
        gain = clustered_mean([a - b for a, b in zip(target_kl, restored_kl[i], strict=True)], strata)
        parts.append(
            {
                "part": name,
                "sqnr_db": curve[i] if i < len(curve) else None,
                **clustered_mean(alone_kl[i], strata).fields("kl_alone"),
                **gain.fields("kl_restored"),
            }
        )
    artifact_kl = None if artifact is None else _artifact_kl(artifact, windows, logs)
    split = _split(target_kl, weights_kl, artifact_kl, strata)
    return {
        "tokens": sum(len(w) for w in target_kl),
        "windows": len(target_kl),
        "split": split,
        "parts": parts,
    }


def worst(section: Mapping[str, Any]) -> str:
    """Name of the part with the largest KL when it alone is quantized."""
    part: str = max(section["parts"], key=lambda row: row["kl_alone"])["part"]
    return part


def describe(section: Mapping[str, Any]) -> str:
    """The section as tables in text."""

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
        {"loss": name, "KL": cell(loss["kl"], loss["kl_ci95"])} for name, loss in section["split"].items()
    ]
    return to_text({"tokens": section["tokens"], "where the error comes from": split, "by part": rows})


def _split(
    whole: list[Float], weights: list[Float], artifact: list[Float] | None, strata: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The whole loss and the share of each step, as paired differences of the KL."""
    steps = {
        "weights": weights,
        "activations": [a - b for a, b in zip(whole, weights, strict=True)],
    }
    if artifact is not None:
        steps["lowering"] = [a - b for a, b in zip(artifact, whole, strict=True)]
    steps["all"] = whole if artifact is None else artifact
    return {name: clustered_mean(values, strata).fields("kl") for name, values in steps.items()}


def _artifact_kl(artifact: Runtime, windows: Sequence[Window], logs: list[Tensor]) -> list[Float]:
    kl_by_window = []
    for window, reference in zip(windows, logs, strict=True):
        artifact.reset()
        kl_by_window.append(_kl(reference, artifact.forward_all(window.tokens).log_softmax(-1)))
    return kl_by_window


def _logs(full: Llama, states: States, pool: Workers) -> list[Tensor]:
    """Log-probabilities of the full-precision model, float32 [T, vocab_size]."""
    return list(pool.map(lambda x: full.lm_head(full.model.norm(x)).log_softmax(-1), states))


def _sqnr(reference: States, candidate: States) -> float | None:
    """Signal-to-noise ratio over all windows, dB; None if noise or signal is zero."""
    noise = sum(float((a - b).double().square().sum()) for a, b in zip(reference, candidate, strict=True))
    signal = sum(float(a.double().square().sum()) for a in reference)
    return 10 * math.log10(signal / noise) if noise and signal else None
