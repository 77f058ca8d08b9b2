"""Reuse of parts of the bundle that an export replaces.

A part is kept if its key is equal and its files are unchanged. There are three kinds of parts, each with its
own content key:

- files of the quantized model: the tokenizer, reports/export.json, and the golden vectors of the reference
- an artifact with its golden vectors
- the gate's report about an artifact

Nothing is kept of a bundle without a voucher (`edgellama.bundle.vouchers`): keys and hashes inside a bundle
can be written by anyone. Files are copied, and the copies are hashed. They are not linked, because a library
that opens an artifact during the gate may write to it.
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
from edgellama.bundle.record import FILE, SCHEMA, ExportRequest, read_build_record, unrecorded_files
from edgellama.bundle.reports import EXPORT_REPORT
from edgellama.bundle.restore import FLOATS
from edgellama.bundle.vouchers import objection
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
    """Content keys of a bundle's parts.

    Attributes:
        model: key of the quantized model.
        artifacts: key of each artifact, by target.
        gates: key of each report of the gate, by target; None without the gate.
    """

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
        """Content keys of the reusable parts, computed from the resolved recipe.

        Args:
            request: the options as the user gave them.
            checkpoint: sha256 of the checkpoint's files, by name.
            recipe: the recipe with the chosen schemes.
            targets: the targets.
            context_length: length of the KV cache in tokens.
            calibration: the calibration, as reports/export.json records it.
        """
        model = digest(
            {
                "calibration": calibration,
                "checkpoint": checkpoint,
                "context": context_length,
                "recipe": recipe_for(recipe, ()),
                "stop_tokens": request.stop_tokens,
                "chat_date": request.chat_date,
                "swappable": request.swappable,
                **({} if request.classifier is None else {"classifier": request.classifier}),
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
    bundle: Bundle, request: ExportRequest, checkpoint: Mapping[str, str] | None, keys: PartKeys | None
) -> str:
    """Writes build.json, and returns the bundle's content key. The caller writes the manifest again afterwards.

    bundle: the bundle, complete but for build.json.
    checkpoint, keys: None for a checkpoint that exists only in memory. Nothing of its bundle is reused.
    """
    inputs = {**request.to_dict(), "checkpoint": checkpoint}
    unknown = digest(None)
    key = digest(inputs)
    data = {
        "schema": SCHEMA,
        "key": key,
        "inputs": inputs,
        "files": {name: entry["sha256"] for name, entry in bundle.manifest["files"].items() if name != FILE},
        "model": keys.model if keys else unknown,
        "targets": {
            name: {
                "artifact": keys.artifacts[name] if keys else unknown,
                "gate": keys.gates[name] if keys else None,
            }
            for name in request.targets
        },
    }
    (bundle.path / FILE).write_text(to_json(data), encoding="utf-8")
    return key


@dataclass(frozen=True)
class ReusedParts:
    """Parts that were copied into a new bundle.

    Attributes:
        artifacts: manifest entries, by target.
        reports: reports of the gate, by target.
        agreement: figures, by pair of targets.
        golden: golden vectors of the same quantized model.
        complete: nothing has to be quantized or lowered.
    """

    artifacts: Mapping[str, Mapping[str, Any]]
    reports: Mapping[str, Report]
    agreement: Pairs
    golden: Golden | None
    complete: bool


@dataclass(frozen=True)
class Reuse:
    """Parts of an old bundle whose keys are those of the new one.

    Attributes:
        bundle: the old bundle; None if nothing is kept.
        model: the quantized model has the same key.
        artifacts: targets whose artifact has the same key.
        gates: targets whose report of the gate has the same key.
        objection: reason why nothing is kept of a bundle with equal keys; None without one.
    """

    bundle: Bundle | None
    model: bool = False
    artifacts: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()
    objection: str | None = None

    @classmethod
    def of(cls, old: Path, keys: PartKeys | None) -> Reuse:
        """Compares the record of the bundle at `old`, if any, with `keys`. Files are verified when copied."""
        if keys is None or old.is_symlink() or not is_bundle(old):
            return cls(None)
        try:
            bundle = Bundle.open(old)
        except BundleError:
            return cls(None)
        record = read_build_record(bundle)
        if record is None:
            return cls(None)
        recorded = {name: record["targets"][name] for name in bundle.targets if name in record["targets"]}
        reuse = cls(
            bundle,
            record["model"] == keys.model,
            frozenset(n for n, k in recorded.items() if keys.artifacts.get(n) == k["artifact"]),
            frozenset(n for n, k in recorded.items() if k["gate"] and keys.gates.get(n) == k["gate"]),
        )
        if not reuse.model and not reuse.artifacts:
            return cls(None)
        if unrecorded := unrecorded_files(bundle, record):
            return cls(None, objection=f"{unrecorded[0]} is not the file that {FILE} records")
        reason = objection(bundle, record["key"])
        return reuse if reason is None else cls(None, objection=reason)

    def copy_into(self, directory: Path, targets: Sequence[Target], *, gate: bool) -> ReusedParts:
        """Copies the reusable parts of the old bundle into a new one.

        The model's files are copied only if nothing has to be quantized again. gate: reports
        are needed as well.
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
        """Copies the files of the quantized model. False if they have to be written again."""
        if self.bundle is None or not self.model or not self.take("tokenizer", directory):
            return False
        names = [EXPORT_REPORT]
        if f"reports/{FLOATS}" in self.bundle.manifest["files"]:
            names.append(f"reports/{FLOATS}")
        return all(self.take(name, directory) for name in names)

    def take(self, path: str, directory: Path) -> bool:
        """Copies the file or directory at `path` of the old bundle. False, and no copy, if it is damaged."""
        if self.bundle is None:
            return False
        files = self.bundle.manifest["files"]
        names = [name for name in files if name == path or name.startswith(f"{path}/")]
        intact = bool(names)
        for name in names:
            source, copy = self.bundle.path / name, directory / name
            if any(step.is_symlink() for step in (source, *source.parents[: name.count("/")])):
                intact = False
                break
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, copy)
            except FileNotFoundError:
                intact = False
                break
            if file_sha256(copy) != files[name]["sha256"]:
                intact = False
                break
        if not intact and os.path.lexists(directory / path):
            shutil.rmtree(directory / path) if (directory / path).is_dir() else (directory / path).unlink()
        return intact

    def artifact(self, target: Target, directory: Path) -> dict[str, Any] | None:
        """Copies an artifact and returns its manifest entry. None if it has to be lowered again."""
        if target.name not in self.artifacts or not self.take(target.artifact, directory):
            return None
        assert self.bundle is not None
        return dict(self.bundle.artifact_entry(target.name))

    def report(self, target: str) -> Report | None:
        """The gate's report about an artifact, without agreement. None if the gate has to run again."""
        if self.bundle is None or not {target} <= self.artifacts & self.gates:
            return None
        data = self._json(f"reports/validate-{target}.json")
        if data is None or data["verdict"] != "pass":
            return None
        if data.get("artifact_sha256") != self.bundle.artifact_sha256(target):
            return None
        checks = tuple(Check(**c) for c in data["checks"] if not c["name"].startswith("agreement."))
        names = {field.name for field in fields(Report)} - {"target", "checks", "agreement"}
        return Report(target=target, checks=checks, **{name: data[name] for name in names if name in data})

    def agreement(self, targets: Sequence[str]) -> Pairs:
        """Figures of agreement, by (reference, candidate).

        Only for pairs of `targets` whose artifacts are both kept, in the same order as in the old bundle.
        """
        pairs: Pairs = {}
        if self.bundle is None:
            return pairs
        kept = [name for name in self.bundle.targets if name in self.artifacts]
        for reference, candidate in combinations(targets, 2):
            if reference in kept and candidate in kept and kept.index(reference) < kept.index(candidate):
                data = self._json(f"reports/validate-{reference}.json")
                if data is not None and candidate in data["agreement"]:
                    pairs[reference, candidate] = data["agreement"][candidate]
        return pairs

    def golden(self) -> Golden | None:
        """Golden vectors of the old bundle; None if the quantized model differs or they are damaged.

        Those of the reference are valid for the new bundle. Those of an artifact are valid if it is kept.
        """
        if self.bundle is None or not self.model:
            return None
        try:
            golden = read_golden(self.bundle)
        except BundleError:
            return None
        about = {name: entry["sha256"] for name, entry in golden.data["artifacts"].items()}
        same = all(about[name] == self.bundle.artifact_sha256(name) for name in self.bundle.targets)
        return golden if same else None

    def _json(self, path: str) -> Any:
        """A report of the old bundle, verified; None if it is missing or damaged."""
        assert self.bundle is not None
        if path not in self.bundle.manifest["files"] or self.bundle.problems_by_file(path):
            return None
        return json.loads((self.bundle.path / path).read_text(encoding="utf-8"))
