"""What a new bundle keeps of the one that it replaces: whatever has the same key and is still as it was written.

Three kinds of parts are kept, each by its own key: what belongs to the quantized model (reports/export.json, the golden
vectors of the reference), an artifact with its golden vectors, and the gate's report about it. Files are copied and
their copies hashed; they are not linked, because an artifact that a library opens during the gate may be written to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from edgellama.bundle.bundle import Bundle, is_bundle
from edgellama.bundle.golden import Golden, read_golden
from edgellama.bundle.record import FILE, SCHEMA, ExportRequest, read_build_record
from edgellama.bundle.reports import EXPORT_REPORT
from edgellama.bundle.restore import FLOATS
from edgellama.errors import BundleError
from edgellama.files import digest, file_sha256, to_json
from edgellama.host.versions import tools
from edgellama.recipe import Recipe
from edgellama.report import Check, Report
from edgellama.targets import Target
from edgellama.targets.provenance import recipe_for

Pairs = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class PartKeys:
    """Keys of a bundle's parts. artifacts, gates: by target."""

    model: str
    artifacts: Mapping[str, str]
    gates: Mapping[str, str | None]

    @classmethod
    def of(
        cls,
        request: ExportRequest,
        checkpoint: Mapping[str, str],
        recipe: Recipe,
        targets: Sequence[Target],
        context_length: int,
        calibration: Mapping[str, Any] | None,
    ) -> PartKeys:
        """Keys of what the request makes of a checkpoint, once it is known what that means for it: `recipe` with the
        schemes that were chosen, the calibration as a report has it."""
        model = digest(
            {
                "calibration": calibration,
                "checkpoint": checkpoint,
                "context": context_length,
                "recipe": recipe_for(recipe, ()),
                "tools": tools(),
            }
        )
        artifacts, gates = {}, {}
        for target in targets:
            options = {name: getattr(recipe, name) for name in target.options}
            packages = tools(target.packages)
            artifacts[target.name] = digest(
                {"model": model, "target": target.name, "options": options, "tools": packages}
            )
            gates[target.name] = (
                None
                if request.validation_tokens is None
                else digest(
                    {
                        "artifact": artifacts[target.name],
                        "max_kl": request.max_kl,
                        "tokens": request.validation_tokens,
                    }
                )
            )
        return cls(model, artifacts, gates)


def write_record(
    directory: Path, request: ExportRequest, checkpoint: Mapping[str, str] | None, keys: PartKeys | None
) -> None:
    """Write build.json. `checkpoint` and `keys` None: a checkpoint that only exists in memory, known to nobody else."""
    inputs = {**request.to_dict(), "checkpoint": checkpoint}
    unknown = digest(None)
    data = {
        "schema": SCHEMA,
        "key": digest(inputs),
        "inputs": inputs,
        "model": keys.model if keys else unknown,
        "targets": {
            name: {
                "artifact": keys.artifacts[name] if keys else unknown,
                "gate": keys.gates[name] if keys else None,
            }
            for name in request.targets
        },
    }
    (directory / FILE).write_text(to_json(data), encoding="utf-8")


@dataclass(frozen=True)
class ReusedParts:
    """Parts that were copied into a new bundle.

    artifacts: manifest entries by target. reports: the gate's, by target. agreement: figures by pair of targets.
    golden: golden vectors of the same quantized model. complete: nothing has to be quantized or lowered.
    """

    artifacts: Mapping[str, Mapping[str, Any]]
    reports: Mapping[str, Report]
    agreement: Pairs
    golden: Golden | None
    complete: bool


