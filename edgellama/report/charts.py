"""Charts of a page, each from one section of a report or of a benchmark.

The sections are JSON data, in which null is a missing number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from edgellama.report.svg import Chart, Row, Scale

_MARKS = (("median", "kl_median"), ("mean", "kl_mean"), ("p99", "kl_p99"), ("p99.9", "kl_p999"))


def kl_histogram(scored: Mapping[str, Any], quality: Mapping[str, Any], key: str) -> Markup:
    """Share of tokens over the logarithm of their KL, with mean, median and upper quantiles marked."""
    edges, counts, total = _bins(scored["kl_histogram"])
    if not sum(counts):
        return Markup("")
    shares = [count / total for count in counts]
    chart = Chart(
        f"{key}-histogram",
        "Histogram of the KL of single tokens",
        f"Share of {total} tokens by their KL, on a logarithmic axis of {edges[0]:.2g} to {edges[-1]:.2g} nats. "
        f"{_marks_in_words(quality)}",
        x=Scale(edges[0], edges[-1], log=True),
        y=Scale(0.0, max(shares) * 1.05),
        x_label="KL of a token, nats",
        y_label="share of tokens",
        percent=True,
    )
    for left, right, count, share in zip(edges, edges[1:], counts, shares, strict=False):
        tip = f"{left:.2g} to {right:.2g} nats: {count} tokens, {share:.1%}"
        chart.column(left, right, Row(left, share, tip=tip))
    return _with_marks(chart, quality).render()


def kl_cumulative(scored: Mapping[str, Any], quality: Mapping[str, Any], key: str) -> Markup:
    """Share of tokens whose KL is at most x."""
    edges, counts, total = _bins(scored["kl_histogram"])
    if not sum(counts):
        return Markup("")
    below = scored["kl_histogram"]["below"]
    shares = [(below + count) / total for count in accumulate(counts, initial=0)]
    chart = Chart(
        f"{key}-cumulative",
        "Cumulative distribution of the KL of single tokens",
        f"Share of {total} tokens whose KL is at most the value on the logarithmic axis. {_marks_in_words(quality)}",
        x=Scale(edges[0], edges[-1], log=True),
        y=Scale(0.0, 1.0),
        x_label="KL of a token, nats",
        y_label="share of tokens with at most that KL",
        percent=True,
    )
    chart.line([Row(x, y) for x, y in zip(edges, shares, strict=True)], marks=False)
    return _with_marks(chart, quality).render()


def by_position(scored: Mapping[str, Any], quality: Mapping[str, Any], key: str) -> Markup:
    """Mean KL over the position in a window, with intervals, and the mean of all positions."""
    rows = [row for row in scored["by_position"] if row["kl_mean"] is not None]
    if len(rows) < 2:
        return Markup("")
    ends = [_top(row, "kl_mean") for row in rows]
    chart = Chart(
        f"{key}-position",
        "Mean KL by position in the window",
        f"Mean KL in nats per token with 95 % intervals, for {len(rows)} ranges of positions from {rows[0]['from']} to "
        f"{rows[-1]['to'] - 1}: from {min(r['kl_mean'] for r in rows):.3g} to {max(r['kl_mean'] for r in rows):.3g}.",
        x=Scale(rows[0]["from"], rows[-1]["to"]),
        y=Scale(0.0, max(ends) * 1.05),
        x_label="position in the window, tokens",
        y_label="mean KL, nats per token",
    )
    if quality.get("kl_mean") is not None:
        chart.level(quality["kl_mean"], "mean of all")
    return chart.line(
        [
            _row((row["from"] + row["to"]) / 2, row, "kl_mean", f"positions {row['from']} to {row['to'] - 1}")
            for row in rows
        ]
    ).render()


def sqnr_curve(layers: Mapping[str, Any], key: str) -> Markup:
    """SQNR (signal to noise) of the hidden states after each part."""
    rows = [(i, row) for i, row in enumerate(layers["parts"]) if row["sqnr_db"] is not None]
    if len(rows) < 2:
        return Markup("")
    values = [row["sqnr_db"] for _, row in rows]
    chart = Chart(
        f"{key}-sqnr",
        "Signal to noise of the hidden states after each part",
        f"Signal to noise ratio in decibels against the full-precision model, after the embedding and after every layer: "
        f"{values[0]:.1f} dB at first, {values[-1]:.1f} dB at last, {min(values):.1f} dB at the lowest.",
        x=Scale(-0.7, len(layers["parts"]) - 0.3),
        y=Scale(min(0.0, min(values)), max(values) * 1.05),
        x_label="part of the model",
        y_label="SQNR after it, dB",
        x_ticks=_part_ticks(layers["parts"]),
    )
    return chart.line(
        [Row(i, row["sqnr_db"], tip=f"{row['part']}: {row['sqnr_db']:.1f} dB") for i, row in rows]
    ).render()


def layer_costs(layers: Mapping[str, Any], key: str) -> Markup:
    """KL of each part: when it alone is quantized, and won when it alone is restored."""
    parts = layers["parts"]
    values = [_top(part, name) for part in parts for name in ("kl_alone", "kl_restored")]
    worst = max(parts, key=lambda part: part["kl_alone"] or 0.0)
    chart = Chart(
        f"{key}-layers",
        "KL that each part causes",
        f"For the embedding, every layer and the head: the KL when it alone is quantized, and the KL won when it alone is "
        f"restored to float, in nats per token with 95 % intervals. The most costly alone is {worst['part']}.",
        x=Scale(-0.7, len(parts) - 0.3),
        y=Scale(min(0.0, *(part["kl_restored"] or 0.0 for part in parts)), max(values) * 1.05),
        x_label="part of the model",
        y_label="KL, nats per token",
        x_ticks=_part_ticks(parts),
    )
    for series, (field, shift, name) in enumerate(
        (("kl_alone", -0.4, "it alone quantized"), ("kl_restored", 0.02, "won by restoring it alone"))
    ):
        for i, part in enumerate(parts):
            if part[field] is not None:
                chart.column(
                    i + shift, i + shift + 0.38, _row(i, part, field, f"{part['part']}, {name}"), series
                )
        chart.named(series, name)
    return chart.render()


def speed(bench: Mapping[str, Any], field: str, key: str) -> Markup:
    """Tokens per second over the prompt's length: a line per artifact, whiskers for the range of repeats.

    field: `decode_tok_s` or `prefill_tok_s`.
    """
    candidates = bench["candidates"]
    lengths = sorted({run["prompt_tokens"] for candidate in candidates for run in candidate["runs"]})
    top = max(run[field]["high"] for candidate in candidates for run in candidate["runs"])
    decode = field == "decode_tok_s"
    medians = "; ".join(
        f"{candidate['name']}: "
        + ", ".join(f"{run[field]['median']:.0f} at {run['prompt_tokens']}" for run in candidate["runs"])
        for candidate in candidates
    )
    chart = Chart(
        f"{key}-{field.partition('_')[0]}",
        "Decode speed by the depth of the cache" if decode else "Prefill speed by the length of the prompt",
        f"Tokens a second, medians with the range of {bench['repeat']} repeats. {medians}.",
        x=Scale(lengths[0] / 1.5, lengths[-1] * 1.5, log=True),
        y=Scale(0.0, top * 1.08),
        x_label="tokens in the cache before" if decode else "tokens of the prompt",
        y_label=f"{'decode' if decode else 'prefill'}, tokens a second",
        x_ticks=[(n, f"{n:,}") for n in lengths],
    )
    for series, candidate in enumerate(candidates):
        # Whiskers of several artifacts are drawn side by side.
        spread = 1 + 0.02 * (series - (len(candidates) - 1) / 2)
        chart.line(
            [
                Row(
                    run["prompt_tokens"] * spread,
                    run[field]["median"],
                    run[field]["low"],
                    run[field]["high"],
                    f"{candidate['name']}, {run['prompt_tokens']} tokens: {run[field]['median']:.1f} tok/s "
                    f"({run[field]['low']:.1f} to {run[field]['high']:.1f})",
                )
                for run in candidate["runs"]
            ],
            series,
            name=candidate["name"] if len(candidates) > 1 else None,
        )
    return chart.render()


def time_by_part(profile: Mapping[str, Any], key: str) -> Markup:
    """Share of a decoded token's time by part of the model: a column for each artifact and prompt."""
    rows = profile["rows"]
    names = [part["part"] for part in rows[0]["parts"]]
    words = "; ".join(
        f"{_named(row, rows)}: " + ", ".join(f"{p['part']} {p['share']:.1%}" for p in row["parts"])
        for row in rows
    )
    chart = Chart(
        f"{key}-parts",
        "Time of a decoded token by part of the model",
        f"Shares of the time of a decoded token, with the tracer on. {words}.",
        x=Scale(-0.5, len(names) - 0.5),
        y=Scale(0.0, 1.08 * max(part["share"] for row in rows for part in row["parts"])),
        x_label="part of the model",
        y_label="share of the time",
        x_ticks=list(enumerate(names)),
        percent=True,
    )
    width = 0.8 / len(rows)
    for series, row in enumerate(rows):
        for i, part in enumerate(row["parts"]):
            left = i - 0.4 + series * width
            tip = f"{_named(row, rows)}, {part['part']}: {part['share']:.1%}, {1000 * part['seconds']['median']:.2f} ms"
            chart.column(left, left + width, Row(i, part["share"], tip=tip), series)
        if len(rows) > 1:
            chart.named(series, _named(row, rows))
    return chart.render()


