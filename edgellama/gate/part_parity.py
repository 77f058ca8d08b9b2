"""Parity of parts: every layer of the file on its own, at the hidden states that the file itself computes.

Parity of the whole model has a noise floor that grows with depth. Here the input of each layer is taken from
a run of the file, and torch computes this one layer from it. What remains is the rounding noise of one
layer, about 1e-7, so that a wrong scale of attention shows at 1e-5.

The file's parts are not lowered again. Its program gets further outputs (a .pte or an ONNX graph) or the
interpreter keeps the values (Core ML). The last layer is compared together with the head, in logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.runtimes.parts import PartsRuntime
from edgellama.targets import Target

PREFILL, STEPS = 24, 4
NOISE = 1e-7  # relative, of the inputs


@dataclass(frozen=True)
class PartError:
    name: str
    error: Tensor  # relative error of each token, float32 [T]
    floor: Tensor


@torch.inference_mode()
def part_errors(
    runtime: PartsRuntime, quantized: Llama, target: Target, recipe: Recipe, calls: Sequence[Sequence[int]]
) -> list[list[PartError]]:
    generator = torch.Generator().manual_seed(0)
    position, results = 0, []
    layers = list(quantized.model.layers)
    for tokens in calls:
        states = runtime.states(tokens)
        errors = []
        with target.exact_arithmetic(quantized, recipe):
            decoder = quantized.model
            cos = decoder.cos.narrow(0, position, len(tokens))
            sin = decoder.sin.narrow(0, position, len(tokens))
            embedded = decoder.embed_tokens(torch.tensor(list(tokens)))
            errors.append(PartError("embedding", _relative(states.inputs[0], embedded, torch.zeros(())), torch.zeros(len(tokens))))
            for index, layer in enumerate(decoder.layers):
                x = states.inputs[index][None]
                noisy = x * (1 + NOISE * torch.randn(x.shape, generator=generator))
                disturbed, expected = layer(noisy, cos, sin, position), layer(x, cos, sin, position)
                if index + 1 < len(layers):
                    actual = states.inputs[index + 1]
                    base = x[0]
                else:
                    expected, disturbed = (
                        _centered(quantized.lm_head(decoder.norm(y[:, -1:]))) for y in (expected, disturbed)
                    )
                    actual, base = _centered(states.logits[None]), torch.zeros(())
                errors.append(
                    PartError(
                        f"layer {index}",
                        _relative(actual, expected[0], base),
                        _relative(disturbed[0], expected[0], base),
                    )
                )
        results.append(errors)
        position += len(tokens)
    return results


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _relative(actual: Tensor, expected: Tensor, base: Tensor) -> Tensor:
    return (actual - expected).norm(dim=-1) / (expected - base).norm(dim=-1).clamp_min(1e-30)
