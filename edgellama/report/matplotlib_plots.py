"""Plots of reports: SVG, PNG or PDF, by the file's name. Equal data, equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellama.errors import MissingDependencyError, UsageError

FORMATS = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Raises before the slow part if a plot could not be written.

    UsageError for another suffix than `FORMATS`, MissingDependencyError without matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{path}: not a picture that can be written", remedy=f"Use a name ending in {', '.join(FORMATS)}."
        )
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "a plot needs the package 'matplotlib', which is not installed",
            remedy="pip install 'edgellama[report]'",
        ) from error


def plot_layers(section: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Plots the section `layers` of a report: the SQNR curve, and both KL values with their intervals."""
    pyplot = _pyplot()
    parts = section["parts"]
    names = [part["part"].removeprefix("model.") for part in parts]
    places = range(len(parts))
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(max(6, len(parts) * 0.3), 6))
    curve = [float("nan") if part["sqnr_db"] is None else part["sqnr_db"] for part in parts]
    top.plot(places, curve, marker="o", markersize=3)
    top.set_ylabel("SQNR after it, dB")
    top.set_title(title)
    for key, label, shift in (
        ("kl_alone", "it alone quantized", -0.2),
        ("kl_restored", "won by restoring it", 0.2),
    ):
        values = [part[key] for part in parts]
        low = [max(0.0, part[key] - part[f"{key}_ci95"][0]) for part in parts]
        high = [max(0.0, part[f"{key}_ci95"][1] - part[key]) for part in parts]
        bottom.bar(
            [p + shift for p in places],
            values,
            0.4,
            yerr=(low, high),
            label=label,
            error_kw={"linewidth": 0.6},
        )
    bottom.set_ylabel("KL, nats per token")
    bottom.set_xticks(list(places), names, rotation=90, fontsize=7)
    bottom.legend()
    _save(figure, path)


def plot_frontier(points: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Plots the expected KL over bytes."""
    figure, axes = _pyplot().subplots(figsize=(6, 4))
    axes.plot([point["bytes"] / 1e6 for point in points], [point["kl"] for point in points], marker=".")
    axes.set_xlabel("bytes, MB")
    axes.set_ylabel("expected KL, nats per token")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "edgellama"
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.tight_layout()
    figure.savefig(path, metadata=undated.get(path.suffix.lower()))
    _pyplot().close(figure)
