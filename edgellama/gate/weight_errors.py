"""Calibrated weights against the checkpoint: the folds are estimated and undone, and what is left is measured.

Calibration moves single weights by several steps of their grid, so no bound holds for one weight. It keeps
directions and sizes: the codes of a group, a row, a column or a whole weight point where the checkpoint's
weights point, and are as long. Both figures are taken at five levels.

Folds multiply the columns of a weight and divide the rows of the one before it. The scale of a fold behind a
norm is the ratio of the norm's weights. The scale between two linears is estimated from both of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellama.gate.limits import FOLD_NOISE, FOLD_SHARE, WEIGHT_LEVELS, WeightLevel
from edgellama.model.quantized import codes_of
from edgellama.recipe import Scheme

_LEAST = 1e-30  # in place of a zero divisor


@dataclass(frozen=True)
class Match:
    """Sums over parts of a weight, each of any one shape: inner products of stored and expected weights.

    Attributes:
        product: sum of stored * expected.
        stored: sum of squares of the stored weights.
        expected: sum of squares of the expected weights.
        count: weights in each part.
    """

    product: Tensor
    stored: Tensor
    expected: Tensor
    count: int

    @classmethod
    def of(cls, stored: Tensor, expected: Tensor, axis: int) -> Match:
        """Sums along one axis."""
        return cls(
            (stored * expected).sum(axis),
            stored.square().sum(axis),
            expected.square().sum(axis),
            stored.shape[axis],
        )

    def summed(self, axis: int) -> Match:
        """Sums of larger parts."""
        size = self.product.shape[axis]
        return Match(
            self.product.sum(axis), self.stored.sum(axis), self.expected.sum(axis), self.count * size
        )

    @property
    def gain(self) -> Tensor:
        """Length of the stored weights along the expected ones, 1 for equal weights."""
        return self.product / self.expected.clamp_min(_LEAST)

    @property
    def correlation(self) -> Tensor:
        """Cosine between stored and expected weights."""
        return self.product / (self.stored * self.expected).sqrt().clamp_min(_LEAST)

    @property
    def noise(self) -> Tensor:
        """Standard error of `gain`, if the rest of the stored weights is noise."""
        rest = (self.stored - self.product * self.gain).clamp_min(0) / self.count
        return (rest / self.expected.clamp_min(_LEAST)).sqrt()


@dataclass(frozen=True)
class Finding:
    """The part of a weight that is furthest from the checkpoint, in one respect.

    excess: 1 at the limit, below 1 for sound weights. place: words for the part.
    """

    excess: float
    place: str


def worst(findings: Iterable[Finding]) -> Finding:
    """The finding with the largest excess."""
    return max(findings, key=lambda finding: finding.excess, default=Finding(0.0, ""))


def direction(match: Match, judged: Tensor, level: WeightLevel, module: str) -> Finding:
    """Part of one level whose stored weights point furthest away from the checkpoint's."""
    excess = (1 - match.correlation) / (1 - level.correlation)
    return _worst(excess, match.correlation, judged, level, module, "correlation")


def size(match: Match, judged: Tensor, level: WeightLevel, slack: float, module: str) -> Finding:
    """Part of one level whose stored weights are furthest too long or too short.

    The best codes are shorter than their weights by the square of the correlation, since rounding noise is
    no part of the weights.
    """
    noise = level.noise * match.noise + slack
    least = (1 - level.shorter) * match.correlation.clamp_min(0).square() - noise
    gain = match.gain
    excess = torch.maximum((gain - 1) / (level.longer + noise), (1 - gain) / (1 - least))
    return _worst(excess, gain, judged, level, module, "gain")


def _worst(
    excess: Tensor, values: Tensor, judged: Tensor, level: WeightLevel, module: str, figure: str
) -> Finding:
    if not bool(judged.any()):
        return Finding(0.0, "")
    excess = torch.where(judged, excess, torch.zeros_like(excess))
    index = int(excess.reshape(-1).argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(index), excess.shape)] if excess.dim() else []
    place = f" {', '.join(map(str, where))}" if where else ""
    value = float(values.reshape(-1)[index])
    return Finding(
        float(excess.reshape(-1)[index]), f"{figure} {value:.3f} of {level.name}{place} of {module}"
    )


def levels(
    stored: Tensor, expected: Tensor, scheme: Scheme | None
) -> Iterator[tuple[WeightLevel, Match, Tensor]]:
    """Every level with its sums and a mask of the parts that are judged.

    stored, expected: float32 [rows, columns]. Parts far smaller than the rest of the weight are not judged
    alone: calibration stores the errors of others in them.
    """
    rows, columns = expected.shape
    width = (scheme and scheme.group_size) or columns
    low, high = scheme.code_range if scheme else (-1, 1)
    cells = Match.of(stored.reshape(rows, -1, width), expected.reshape(rows, -1, width), 2)
    groups = expected.reshape(rows, -1, width)
    steps = torch.maximum(groups.amin(2) / low, groups.amax(2) / high)
    squares = steps.square()
    large = squares.mean(1, keepdim=True).maximum(squares.mean())
    by_name = {level.name: level for level in WEIGHT_LEVELS}
    yield by_name["group"], cells, (squares >= by_name["group"].share * large) & (steps > 0)
    for name, match in (
        ("row", cells.summed(1)),
        ("block", cells.summed(0)),
        ("column", Match.of(stored, expected, 0)),
        ("weight", cells.summed(0).summed(0)),
    ):
        level = by_name[name]
        judged = (match.expected >= level.share * match.expected.mean()) & (match.expected > 0)
        yield level, match, judged


