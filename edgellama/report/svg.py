"""Charts as inline SVG without script or assets. The page's style sheet sets colours and fonts by theme.

Each chart is an image with a title and a description for readers who do not see it. Each mark has a tooltip.
Equal data, equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from edgellama.report.tables import printable

WIDTH, HEIGHT = 440, 250  # user units, about pixels on a phone, so that letters of 12 are legible
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 26, 42
LETTER = 6.3  # mean width of a letter of 12
SERIES = 6  # number of colours in the style sheet, and of shapes


@dataclass(frozen=True)
class Scale:
    """Maps values between `low` and `high` to places between 0 and 1, linearly or by their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            object.__setattr__(self, "low", 0.1 if self.log else 0.0)
            object.__setattr__(self, "high", 1.0)

    def place(self, value: float) -> float:
        """Returns the place of `value`. Values outside lie on the edge."""
        if math.isnan(value):
            return 0.0
        if self.log:
            value = math.log10(max(value, 1e-300))
            low, high = math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Returns about five round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, -(-(last - first) // 6))
            return [10.0**n for n in range(first, last + 1, step)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(f for f in (1, 2, 5, 10) if (self.high - self.low) / (step * f) <= 5.5)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Row:
    """A mark at x with its interval (None without one) and the text of its tooltip."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


@dataclass
class Chart:
    """A chart under construction. Marks are drawn in the order in which they are added.

    key: unique on the page. percent: the y axis is a share.
    x_ticks: (value, label), None for the scale's own ticks.
    """

    key: str
    title: str
    description: str
    x: Scale
    y: Scale
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]] | None = None
    percent: bool = False
    _marks: list[Markup] = field(default_factory=list)
    _rules: list[tuple[float, str]] = field(default_factory=list)
    _legend: list[tuple[int, str]] = field(default_factory=list)

    def column(self, left: float, right: float, row: Row, series: int = 0) -> Chart:
        """Adds a column from zero, between two values of x. The row's own `x` is ignored."""
        start, end = self._x(left), self._x(right)
        value_y, zero_y = self._y(row.value), self._y(max(self.y.low, 0.0))
        self._marks.append(
            Markup('<rect class="s{} fill" x="{}" y="{}" width="{}" height="{}">{}</rect>').format(
                series % SERIES,
                _n(start + 0.4),
                _n(min(value_y, zero_y)),
                _n(max(0.5, end - start - 0.8)),
                _n(abs(value_y - zero_y)),
                _tip(row.tip),
            )
        )
        self._whisker(row, (start + end) / 2, "ink")
        return self

    def line(
        self, rows: Sequence[Row], series: int = 0, *, name: str | None = None, marks: bool = True
    ) -> Chart:
        """Adds a line through the rows, each with a mark and its interval."""
        path = " ".join(
            f"{'L' if i else 'M'}{_n(self._x(r.x))} {_n(self._y(r.value))}" for i, r in enumerate(rows)
        )
        self._marks.append(Markup('<path class="s{} stroke" d="{}"/>').format(series % SERIES, path))
        for row in rows if marks else ():
            x, y = self._x(row.x), self._y(row.value)
            self._whisker(row, x, f"s{series % SERIES}")
            self._marks.append(_shape(series, x, y, row.tip))
        if name is not None:
            self._legend.append((series, name))
        return self

    def named(self, series: int, name: str) -> Chart:
        """Adds an entry to the legend."""
        self._legend.append((series, name))
        return self

    def rule(self, x: float, label: str) -> Chart:
        """Adds a vertical line with a label above it."""
        self._rules.append((x, label))
        return self

    def level(self, y: float, label: str) -> Chart:
        """Adds a horizontal line with a label at its right end."""
        place = self._y(y)
        self._marks.append(
            Markup(
                '<line class="limit" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="note end" x="{}" y="{}">{}</text>'
            ).format(
                LEFT,
                WIDTH - RIGHT,
                _n(place),
                _n(place),
                WIDTH - RIGHT,
                _n(place - 4),
                printable(label),
            )
        )
        return self

    def render(self) -> Markup:
        """Returns the <svg> element."""
        top, rules = self._drawn_rules()
        legend, below = self._drawn_legend()
        parts = [*self._axes(12 - top), *self._marks, *rules, *legend]
        return Markup(
            '<svg role="img" aria-labelledby="{key}-t {key}-d" viewBox="0 {top} {width} {height}">'
            '<title id="{key}-t">{title}</title><desc id="{key}-d">{description}</desc>{parts}</svg>'
        ).format(
            key=self.key,
            top=-top,
            width=WIDTH,
            height=HEIGHT + top + below,
            title=printable(self.title),
            description=printable(self.description),
            parts=Markup("").join(parts),
        )

    def _x(self, value: float) -> float:
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)

    def _axes(self, label_y: int) -> list[Markup]:
        parts = [Markup('<text class="axis" x="0" y="{}">{}</text>').format(label_y, printable(self.y_label))]
        for value in self.y.ticks():
            y = _n(self._y(value))
            label = f"{value:.0%}" if self.percent else tick(value, self.y.log)
            parts.append(
                Markup(
                    '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                    '<text class="tick end" x="{}" y="{}" dy="0.35em">{}</text>'
                ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 7, y, label)
            )
        bottom, free = HEIGHT - BOTTOM, -math.inf
        ticks = (
            [(value, tick(value, self.x.log)) for value in self.x.ticks()]
            if self.x_ticks is None
            else self.x_ticks
        )
        for value, label in ticks:
            x, half = self._x(value), len(label) * LETTER / 2
            parts.append(
                Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    _n(x), _n(x), bottom, bottom + 4
                )
            )
            if x - half > free:  # leave out labels that would touch
                parts.append(
                    Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(
                        _n(x), bottom + 17, printable(label)
                    )
                )
                free = x + half + 4
        parts.append(
            Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                LEFT, WIDTH - RIGHT, bottom, bottom
            )
        )
        parts.append(
            Markup('<text class="axis end" x="{}" y="{}">{}</text>').format(
                WIDTH - RIGHT, HEIGHT - 7, printable(self.x_label)
            )
        )
        return parts

    def _drawn_rules(self) -> tuple[int, list[Markup]]:
        """Returns the height of the label rows, and the vertical lines with their labels.

        Labels stand in as many rows as needed so that none touch.
        """
        rows: list[float] = []  # for each row, the x from which it is free
        placed = []
        for value, label in sorted(self._rules):
            x, width = self._x(value), len(label) * LETTER
            left = min(max(x - width / 2, LEFT), WIDTH - RIGHT - width)
            row = next((i for i, free in enumerate(rows) if left > free), len(rows))
            rows[row : row + 1] = [left + width + 6]
            placed.append((x, left, row, label))
        top = max(0, 14 * len(rows) - 8)
        lines = [
            Markup('<line class="rule" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                _n(x), TOP - 14 * row - 3, HEIGHT - BOTTOM
            )
            for x, _, row, _ in placed
        ]
        labels = [
            Markup('<text class="note" x="{}" y="{}">{}</text>').format(
                _n(left), TOP - 14 * row - 6, printable(label)
            )
            for _, left, row, label in placed
        ]
        return top, [*lines, *labels]

    def _drawn_legend(self) -> tuple[list[Markup], int]:
        """Returns the entries below the chart, as many in a line as fit, and their height."""
        parts, x, y = [], float(LEFT), HEIGHT + 14
        for series, name in self._legend:
            name = printable(name)
            name = name if len(name) <= 52 else name[:51] + "…"
            width = len(name) * LETTER + 34
            if x > LEFT and x + width > WIDTH:
                x, y = float(LEFT), y + 18
            parts.append(_shape(series, x + 5, y - 4, ""))
            parts.append(Markup('<text class="note" x="{}" y="{}">{}</text>').format(_n(x + 16), y, name))
            x += width
        return parts, y + 4 - HEIGHT if self._legend else 0

    def _whisker(self, row: Row, x: float, colour: str) -> None:
        if row.low is None or row.high is None:
            return
        self._marks.append(
            Markup('<line class="{} whisker" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                colour, _n(x), _n(x), _n(self._y(row.low)), _n(self._y(row.high))
            )
        )


