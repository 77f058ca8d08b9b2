"""HTML page of `--html`: one file without script or assets, light or dark as the reader's system.

Values come from untrusted files too, so jinja2's autoescape escapes all of them. Letters that would change
the direction or the layout of the following text are written as escapes. The page's own policy forbids script
and network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from edgellama.files import to_json
from edgellama.report import charts, label_charts, metrics, svg
from edgellama.report.checks import worst_verdict
from edgellama.report.numbers import interval, limit, megabytes, number, percent, signed
from edgellama.report.tables import printable

_QUESTIONS = {
    "structure": "Is the file what the recipe says?",
    "text": "Is the text new to the model?",
    "claims": "Is true what the bundle says of itself?",
    "parity": "Does it compute what the quantized model computes?",
    "consistency": "Does it agree with itself?",
    "quality": "Is it good enough?",
    "labels": "Does it answer with the right labels?",
    "data": "Are its answers on labelled texts those of the model?",
    "golden": "Are the golden vectors those of the model?",
    "adapters": "Does each adapter change the base as it should?",
    "regression": "Is it worse than before?",
    "agreement": "Do the artifacts agree with each other?",
    "device": "Does the phone compute the same?",
    "emulated": "Do Arm processors compute the same?",
}
_KEPT = "\n\t\u200c\u200d"  # kept in text: line breaks, and the joiners of letters and emoji


@dataclass(frozen=True)
class PageData:
    """Data of a page.

    reports, bench, profile: as in JSON. manifest, export: from the bundle, empty without one.
    """

    name: str
    reports: Sequence[Mapping[str, Any]] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)
    bench: Mapping[str, Any] | None = None
    profile: Mapping[str, Any] | None = None


def render(data: PageData) -> str:
    """Returns the page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("edgellama.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {
        "number": number,
        "limit": limit,
        "percent": percent,
        "megabytes": megabytes,
        "breakable": breakable,
        "interval": interval,
        "signed": signed,
    }
    template = environment.get_template("page.html.jinja")
    reports = json.loads(to_json(list(data.reports)))  # null for NaN and infinity
    verdict = worst_verdict(report["verdict"] for report in reports) if reports else None
    return template.render(
        name=data.name,
        verdict=verdict,
        reports=[_Section(report, f"t{i}") for i, report in enumerate(reports)],
        manifest=data.manifest,
        export=data.export,
        sizes=[_sizes(entry, data.export) for entry in data.manifest.get("artifacts", ())],
        modules=_modules(data.export),
        bench=json.loads(to_json(data.bench)) if data.bench else None,
        profile=json.loads(to_json(data.profile)) if data.profile else None,
        figures=charts,
        label_charts=label_charts,
        svg=svg,
        ratio_scale=_ratio_scale(data.bench),
    )


class _Section:
    """One report with the data that the template draws from it. key: unique on the page."""

    def __init__(self, report: Mapping[str, Any], key: str) -> None:
        self.report, self.key = report, key
        self.quality: Mapping[str, Any] = report["quality"]
        self.scored: Mapping[str, Any] | None = report.get("scored")
        self.layers: Mapping[str, Any] | None = report.get("layers")
        self.samples: Sequence[Mapping[str, Any]] = report.get("samples", ())
        self.regression: Mapping[str, Any] | None = report.get("regression")
        self.passed = report["verdict"] == "pass"
        self.open_checks = [c for c in report["checks"] if c["verdict"] != "pass"]

    @property
    def tiles(self) -> list[tuple[str, str, str]]:
        """Headline figures: label, figure, small print."""
        return metrics.tiles(self.quality)

    @property
    def limit(self) -> float | None:
        """The gate's limit of the mean KL."""
        return next((c["limit"] for c in self.report["checks"] if c["name"] == "quality.kl"), None)

    @property
    def groups(self) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
        """Rows (group, its question, checks). Groups with a check that did not pass come first."""
        checks_by_group: dict[str, list[Mapping[str, Any]]] = {}
        for check in self.report["checks"]:
            checks_by_group.setdefault(check["name"].partition(".")[0], []).append(check)
        rows = [(name, _QUESTIONS.get(name, ""), checks) for name, checks in checks_by_group.items()]
        return sorted(rows, key=lambda row: all(c["verdict"] == "pass" for c in row[2]))

    @property
    def domain_scale(self) -> svg.Scale:
        return _scale([q["kl_mean_ci95"][1] or q["kl_mean"] for q in self.report["domains"].values()])

    @property
    def split_scale(self) -> svg.Scale:
        rows = self.layers["split"].values() if self.layers else ()
        ends = [end for row in rows for end in row["kl_ci95"] if end is not None]
        return svg.Scale(min(0.0, *ends, 0.0), max(ends, default=1.0) * 1.05)

    @property
    def agreement_scale(self) -> svg.Scale:
        return _scale([a["kl_mean_ci95"][1] or a["kl_mean"] for a in self.report["agreement"].values()])


