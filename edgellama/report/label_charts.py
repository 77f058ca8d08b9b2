"""Reliability diagram of a classifier: the share of right answers over their confidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from edgellama.report.svg import Chart, Row, Scale

_NAMES = {"reference": "full precision", "artifact": "artifact"}


def reliability(section: Mapping[str, Any], key: str) -> Markup:
    """Accuracy over confidence by bin, for both models, and the line on which they are equal.

    section: `labelled` of a report. Empty if it has no bins, as reports of older versions.
    """
    bins = section.get("reliability")
    if not bins:
        return Markup("")
    error = f"{section['ece_reference']:.3f} for full precision and {section['ece_artifact']:.3f} for the artifact"
    chart = Chart(
        f"{key}-reliability",
        "Right answers by confidence",
        f"Share of right answers over the mean confidence, in bins of confidence. Expected calibration error: {error}.",
        x=Scale(0.0, 1.0),
        y=Scale(0.0, 1.05),
        x_label="confidence: probability of the answer",
        y_label="share of right answers",
        percent=True,
    )
    chart.line([Row(0.0, 0.0), Row(1.0, 1.0)], 2, name="confidence is accuracy", marks=False)
    for series, (model, name) in enumerate(_NAMES.items()):
        rows = [
            Row(
                row["confidence"],
                row["accuracy"],
                tip=f"{name}: {row['texts']} texts, confidence {row['confidence']:.3f}, right {row['accuracy']:.1%}",
            )
            for row in bins[model]
        ]
        chart.line(rows, series, name=name)
    return chart.render()
