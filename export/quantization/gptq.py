"""Algorithm `gptq`: codes that lose least of a linear's *output* on calibration text.

What falls is (W - Q) H (W - Q)', H the second moment of the inputs. Columns are rounded in the order of falling
diag(H), the error of each spread over those to come (Frantar et al. 2022, GPTQ, with the scales of all groups chosen
first). Then coordinate descent: every code in turn goes to the best value given all others (Behdin et al. 2023,
QuantEase), every scale to the least-squares one. A row that plain or weighted rounding serves better keeps that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.export.quantization.scale_search import weighted_scales
from edgellama.model.quantized import Codes
from edgellama.recipe import Scheme

DAMPING = 0.01  # of the mean of diag(H), added to it: keeps H invertible, and codes from fitting noise
BLOCK = 64  # columns whose updates of the rest are applied together
SWEEPS = 2  # of coordinate descent; most of the gain is in the first


@dataclass(frozen=True)
class Inputs:
    """What is known about the inputs of a linear: their second moment E[x x'], damped, float64 [columns, columns]."""

    hessian: Tensor

    @cached_property
    def order(self) -> Tensor:
        """Columns by falling importance, int64 [columns]."""
        return self.hessian.diag().argsort(descending=True, stable=True)

    @cached_property
    def upper(self) -> Tensor:
        """Upper Cholesky factor of the inverse in that order: row j spreads the error of column j over the rest."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian[self.order][:, self.order]))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
        return upper


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme) -> Codes:
    """Codes of a float32 weight [rows, columns] whose rows are chosen independently of each other."""
    hessian = inputs.hessian
    weighted = weighted_scales(weight, hessian.diag(), scheme)
    codes = _descend(weight, _compensated(weight, weighted, inputs), hessian)
    loss = objective(weight, codes, hessian)
    for other in (weighted, round_to_grid(weight, scheme)):
        other_loss = objective(weight, other, hessian)
        keep = (loss <= other_loss)[:, None]
        loss = torch.minimum(loss, other_loss)
        codes = Codes(
            torch.where(keep, codes.values, other.values),
            torch.where(keep, codes.scales, other.scales),
            scheme,
        )
    return codes


def damped(hessian: Tensor) -> Tensor:
    """H with its diagonal raised, so that it can be inverted whatever the calibration text holds."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    return hessian + identity * (DAMPING * hessian.diag().mean().clamp_min(1e-12))


def objective(weight: Tensor, codes: Codes, hessian: Tensor) -> Tensor:
    """(W - Q) H (W - Q)' of each row, float32 [rows]."""
    error = weight - codes.dequantize()
    return ((error @ hessian.float()) * error).sum(1)


def _compensated(weight: Tensor, start: Codes, inputs: Inputs) -> Codes:
    """Columns rounded one after the other on the grid of `start`, the most important first, each error passed on."""
    columns, order, upper = weight.shape[1], inputs.order, inputs.upper
    w = weight[:, order].t().contiguous()  # [columns, rows]: columns are read one by one
    scales = start.scales.repeat_interleave(columns // start.scales.shape[1], 1)[:, order].t().contiguous()
    low, high = start.scheme.code_range
    values = torch.empty_like(w)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block, errors = w[first:last], torch.empty(last - first, w.shape[1])
        triangle = upper[first:last, first:last]
        for j in range(last - first):
            code = (block[j] / scales[first + j]).round_().clamp_(low, high)
            values[first + j] = code
            errors[j] = (block[j] - code * scales[first + j]) / triangle[j, j]
            block[j + 1 :].addr_(triangle[j, j + 1 :], errors[j], alpha=-1)
        w[last:] -= upper[first:last, last:].t() @ errors
    restored = torch.empty_like(values)
    restored[order] = values
    return Codes(restored.t().contiguous().to(torch.int8), start.scales, start.scheme)


def _descend(weight: Tensor, codes: Codes, hessian: Tensor) -> Codes:
    """Codes and scales moved one at a time to where the objective is least, SWEEPS times over all of them."""
    h = hessian.float()
    rows, columns = weight.shape
    size = columns // codes.scales.shape[1]
    low, high = codes.scheme.code_range
    z, scales = (
        codes.values.t().float().contiguous(),
        codes.scales.t().contiguous(),
    )  # [columns or groups, rows]
    w, smallest = weight.t().contiguous(), scales.min()
    for _ in range(SWEEPS):
        # Half the derivative of the objective by each dequantized weight.
        gradient = h @ ((z.reshape(-1, size, rows) * scales[:, None]).reshape(columns, rows) - w)
        for g in range(len(scales)):
            group = slice(g * size, (g + 1) * size)
            inner, local, before = h[group, group], gradient[group].clone(), z[group] * scales[g]
            for j in range(size):
                code = z[group.start + j]
                better = (code - local[j] / (inner[j, j] * scales[g])).round_().clamp_(low, high)
                local.addr_(inner[j], (better - code) * scales[g])
                z[group.start + j] = better
            scales[g] += _scale_step(z[group], local, inner, scales[g], smallest)
            gradient += h[:, group] @ (z[group] * scales[g] - before)
    return Codes(z.t().contiguous().to(torch.int8), scales.t().contiguous(), codes.scheme)


def _scale_step(z: Tensor, gradient: Tensor, h: Tensor, scale: Tensor, smallest: Tensor) -> Tensor:
    """By how much to change one group's scales [rows]: to the nearest bfloat16 of the best, or not at all."""
    slope, curvature = (z * gradient).sum(0), (z * (h @ z)).sum(0)
    best = (scale - slope / curvature.clamp_min(1e-30)).clamp(0.5 * scale, 2 * scale).clamp_min(smallest)
    step = best.to(torch.bfloat16).float() - scale
    falls = (2 * slope + curvature * step) * step < 0
    return torch.where(falls, step, torch.zeros_like(step))