def _scale(values: Sequence[float | None]) -> svg.Scale:
    return svg.Scale(0.0, 1.05 * max((v for v in values if v is not None), default=1.0))


def _ratio_scale(bench: Mapping[str, Any] | None) -> svg.Scale:
    """Returns the scale, around 1, for all ratios of a benchmark."""
    rows = bench["ratios"] if bench else ()
    ends = [1.0, *(end for row in rows for phase in ("prefill", "decode") for end in row[phase]["ci95"])]
    return svg.Scale(min(ends) / 1.05, max(ends) * 1.05, log=True)


def _sizes(entry: Mapping[str, Any], export: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an artifact's bytes by group of tensors, and the rest: graph, constants, norms."""
    rows = [
        {
            "modules": row.get("modules", "tensors"),
            "scheme": row["scheme"] + ("" if row["group_size"] is None else f" g{row['group_size']}"),
            "activations": row["activations"],
            "tensors": row["tensors"],
            "bytes": row["bytes"],
            "share": row["bytes"] / entry["bytes"],
        }
        for row in sorted(entry["quantization"], key=lambda row: -row["bytes"])
    ]
    rest = entry["bytes"] - sum(row["bytes"] for row in rows)
    if rest > 0:
        rows.append(
            {
                "modules": "graph, constants, everything else",
                "scheme": "",
                "activations": "",
                "tensors": None,
                "bytes": rest,
                "share": rest / entry["bytes"],
            }
        )
    return {"target": entry["target"], "bytes": entry["bytes"], "memory": entry["memory"], "rows": rows}


def _modules(export: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns bytes by kind of module and scheme, from the export's report, largest first."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in export.get("tensors", ()):
        module = re.sub(r"\.(weight|bias)$", "", tensor["name"]).rpartition(".")[2]
        scheme = tensor["scheme"]
        entry = entries.setdefault(
            (module, scheme), {"module": module, "scheme": scheme, "tensors": 0, "bytes": 0, "worst": None}
        )
        entry["tensors"] += 1
        entry["bytes"] += tensor["bytes"]
        sqnrs_db = [x for x in (entry["worst"], tensor["sqnr_db"]) if x is not None]
        entry["worst"] = min(sqnrs_db, default=None)
    total = sum(entry["bytes"] for entry in entries.values()) or 1
    rows = sorted(entries.values(), key=lambda entry: (-entry["bytes"], entry["module"]))
    return [{**entry, "share": entry["bytes"] / total} for entry in rows]


def breakable(name: str) -> Markup:
    """Returns a name with line breaks allowed after its marks, so that a narrow table stays legible."""
    return Markup(re.sub(r"([._/:-])(?=[^<>])", r"\1<wbr>", str(escape(text(name)))))


def text(value: str) -> str:
    """Returns text with its line breaks. All other invisible characters become escapes."""
    return "".join(c if c in _KEPT else printable(c) for c in value)


def _visible(value: Any) -> Any:
    """Returns a value as the template prints it: markup unchanged, text with escapes.

    The escapes replace letters that act on their surroundings.
    """
    return value if hasattr(value, "__html__") or not isinstance(value, str) else text(value)
