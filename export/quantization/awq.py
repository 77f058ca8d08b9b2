"""Scaling folded into what comes before: input channels that matter get finer codes, and the function stays the same.

A linear's input columns are multiplied by a scale each, and whatever produced these inputs (the norm before it, or the
rows of another linear) is divided by it (Lin et al. 2023, AWQ). The exponent of each fold is chosen by the loss that
weighted rounding then has. Outputs change by float32 rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellama.export.quantization.gptq import damped, objective
from edgellama.export.quantization.scale_search import FEW_FACTORS, weighted_scales
from edgellama.model.config import LlamaConfig
from edgellama.model.layerwise import SharedInput
from edgellama.model.llama import DecoderLayer
from edgellama.recipe import Scheme

EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the inputs' rms; 0, no fold at all, is tried too
SAMPLE = 512  # rows that are enough to choose an exponent


def choose_fold(weight: Tensor, hessian: Tensor, scheme: Scheme, shared: tuple[int, int] | None) -> Tensor:
    """A scale for each input channel, float32 [columns], for the linears whose weights are the rows of `weight`.

    hessian: second moment of the inputs, float64. shared (groups, size): the channels are heads of `size`, of which
    `groups` consecutive ones read the same head and must have the same scale.
    """
    step = -(-len(weight) // SAMPLE)
    sample = weight[::step]
    squares = _equal(hessian.diag(), shared)
    rms = (squares / squares.mean().clamp_min(1e-30)).sqrt().clamp_min(1e-4)
    best = torch.ones(len(rms))
    best_loss = _loss(sample, damped(hessian), scheme)
    for exponent in EXPONENTS:
        scale = rms**exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).float()
        loss = _loss(sample * scale, damped(hessian) / torch.outer(scale, scale), scheme)
        if loss < best_loss:
            best, best_loss = scale, loss
    return best


def _loss(weight: Tensor, hessian: Tensor, scheme: Scheme) -> float:
    codes = weighted_scales(weight, hessian.diag(), scheme, FEW_FACTORS)
    return float(objective(weight, codes, hessian).sum())


def _equal(values: Tensor, shared: tuple[int, int] | None) -> Tensor:
    """Means over the channels that must have the same value."""
    if shared is None:
        return values
    grouped = values.reshape(-1, *shared)
    return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)


def shared_channels(reading: SharedInput, config: LlamaConfig) -> tuple[int, int] | None:
    """For o_proj: query heads that read the same value head, and their size. Other inputs are all independent."""
    if reading.source != "self_attn.v_proj":
        return None
    return config.num_attention_heads // config.num_key_value_heads, config.head_dim


@torch.no_grad()
def fold(layer: DecoderLayer, reading: SharedInput, scale: Tensor, shared: tuple[int, int] | None) -> None:
    """Multiply the input columns of `reading.linears` by `scale` and divide their source by it, in place."""
    for name in reading.linears:
        layer.get_submodule(name).get_parameter("weight").mul_(scale)
    if shared is not None:
        scale = scale.reshape(-1, *shared)[:, 0].reshape(-1)
    source = layer.get_submodule(reading.source)
    if isinstance(source, nn.Linear):
        source.weight.div_(scale[:, None])
        if source.bias is not None:
            source.bias.div_(scale)
    else:
        source.get_parameter("weight").div_(scale)