@dataclass(frozen=True)
class Fold:
    """Both sides of the folds between two linears, for each channel.

    Attributes:
        rows: the linear before, row by row.
        columns: the linear after, column by column.
        row_steps, column_steps: mean square of the codes' scales.
    """

    rows: Match
    columns: Match
    row_steps: Tensor
    column_steps: Tensor

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Scale of each fold, float32 [channels], as the rows tell it and as the columns tell it.

        A side that tells nothing gets the other side's scale, and 1 if neither tells anything.
        """
        by_rows, by_columns = 1 / self.rows.gain.clamp_min(_LEAST), self.columns.gain
        rows_tell = _tells(self.rows, self.row_steps)
        columns_tell = _tells(self.columns, self.column_steps)
        others = torch.where(rows_tell, by_rows, torch.ones_like(by_rows))
        columns = torch.where(columns_tell, by_columns, others)
        return torch.where(rows_tell, by_rows, torch.where(columns_tell, by_columns, others)), columns

    @property
    def products(self) -> tuple[Tensor, Tensor]:
        """(product of both gains, mask of the channels in which both are known well).

        The product is 1 where one side undoes the other.
        """
        known = _known(self.rows, self.row_steps) & _known(self.columns, self.column_steps)
        for match in (self.rows, self.columns):
            known &= match.stored > FOLD_SHARE * match.stored.mean()
        return self.rows.gain * self.columns.gain, known


def _tells(match: Match, steps: Tensor) -> Tensor:
    """Mask of the gains that are more than noise. Weights below a third of their step round to zero."""
    fine = match.expected / match.count > steps / 12
    return fine & (match.gain > 0.02) & (match.noise < 0.5 * match.gain)


def _known(match: Match, steps: Tensor) -> Tensor:
    """Mask of the gains that are known well: weights larger than a step, and little noise."""
    return (
        (match.expected > 0) & (match.stored / match.count > steps) & (match.noise < FOLD_NOISE * match.gain)
    )


@dataclass(frozen=True)
class Stored:
    """One linear of the quantized model.

    Attributes:
        weight: dequantized, float32 [rows, columns].
        scheme: None for a float linear.
        row_steps: mean square of the scales of each row.
        column_steps: the same of each column.
    """

    weight: Tensor
    scheme: Scheme | None
    row_steps: Tensor
    column_steps: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> Stored:
        """Reads a linear."""
        codes = codes_of(module)
        if codes is None:
            weight: Tensor = module.get_parameter("weight").detach()
            rows, columns = weight.shape
            return cls(weight, None, torch.zeros(rows), torch.zeros(columns))
        rows, groups = codes.scales.shape
        width = codes.values.shape[1] // groups
        in_use = codes.values.reshape(rows, groups, width).any(2)  # a group of zeros may have any scale
        squares = torch.where(in_use, codes.scales, torch.zeros_like(codes.scales)).square()
        by_column = squares.mean(0).repeat_interleave(width)
        return cls(codes.dequantize(), codes.scheme, squares.mean(1), by_column)


def undone(
    weights: Mapping[str, Tensor], stored: Mapping[str, Stored], heads: int, head_dim: int
) -> tuple[dict[str, Tensor], dict[str, Fold]]:
    """Weights of a layer as they are expected in the quantized model, and its folds by the linear before.

    weights: the checkpoint's, times the folds behind norms, by name in the layer.
    stored: the quantized model's.
    heads: query heads that read one value head, of head_dim channels each.
    """

    def shared(x: Tensor) -> Tensor:
        return x.reshape(-1, heads, head_dim).sum(1).reshape(-1)

    def spread(x: Tensor) -> Tensor:
        return x.reshape(-1, 1, head_dim).expand(-1, heads, head_dim).reshape(-1)

    expected, folds = dict(weights), {}
    for source, reader in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
        rows = Match.of(stored[source].weight, weights[source], 1)
        columns = Match.of(stored[reader].weight, weights[reader], 0)
        steps = stored[reader].column_steps
        if reader == "self_attn.o_proj":
            product, squares = shared(columns.product), shared(columns.stored)
            columns = Match(product, squares, shared(columns.expected), columns.count * heads)
            steps = shared(steps) / heads
        fold = folds[source] = Fold(rows, columns, stored[source].row_steps, steps)
        before, after = fold.scales
        expected[source] = weights[source] / before[:, None]
        expected[reader] = weights[reader] * (spread(after) if reader == "self_attn.o_proj" else after)
    return expected, folds
