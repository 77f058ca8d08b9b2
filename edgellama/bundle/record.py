"""Build record: the inputs of an export, as data.

Their hash is the bundle's content key: equal keys, equal bundles. A bundle stores its record in
`reports/build.json`. This module imports nothing heavy. An export whose bundle is up to date therefore ends
before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgellama.bundle.bundle import Bundle, is_bundle
from edgellama.bundle.schema import published, violations
from edgellama.errors import BundleError, UsageError
from edgellama.files import (
    digest,
    file_sha256,
    is_license_file,
    numbered_parts,
    read_json,
    strange_file,
    to_json,
)
from edgellama.host.adapter_files import AdapterPlace
from edgellama.host.hub import origin_of
from edgellama.host.versions import tools
from edgellama.recipe import Recipe, find_recipe
from edgellama.targets import find_target
from edgellama.text.windows import Text

SCHEMA, FILE = "edgellama.build/1", "reports/build.json"
DEFAULT_RECIPE = "int4"
DEFAULT_TARGETS = ("xnnpack",)
SHORT_TOKENS = 1024  # scored by the gate at the end of an export; `edgellama validate` scores more

# Suffixes of the files that a reader opens in a checkpoint's directory. README.md names the licence.
READ = (".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".jinja", "README.md")


@dataclass(frozen=True)
class ExportRequest:
    """The options of an export, as the user gave them.

    Attributes:
        recipe: the recipe, before a budgeted recipe chooses schemes.
        targets: names of targets.
        context: length of the KV cache in tokens; None for the model's own, at most 2048.
        calibration: name and sha256 of each text; None for those that ship with edgellama.
        max_bytes: limit for each artifact, in bytes.
        max_kl: limit for the mean KL, nats per token; None for the recipe's own.
        validation_tokens: number of tokens that the gate scores; None for an export without the gate.
        stop_tokens: texts of further tokens that end an answer; None for those that the checkpoint names, an
            empty tuple to accept a chat model without any.
        chat_date: ISO date for the chat template; None for the template's own.
        adapters: sha256 and weight of each adapter that is merged into the checkpoint.
        swappable: name and sha256 of each adapter that is switched at run time.
        classifier: options of a classifier, with hashes of its files; None for a model that generates text.
    """

    recipe: Recipe
    targets: tuple[str, ...]
    context: int | None
    calibration: tuple[tuple[str, str], ...] | None
    max_bytes: int | None
    max_kl: float | None
    validation_tokens: int | None
    stop_tokens: tuple[str, ...] | None = None
    chat_date: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    swappable: tuple[tuple[str, str], ...] = ()
    classifier: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        *,
        recipe: Recipe | str,
        targets: Sequence[str],
        context: int | None = None,
        calibration: Sequence[Text] | None = None,
        max_bytes: int | None = None,
        max_kl: float | None = None,
        validation_tokens: int | None = SHORT_TOKENS,
        stop_tokens: Sequence[str] | None = None,
        chat_date: str | None = None,
        adapters: Sequence[AdapterPlace] = (),
        swappable: Mapping[str, Path] = MappingProxyType({}),
        classifier: Mapping[str, Any] | None = None,
    ) -> ExportRequest:
        """Makes a request from the arguments of `edgellama.export`.

        Raises UsageError for an unknown name, RecipeError for an invalid recipe file, and CheckpointError for a
        directory without an adapter.
        """
        texts = None if calibration is None else tuple(sorted((t.name, _sha256(t)) for t in calibration))
        return cls(
            recipe if isinstance(recipe, Recipe) else find_recipe(recipe),
            tuple(find_target(name).name for name in dict.fromkeys(targets)),
            context,
            texts,
            max_bytes,
            max_kl,
            validation_tokens,
            None if stop_tokens is None else tuple(stop_tokens),
            None if chat_date is None else iso_date(chat_date),
            tuple((place.sha256(), place.weight) for place in adapters),
            tuple((name, AdapterPlace(path).sha256()) for name, path in swappable.items()),
            classifier,
        )

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON data, with the versions of all packages that affect the result."""
        packages = {name for target in self.targets for name in find_target(target).packages}
        data = {
            "calibration": self.calibration,
            "context": self.context,
            "max_bytes": self.max_bytes,
            "max_kl": self.max_kl,
            "recipe": self.recipe.to_dict(),
            "targets": self.targets,
            "tools": tools(packages),
            "validation_tokens": self.validation_tokens,
            "stop_tokens": self.stop_tokens,
            "chat_date": self.chat_date,
            **({"adapters": self.adapters} if self.adapters else {}),
            **({"swappable_adapters": self.swappable} if self.swappable else {}),
            **({"classifier": self.classifier} if self.classifier is not None else {}),
        }
        plain: dict[str, Any] = json.loads(to_json(data))  # tuples are lists in JSON
        return plain


