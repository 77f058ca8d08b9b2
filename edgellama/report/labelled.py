"""Lines of the text report about a classifier on labelled texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def lines(section: Mapping[str, Any]) -> list[str]:
    """A line for all texts and each group, a table of the worst flips. section: `labelled` of a report."""
    rows = [("all", section), *section["groups"].items()]
    width = max(len(str(name)[:24]) for name, _ in rows)
    found = [f"  on {section['texts']} labelled texts (95 % intervals, full precision -> artifact)"]
    for name, part in rows:
        low, high = part["accuracy_difference_ci95"]
        found.append(
            f"    {str(name)[:24]:<{width}}  flips {part['flips']:.2%} of {part['texts']}, accuracy "
            f"{part['accuracy_reference']:.1%} -> {part['accuracy_artifact']:.1%} [{low:+.4f}, {high:+.4f}], "
            f"F1 {part['f1_reference']:.3f} -> {part['f1_artifact']:.3f}, {_auc(part)}ECE {part['ece_reference']:.3f} -> "
            f"{part['ece_artifact']:.3f}"
        )
    for flip in section["worst_flips"][:5]:
        found.append(
            f"    row {flip['row']} ({flip['label']}): {flip['reference']} {flip['reference_probability']:.3f} -> "
            f"{flip['artifact']} {flip['artifact_probability']:.3f}"
        )
    return found


def _auc(part: Mapping[str, Any]) -> str:
    """AUC of both models. Empty for texts of one label, and for reports of older versions."""
    one, other = part.get("auc_reference"), part.get("auc_artifact")
    if one is None or other is None or math.isnan(one) or math.isnan(other):
        return ""
    return f"AUC {one:.3f} -> {other:.3f}, "
