"""What an export is asked to make, as data. Its hash is the bundle's content key: equal keys, equal bundles.

A bundle says in `reports/build.json` what it was made from. Nothing heavy is imported here, so that an export which finds
its bundle made already is done before torch would be loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.bundle.bundle import Bundle, is_bundle
from edgellama.bundle.schema import published, violations
from edgellama.errors import BundleError
from edgellama.files import digest, file_sha256, read_json, to_json
from edgellama.host.versions import tools
from edgellama.recipe import Recipe, find_recipe
from edgellama.targets import find_target
from edgellama.text.windows import Text

SCHEMA, FILE = "edgellama.build/1", "reports/build.json"
DEFAULT_RECIPE = "int4"
DEFAULT_TARGETS = ("xnnpack",)
SHORT_TOKENS = 1024  # scored by the validation that ends an export; `edgellama validate` scores more

# Files that a reader opens in a checkpoint's directory, by the ends of their names; README.md names the licence.
READ = (".json", ".safetensors", ".pth", ".model", ".jinja", "README.md")


@dataclass(frozen=True)
class ExportRequest:
    """The options of an export, as they were given.

    context: None for the model's own. calibration: name and sha256 of each text; None for those that ship with
    edgellama. validation_tokens: None for an export without the gate.
    """

    recipe: Recipe
    targets: tuple[str, ...]
    context: int | None
    calibration: tuple[tuple[str, str], ...] | None
    max_bytes: int | None
    max_kl: float | None
    validation_tokens: int | None

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
    ) -> ExportRequest:
        """Raises UsageError for unknown names, RecipeError for a recipe file that is none."""
        texts = None if calibration is None else tuple(sorted((t.name, _sha256(t)) for t in calibration))
        return cls(
            recipe if isinstance(recipe, Recipe) else find_recipe(recipe),
            tuple(find_target(name).name for name in dict.fromkeys(targets)),
            context,
            texts,
            max_bytes,
            max_kl,
            validation_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, with the versions of everything that has a say in the result."""
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
        }
        plain: dict[str, Any] = json.loads(to_json(data))  # tuples are lists in JSON
        return plain


def checkpoint_files(path: str | Path) -> dict[str, str]:
    """sha256 of all that a reader may read of the checkpoint, by name. The name of a single file is no content.

    Raises OSError.
    """
    path = Path(path)
    if path.is_file():
        return {path.suffix.lower(): file_sha256(path)}
    return {f.name: file_sha256(f) for f in sorted(path.iterdir()) if f.name.endswith(READ) and f.is_file()}


def bundle_name(destination: Path) -> str:
    """The name that a bundle at `destination` has in its manifest."""
    return destination.name.removesuffix(".edgellama")


def read_build_record(bundle: Bundle) -> Mapping[str, Any] | None:
    """What build.json says, verified; None for a bundle that does not say it, or that cannot be believed."""
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


def stale_reasons(destination: Path, checkpoint: str | Path, request: ExportRequest) -> list[str] | None:
    """In what the bundle at `destination` is not what the request would make, in words. Empty: it is that bundle, and
    every file in it is as it was written. None: there is no bundle.

    What is cheap to compare is compared first; the checkpoint is read only when all else agrees.
    """
    if destination.is_symlink() or not is_bundle(destination):
        return None
    try:
        bundle = Bundle.open(destination)
    except BundleError:
        return ["a damaged manifest"]
    made = read_build_record(bundle)
    if made is None:
        return ["no record of what it was made from"]
    inputs, wanted = made["inputs"], request.to_dict()
    found = [f"other {name.replace('_', ' ')}" for name in wanted if inputs[name] != wanted[name]]
    if bundle.manifest["name"] != bundle_name(destination):
        found.append("other name")
    if found:
        return found
    try:
        if inputs["checkpoint"] != checkpoint_files(checkpoint):
            return ["other checkpoint"]
    except OSError:
        return ["other checkpoint"]
    return bundle.problems()[:3]


def _sha256(text: Text) -> str:
    return hashlib.sha256(text.content.encode("utf-8", "surrogatepass")).hexdigest()