def checkpoint_files(path: str | Path) -> dict[str, str]:
    """sha256 of every file of the checkpoint that a reader may open, by name.

    A single file goes by its suffix, because its name does not affect the bundle, and a part by its number.
    Licences are copied into the bundle, and lie beside a single file. Raises OSError.
    """
    path = Path(path)
    if path.is_file():
        first, *others = numbered_parts(path)
        numbers = {f".part{i}": file_sha256(part) for i, part in enumerate(others, start=2)}
        beside = {f.name: file_sha256(f) for f in sorted(path.parent.iterdir()) if _is_license(f)}
        return {first.suffix.lower() or ".gguf": file_sha256(first), **numbers, **beside}
    read = (f for f in sorted(path.iterdir()) if (f.name.endswith(READ) and f.is_file()) or _is_license(f))
    return {f.name: file_sha256(f) for f in read}


def _is_license(file: Path) -> bool:
    return is_license_file(file.name) and strange_file(file) is None and file.is_file()


def bundle_name(destination: Path) -> str:
    """Name in the manifest of a bundle at `destination`."""
    return destination.name.removesuffix(".edgellama")


def read_build_record(bundle: Bundle) -> Mapping[str, Any] | None:
    """Content of build.json, verified; None if it is missing, altered or inconsistent."""
    if FILE not in bundle.manifest["files"] or bundle.problems_by_file(FILE):
        return None
    try:
        data = read_json(bundle.path / FILE)
    except (OSError, ValueError, RecursionError):
        return None
    schema = published("build")
    if any(violations(data, schema, schema, "build")) or data["key"] != digest(data["inputs"]):
        return None
    return dict(data)


def unrecorded_files(bundle: Bundle, record: Mapping[str, Any]) -> list[str]:
    """Files whose hashes in the manifest and in build.json differ, and files that only one of them names."""
    manifest = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items() if name != FILE}
    recorded = record["files"]
    names = {*manifest, *recorded}
    return sorted(name for name in names if manifest.get(name) != recorded.get(name))


_DAMAGED, _NO_RECORD = "a damaged manifest", "no record of its inputs"


def other_options(destination: Path, request: ExportRequest) -> list[str] | None:
    """Differences between the bundle at `destination` and the request that show without the checkpoint.

    None if there is no bundle.
    """
    if destination.is_symlink() or not is_bundle(destination):
        return None
    try:
        bundle = Bundle.open(destination)
    except BundleError:
        return [_DAMAGED]
    record = read_build_record(bundle)
    if record is None:
        return [_NO_RECORD]
    inputs, requested = record["inputs"], request.to_dict()
    names = [*requested, *(name for name in inputs if name not in requested and name != "checkpoint")]
    reasons = [f"other {name.replace('_', ' ')}" for name in names if inputs.get(name) != requested.get(name)]
    if bundle.manifest["name"] != bundle_name(destination):
        reasons.append("other name")
    return reasons


def stale_reasons(destination: Path, checkpoint: str | Path, request: ExportRequest) -> list[str] | None:
    """Differences, in words, between the bundle at `destination` and the bundle of the request.

    Empty if the bundle says that it is the requested one, and its manifest, its record and its files agree.
    `edgellama.bundle.vouchers` knows if an export wrote it. None if there is no bundle. Cheap comparisons come
    first, and the checkpoint is read only if everything else agrees.
    """
    reasons = other_options(destination, request)
    if reasons is None or reasons[:1] in ([_DAMAGED], [_NO_RECORD]):
        return reasons
    bundle = Bundle.open(destination)
    record = read_build_record(bundle)
    assert record is not None
    origin = origin_of(Path(checkpoint))
    if bundle.manifest["source"].get("hub") != (origin.to_dict() if origin else None):
        reasons.append("other repository or revision of the checkpoint")
    if reasons:
        return reasons
    try:
        if record["inputs"]["checkpoint"] != checkpoint_files(checkpoint):
            return ["other checkpoint"]
    except OSError:
        return ["other checkpoint"]
    unrecorded = [f"{name} is not the file that {FILE} records" for name in unrecorded_files(bundle, record)]
    return [*unrecorded, *bundle.problems()][:3]


def iso_date(text: str) -> str:
    """The ISO date of a text. Raises UsageError."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise UsageError(
            f"{text!r} is not a date", remedy="Give year, month and day, for example 2026-11-26."
        ) from error


def _sha256(text: Text) -> str:
    return hashlib.sha256(text.content.encode("utf-8", "surrogatepass")).hexdigest()