def whisker(
    value: float | None, interval: Sequence[float | None], scale: Scale, at: float | None = None
) -> Markup:
    """Returns a value with its interval on a line, for a cell of a table.

    at: a marked place, such as a limit or no change.
    """
    if value is None or any(end is None for end in interval):
        return Markup("")
    low, high = (100 * scale.place(float(end or 0.0)) for end in interval)
    middle = 100 * scale.place(value)
    mark = (
        ""
        if at is None
        else Markup('<line class="limit" x1="{0}" x2="{0}" y1="0" y2="14"/>').format(
            _n(2 + 1.16 * 100 * scale.place(at))
        )
    )
    return Markup(
        '<svg class="whisker-cell" aria-hidden="true" viewBox="0 0 120 14">'
        '<line class="grid" x1="2" x2="118" y1="7" y2="7"/>{}'
        '<line class="s0 thick" x1="{}" x2="{}" y1="7" y2="7"/><circle class="s0 fill" cx="{}" cy="7" r="3.5"/></svg>'
    ).format(mark, _n(2 + 1.16 * low), _n(2 + 1.16 * high), _n(2 + 1.16 * middle))


def bar(share: float) -> Markup:
    """Returns a share of a whole as a horizontal bar, for a cell of a table."""
    return Markup(
        '<svg class="bar-cell" aria-hidden="true" viewBox="0 0 100 8" preserveAspectRatio="none">'
        '<rect class="s0 fill" width="{}" height="8"/></svg>'
    ).format(_n(100 * min(1.0, max(0.0, share))))


def tick(value: float, log: bool = False) -> str:
    """Formats an axis label: powers of ten on a logarithmic axis, else as short as the value allows."""
    if log:
        exponent = round(math.log10(value))
        if -3 <= exponent <= 3:
            return f"{value:g}"
        return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.10g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _shape(series: int, x: float, y: float, tip: str) -> Markup:
    """Returns a circle, square, diamond, triangle, …: series differ by more than colour."""
    sides = [
        "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        "M-3.2 -3.2h6.4v6.4h-6.4z",
        "M0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
        "M0 -4.4l4.4 7.6h-8.8z",
        "M0 4.4l4.4 -7.6h-8.8z",
        "M-4 -1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
    ][series % SERIES]
    return Markup('<path class="s{} fill" transform="translate({} {})" d="{}">{}</path>').format(
        series % SERIES, _n(x), _n(y), sides, _tip(tip)
    )


def _tip(text: str) -> Markup:
    return Markup("<title>{}</title>").format(escape(printable(text))) if text else Markup("")


def _n(value: float) -> str:
    """Formats a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
