"""Replica of an artifact: the quantized torch model, with its inputs rounded as a family of processors rounds them.

It stands for kernels that this machine does not have. The gate computes golden vectors and quality of other families
with it, and every noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgellama.bundle.golden import Expectation, GoldenSequence, Rows
from edgellama.gate.references import with_noise
from edgellama.host.threads import workers
from edgellama.model.activations import ActivationRounding
from edgellama.model.layerwise import LayerwiseModel, States
from edgellama.model.llama import Llama
from edgellama.recipe import Recipe
from edgellama.targets import Target
from edgellama.targets.families import Family


@dataclass(frozen=True)
class Replica:
    """Result of a replica on some sequences.

    Attributes:
        logits: float32 [scored, vocab_size] for each sequence.
        floor_mean, floor_sequence: noise floor, nats: mean of all positions and of the worst sequence. NaN for a
            run without noise.
    """

    logits: list[Rows]
    floor_mean: float
    floor_sequence: float


@torch.no_grad()
def run_replica(
    quantized: Llama,
    recipe: Recipe,
    rounding: ActivationRounding | None,
    noise: float | None,
    sequences: Sequence[GoldenSequence],
    k: int,
) -> Replica:
    """Runs the quantized model on golden sequences, without noise and with it.

    All sequences pass through the layers side by side, with noise and without, so that each layer is
    dequantized once.

    Args:
        quantized: the quantized torch model.
        recipe: of the bundle.
        rounding: of the inputs of linears; None for floats.
        noise: relative size of the noise (`Target.noise`); None for no run with noise.
        sequences: the sequences.
        k: tokens of a position whose probabilities the noise floor compares.
    """
    generator = torch.Generator().manual_seed(0)
    with workers() as pool:
        layerwise = LayerwiseModel.as_target(quantized, recipe, rounding, pool)
        variants = [layerwise.embed([sequence.tokens for sequence in sequences])] * (
            1 if noise is None else 2
        )
        for index in range(quantized.config.num_hidden_layers):
            if noise is not None:
                variants[1] = [with_noise(x, generator, noise) for x in variants[1]]
            variants = layerwise.layer(index, variants)
        head = layerwise.head()

        def scored(states: States) -> list[Rows]:
            return [head(x[s.score_from :]).numpy() for x, s in zip(states, sequences, strict=True)]

        logits = scored(variants[0])
        pairs = zip(logits, scored(variants[-1]), strict=True)
        floors = [Expectation.of(exact, k).kl(noisy) for exact, noisy in pairs]
    if noise is None:
        return Replica(logits, math.nan, math.nan)
    return Replica(logits, float(np.concatenate(floors).mean()), max(float(floor.mean()) for floor in floors))


def other_families(target: Target, recipe: Recipe) -> tuple[Family, ...]:
    """Families of processors whose kernels round otherwise than this machine's."""
    here = target.family_here(recipe)
    return tuple(family for family in target.families(recipe) if family != here)