def _named(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Name of a row by what it does not share with the other rows."""
    several = len({other["name"] for other in rows}) > 1
    prompt = f"prompt of {row['prompt_tokens']:,} tokens"
    return f"{row['name']}, {prompt}" if several else prompt


def _bins(found: Mapping[str, Any]) -> tuple[list[float], list[int], int]:
    """Returns edges and counts of the bins, and the number of all tokens.

    The bins reach from the first to the last that has a token.
    """
    counts = found["counts"]
    total = sum(counts) + found["below"] + found["above"]
    occupied = [i for i, count in enumerate(counts) if count] or [0]
    first, last = occupied[0], max(occupied[-1], occupied[0] + 1)
    edges = [10 ** (found["log10_low"] + found["log10_step"] * i) for i in range(first, last + 2)]
    return edges, counts[first : last + 1], total


def _with_marks(chart: Chart, quality: Mapping[str, Any]) -> Chart:
    for name, field in _MARKS:
        value = quality.get(field)
        if value is not None and chart.x.low <= value <= chart.x.high:
            chart.rule(value, name)
    return chart


def _marks_in_words(quality: Mapping[str, Any]) -> str:
    marks = [f"{name} {quality[field]:.3g}" for name, field in _MARKS if quality.get(field) is not None]
    return f"{', '.join(marks)} nats.".capitalize() if marks else ""


def _row(x: float, row: Mapping[str, Any], field: str, what: str) -> Row:
    low, high = row[f"{field}_ci95"]
    words = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
    return Row(x, row[field], low, high, f"{what}: {row[field]:.4g}{words} nats per token")


def _top(row: Mapping[str, Any], field: str) -> float:
    """Returns the upper end of the interval, or the value if the end is unknown."""
    high = row[f"{field}_ci95"][1]
    return float(high if high is not None else row[field] or 0.0)


def _part_ticks(parts: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Returns ticks for the embedding, every n-th layer by number, and the head."""
    last = len(parts) - 1
    step = max(1, -(-last // 10))
    return [
        (0, "emb"),
        *((i, str(i - 1)) for i in range(1, last, step) if i + step / 2 < last or step == 1),
        (last, "head"),
    ]