@dataclass(frozen=True)
class Reuse:
    """Parts of an old bundle that have the keys of a new one. `bundle` None: nothing is kept."""

    bundle: Bundle | None
    model: bool = False
    artifacts: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()

    @classmethod
    def of(cls, old: Path, keys: PartKeys | None) -> Reuse:
        """Of the bundle at `old`, if there is one. Its files are looked at when they are taken."""
        if keys is None or old.is_symlink() or not is_bundle(old):
            return cls(None)
        try:
            bundle = Bundle.open(old)
        except BundleError:
            return cls(None)
        made = read_build_record(bundle)
        if made is None:
            return cls(None)
        known = {name: made["targets"][name] for name in bundle.targets if name in made["targets"]}
        return cls(
            bundle,
            made["model"] == keys.model,
            frozenset(n for n, k in known.items() if keys.artifacts.get(n) == k["artifact"]),
            frozenset(n for n, k in known.items() if k["gate"] and keys.gates.get(n) == k["gate"]),
        )

    def copy_into(self, directory: Path, targets: Sequence[Target], *, gate: bool) -> ReusedParts:
        """Copy the reusable parts of the old bundle into a new one.

        gate: whether reports are asked for. The model's files are copied only where nothing has to be quantized again.
        """
        artifacts = {t.name: entry for t in targets if (entry := self.artifact(t, directory))}
        reports = {name: report for name in artifacts if (report := self.report(name))}
        golden = self.golden()
        complete = (
            len(artifacts) == len(targets)
            and (not gate or len(reports) == len(targets))
            and golden is not None
            and self._take_model_files(directory)
        )
        pairs = self.agreement([target.name for target in targets])
        return ReusedParts(artifacts, reports, pairs, golden, complete)

    def _take_model_files(self, directory: Path) -> bool:
        """Copy the files that belong to the quantized model; False where they have to be written."""
        if self.bundle is None or not self.model or not self.take("tokenizer", directory):
            return False
        names = [EXPORT_REPORT]
        if f"reports/{FLOATS}" in self.bundle.manifest["files"]:
            names.append(f"reports/{FLOATS}")
        return all(self.take(name, directory) for name in names)

    def take(self, path: str, directory: Path) -> bool:
        """Copy the file or directory at `path` of the old bundle into a new one; False, and nothing, if it is damaged."""
        if self.bundle is None:
            return False
        files = self.bundle.manifest["files"]
        names = [name for name in files if name == path or name.startswith(f"{path}/")]
        taken = bool(names)
        for name in names:
            source, copy = self.bundle.path / name, directory / name
            if any(step.is_symlink() for step in (source, *source.parents[: name.count("/")])):
                taken = False
                break
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, copy)
            except FileNotFoundError:
                taken = False
                break
            if file_sha256(copy) != files[name]["sha256"]:
                taken = False
                break
        if not taken and os.path.lexists(directory / path):
            shutil.rmtree(directory / path) if (directory / path).is_dir() else (directory / path).unlink()
        return taken

    def artifact(self, target: Target, directory: Path) -> dict[str, Any] | None:
        """Copy an artifact, and return the manifest's entry about it; None for one that has to be made."""
        if target.name not in self.artifacts or not self.take(target.artifact, directory):
            return None
        assert self.bundle is not None
        return dict(self.bundle.artifact_entry(target.name))

    def report(self, target: str) -> Report | None:
        """The gate's report about an artifact, without its agreement with others; None for one that has to be made."""
        if self.bundle is None or not {target} <= self.artifacts & self.gates:
            return None
        data = self._json(f"reports/validate-{target}.json")
        if data is None or data["verdict"] != "pass":
            return None
        checks = tuple(Check(**c) for c in data["checks"] if not c["name"].startswith("agreement."))
        names = {field.name for field in fields(Report)} - {"target", "checks", "agreement"}
        return Report(target=target, checks=checks, **{name: data[name] for name in names if name in data})

    def agreement(self, targets: Sequence[str]) -> Pairs:
        """(reference, candidate) -> figures, of pairs among `targets` that were both kept, in the same order."""
        pairs: Pairs = {}
        if self.bundle is None:
            return pairs
        before = [name for name in self.bundle.targets if name in self.artifacts]
        for one, other in combinations(targets, 2):
            if one in before and other in before and before.index(one) < before.index(other):
                data = self._json(f"reports/validate-{one}.json")
                if data is not None and other in data["agreement"]:
                    pairs[one, other] = data["agreement"][other]
        return pairs

    def golden(self) -> Golden | None:
        """The golden vectors: the reference's are those of the new bundle, an artifact's where it was kept."""
        if self.bundle is None or not self.model:
            return None
        try:
            return read_golden(self.bundle)
        except BundleError:
            return None

    def _json(self, path: str) -> Any:
        """A report of the old bundle, verified; None for one that is not there or damaged."""
        assert self.bundle is not None
        if path not in self.bundle.manifest["files"] or self.bundle.problems_by_file(path):
            return None
        return json.loads((self.bundle.path / path).read_text(encoding="utf-8"))
