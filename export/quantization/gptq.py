"""GPTQ and coordinate descent (algorithm `gptq`): minimizes a linear's *output* error on calibration text.

The objective is (W - Q) H (W - Q)', with H the second moment of the inputs. Three steps lower it:

1. GPTQ (Frantar et al. 2022), with the scales of all groups chosen first. Columns are rounded by falling
   diag(H), and the error of each is spread over the later ones.
2. Coordinate descent (QuantEase, Behdin et al. 2023). Each code in turn moves to its best value given all
   others, and each scale to its least-squares value.
3. Weighted rounding, kept for each row in which its objective is lower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from edgellama.export.quantization.scale_search import weighted_scales
from edgellama.model.quantized import Codes
from edgellama.recipe import Scheme

# Share of mean(diag(H)) added to the diagonal: keeps H invertible, and codes from fitting noise.
DAMPING = 0.01
BLOCK = 64  # columns whose errors reach the later ones together
SWEEPS = 2  # of coordinate descent; most of the gain is in the first


@dataclass(frozen=True)
class Inputs:
    """Statistics of a linear's inputs.

    hessian: damped second moment E[x x'], float32 [columns, columns].
    """

    hessian: Tensor

    @cached_property
    def order(self) -> Tensor:
        """Column indices by falling importance, int64 [columns]."""
        return self.hessian.diag().argsort(descending=True, stable=True)

    @cached_property
    def feedback(self) -> Tensor:
        """Unit upper triangle U with H = U D U', in `order`, float32 [columns, columns].

        Column j holds how much of each earlier column's error column j has to make up for. GPTQ reads the
        same numbers off the inverse of H, which costs four times as much.
        """
        reverse = self.order.flip(0)
        lower: Tensor = torch.linalg.cholesky(self.hessian[reverse][:, reverse].double())
        lower /= lower.diag().clone()
        return lower.float().flip(0, 1)


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme) -> Codes:
    """Codes of a float32 weight [rows, columns]. Each row is independent of the others."""
    hessian = inputs.hessian
    weighted = weighted_scales(weight, hessian.diag(), scheme)
    codes, loss = _descend(weight, _compensated(weight, weighted, inputs), hessian)
    keep = (loss <= objective(weight, weighted, hessian))[:, None]
    return Codes(
        torch.where(keep, codes.values, weighted.values),
        torch.where(keep, codes.scales, weighted.scales),
        scheme,
    )


def damped(hessian: Tensor) -> Tensor:
    """H with a raised diagonal, so that it is invertible for any calibration text."""
    result = hessian.clone()
    result.diagonal().add_(damping_of(hessian.diag()))
    return result


def damping_of(squares: Tensor) -> Tensor:
    """Amount that `damped` adds to each mean square of the inputs."""
    return DAMPING * squares.mean().clamp_min(1e-12)


def objective(weight: Tensor, codes: Codes, hessian: Tensor) -> Tensor:
    """(W - Q) H (W - Q)' of each row: float32 [rows]."""
    error = weight - codes.dequantize()
    return ((error @ hessian) * error).sum(1)


def _compensated(weight: Tensor, start: Codes, inputs: Inputs) -> Codes:
    """GPTQ on the grid of `start`: rounds columns by falling importance and passes each error on."""
    columns, order, feedback = weight.shape[1], inputs.order, inputs.feedback
    w = weight.t()[order]  # [columns, rows]: the loop reads one column at a time
    scales = start.scales.t().repeat_interleave(columns // start.scales.shape[1], 0)[order]
    low, high = start.scheme.code_range
    values, errors = torch.empty_like(w), torch.empty_like(w)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        target = torch.addmm(w[first:last], feedback[:first, first:last].t(), errors[:first])
        inside, count = feedback[first:last, first:last].unbind(0), last - first
        block = zip(
            *(part[first:last].unbind(0) for part in (w, scales, values, errors)),
            target.unbind(0),
            strict=True,
        )
        for j, (own, scale, value, error, wanted) in enumerate(block, 1):
            torch.div(wanted, scale, out=value).round_().clamp_(low, high)
            torch.addcmul(own, value, scale, value=-1, out=error)
            if j < count:
                target[j:].addr_(inside[j - 1][j:], error)
    restored = torch.empty_like(values)
    restored[order] = values
    return Codes(
        restored.t().to(torch.int8, memory_format=torch.contiguous_format), start.scales, start.scheme
    )


def _descend(weight: Tensor, codes: Codes, hessian: Tensor) -> tuple[Codes, Tensor]:
    """Coordinate descent: moves one code or scale at a time to its minimum, in SWEEPS passes over all.

    Returns the codes and their objective, float32 [rows].
    """
    rows, columns = weight.shape
    size = columns // codes.scales.shape[1]
    # Transposed: [columns, rows] and [groups, rows].
    z, scales = codes.values.t().float().contiguous(), codes.scales.t().contiguous()
    smallest = scales.min()

    def error() -> Tensor:
        return (z.reshape(-1, size, rows) * scales[:, None]).reshape(columns, rows) - weight.t()

    gradient = hessian @ error()  # half the derivative of the objective with respect to each weight
    for _ in range(SWEEPS):
        for g in range(len(scales)):
            group = slice(g * size, (g + 1) * size)
            own, inner, before = z[group], hessian[group, group], z[group] * scales[g]
            local = gradient[group] / scales[g]
            for first in range(0, size, BLOCK):
                part = slice(first, min(first + BLOCK, size))
                steps = _move(own[part], local[part].clone(), inner[part, part], codes.scheme)
                local.addmm_(inner[:, part], steps)
            scales[g] += _scale_step(own, local * scales[g], inner, scales[g], smallest)
            gradient.addmm_(hessian[:, group], own * scales[g] - before)
    loss = (error() * gradient).sum(0)
    values = z.t().to(torch.int8, memory_format=torch.contiguous_format)
    return Codes(values, scales.t().contiguous(), codes.scheme), loss


def _move(codes: Tensor, gradient: Tensor, h: Tensor, scheme: Scheme) -> Tensor:
    """Moves `codes` [columns, rows] in place, one column after the other; returns the steps.

    gradient: in units of the scale, [columns, rows]. It is used up.
    """
    low, high = scheme.code_range
    steps, curvatures = torch.empty_like(codes), h.diag().tolist()
    columns = zip(codes.unbind(0), gradient.unbind(0), steps.unbind(0), h.unbind(0), curvatures, strict=True)
    for j, (code, slope, step, effects, curvature) in enumerate(columns, 1):
        better = torch.sub(code, slope, alpha=1 / curvature).round_().clamp_(low, high)
        torch.sub(better, code, out=step)
        code.copy_(better)
        if j < len(codes):
            gradient[j:].addr_(effects[j:], step)
    return steps


def _scale_step(z: Tensor, gradient: Tensor, h: Tensor, scale: Tensor, smallest: Tensor) -> Tensor:
    """Change of one group's scales [rows]: to the bfloat16 nearest to the best scale, or 0 without a gain."""
    slope, curvature = (z * gradient).sum(0), (z * (h @ z)).sum(0)
    best = (scale - slope / curvature.clamp_min(1e-30)).clamp(0.5 * scale, 2 * scale).clamp_min(smallest)
    step = best.to(torch.bfloat16).float() - scale
    falls = (2 * slope + curvature * step) * step < 0
    return torch.where(falls, step, torch.zeros_like(step))
