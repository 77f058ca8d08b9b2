"""AWQ (Lin et al. 2023): scales folded into the preceding module give important channels finer codes.

Each input column of a linear is multiplied by a scale. The source of these inputs, a norm or the rows of
another linear, is divided by it. Outputs change by float32 rounding only. The exponent of each fold is the
one with the smallest loss after weighted rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellama.export.quantization.gptq import damping_of
from edgellama.export.quantization.scale_search import FEW_FACTORS, weighted_scales
from edgellama.host.threads import Workers
from edgellama.model.config import LlamaConfig
from edgellama.model.layerwise import SharedInput
from edgellama.model.llama import DecoderLayer
from edgellama.recipe import Scheme

EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the inputs' rms; 0 (no fold) is tried too
SAMPLE = 512  # rows; enough to choose an exponent


def choose_fold(
    weight: Tensor, hessian: Tensor, scheme: Scheme, shared: tuple[int, int] | None, pool: Workers
) -> Tensor:
    """AWQ scale of each input channel, float32 [columns].

    weight: weights of all linears that read the inputs, stacked by rows, float32 [rows, columns].
    hessian: second moment of the inputs, float32 [columns, columns].
    shared: (groups, size) for channels that are heads of `size`. Each `groups` consecutive heads read the
    same value head and must have the same scales. None for independent channels.
    pool: threads. Each exponent is one work item.
    """
    step = -(-len(weight) // SAMPLE)
    sample = weight[::step]
    squares = _equal(hessian.diag(), shared)
    rms = (squares / squares.mean().clamp_min(1e-30)).sqrt().clamp_min(1e-4)
    scales = [rms**exponent for exponent in (0.0, *EXPONENTS)]
    scales = [scale / (scale.max() * scale.min()).sqrt() for scale in scales]
    losses = list(pool.map(lambda scale: _loss(sample, hessian, scale, scheme), scales))
    return scales[losses.index(min(losses))]


def _loss(weight: Tensor, hessian: Tensor, scale: Tensor, scheme: Scheme) -> float:
    """Error of the outputs when `weight` is rounded in columns multiplied by `scale`, with damped inputs."""
    folded = weight * scale
    squares = hessian.diag() / scale.square()
    damping = damping_of(squares)
    error = folded - weighted_scales(folded, squares + damping, scheme, FEW_FACTORS).dequantize()
    outputs = ((error / scale) @ hessian * (error / scale)).sum()
    return float(outputs + damping * error.square().sum())


def _equal(values: Tensor, shared: tuple[int, int] | None) -> Tensor:
    """Replaces values of channels that must be equal by their mean."""
    if shared is None:
        return values
    grouped = values.reshape(-1, *shared)
    return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)


def shared_channels(reading: SharedInput, config: LlamaConfig) -> tuple[int, int] | None:
    """(query heads per value head, head size) for the input of o_proj. None: channels are independent."""
    if reading.source != "self_attn.v_proj":
        return None
    return config.num_attention_heads // config.num_key_value_heads, config.head_dim


@torch.no_grad()
def fold(layer: DecoderLayer, reading: SharedInput, scale: Tensor, shared: tuple[int, int] | None) -> None:
    """Multiplies in place the input columns of `reading.linears` by `scale`; divides their source by it."""
    for name in reading.linears:
        layer.get_submodule(name).get_parameter("weight").mul_(scale)
    scale = of_source(scale, shared)
    source = layer.get_submodule(reading.source)
    if isinstance(source, nn.Linear):
        source.weight.div_(scale[:, None])
        if source.bias is not None:
            source.bias.div_(scale)
    else:
        source.get_parameter("weight").div_(scale)


def of_source(scale: Tensor, shared: tuple[int, int] | None) -> Tensor:
    """Scale of each row of the source, for a scale of each column that reads it."""
    return scale if shared is None else scale.reshape(-1, *shared)[:, 0].reshape(-1)
