"""GPTQ and coordinate descent (algorithm `gptq`): minimizes a linear's *output* error on calibration text.

The objective is (W - Q) H (W - Q)', with H the second moment of the inputs. Three steps lower it:

1. GPTQ (Frantar et al. 2022), with the scales of all groups chosen first. Columns are rounded by falling
   diag(H), and the error of each is spread over the later ones.
2. Coordinate descent (QuantEase, Behdin et al. 2023). Each code in turn moves to its best value given all
   others, and each scale to its least-squares value.
3. RTN or weighted rounding, kept for each row in which its objective is lower.
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

# Share of mean(diag(H)) added to the diagonal: keeps H invertible, and codes from fitting noise.
DAMPING = 0.01
BLOCK = 64  # columns whose updates of the later ones are applied together
SWEEPS = 2  # of coordinate descent; most of the gain is in the first


@dataclass(frozen=True)
class Inputs:
    """Statistics of a linear's inputs.

    hessian: damped second moment E[x x'], float64 [columns, columns].
    """

    hessian: Tensor

    @cached_property
    def order(self) -> Tensor:
        """Column indices by falling importance, int64 [columns]."""
        return self.hessian.diag().argsort(descending=True, stable=True)

    @cached_property
    def upper(self) -> Tensor:
        """Upper Cholesky factor of H's inverse, in `order`, float32 [columns, columns].

        Row j spreads the error of column j over the later ones.
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian[self.order][:, self.order]))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
        return upper


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme) -> Codes:
    """Codes of a float32 weight [rows, columns]. Each row is independent of the others."""
    hessian = inputs.hessian
    weighted = weighted_scales(weight, hessian.diag(), scheme)
    codes = _descend(weight, _compensated(weight, weighted, inputs), hessian)
    loss = objective(weight, codes, hessian)
    for rounded in (weighted, round_to_grid(weight, scheme)):
        rounded_loss = objective(weight, rounded, hessian)
        keep = (loss <= rounded_loss)[:, None]
        loss = torch.minimum(loss, rounded_loss)
        codes = Codes(
            torch.where(keep, codes.values, rounded.values),
            torch.where(keep, codes.scales, rounded.scales),
            scheme,
        )
    return codes


def damped(hessian: Tensor) -> Tensor:
    """H with a raised diagonal, so that it is invertible for any calibration text."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    return hessian + identity * (DAMPING * hessian.diag().mean().clamp_min(1e-12))


def objective(weight: Tensor, codes: Codes, hessian: Tensor) -> Tensor:
    """(W - Q) H (W - Q)' of each row: float32 [rows]."""
    error = weight - codes.dequantize()
    return ((error @ hessian.float()) * error).sum(1)


def _compensated(weight: Tensor, start: Codes, inputs: Inputs) -> Codes:
    """GPTQ on the grid of `start`: rounds columns by falling importance and passes each error on."""
    columns, order, upper = weight.shape[1], inputs.order, inputs.upper
    w = weight[:, order].t().contiguous()  # [columns, rows]: the loop reads one column at a time
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
    """Coordinate descent: moves one code or scale at a time to its minimum, in SWEEPS passes over all."""
    h = hessian.float()
    rows, columns = weight.shape
    size = columns // codes.scales.shape[1]
    low, high = codes.scheme.code_range
    # Transposed: [columns, rows] and [groups, rows].
    z, scales = codes.values.t().float().contiguous(), codes.scales.t().contiguous()
    w, smallest = weight.t().contiguous(), scales.min()
    for _ in range(SWEEPS):
        # Half the derivative of the objective with respect to each dequantized weight.
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
    """Change of one group's scales [rows]: to the bfloat16 nearest to the best scale, or 0 without a gain."""
    slope, curvature = (z * gradient).sum(0), (z * (h @ z)).sum(0)
    best = (scale - slope / curvature.clamp_min(1e-30)).clamp(0.5 * scale, 2 * scale).clamp_min(smallest)
    step = best.to(torch.bfloat16).float() - scale
    falls = (2 * slope + curvature * step) * step < 0
    return torch.where(falls, step, torch.zeros_like(step))
