"""Provenance: facts about the model that an artifact records, if its format has room for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellama.files import to_json
from edgellama.recipe import TARGET_OPTIONS, Recipe

# Manifest sections that are known before lowering and that determine the artifact.
SECTIONS = ("source", "model", "chat", "recipe")
COMPUTED = ("calibration", "prefix_files")  # of a classifier, on its artifacts


@dataclass(frozen=True)
class Provenance:
    """Provenance of one artifact, without names, paths or facts about other targets.

    Artifacts with equal content therefore have equal bytes.

    Attributes:
        manifest_sha256: hash of the manifest sections `SECTIONS` as sorted JSON, with `recipe_data` as the
            recipe, and without `source.hub`. The complete manifest holds the hashes of the artifacts, so no artifact can hold its hash.
        options: see `Target`.
        swappable: names of the linears that an adapter may change at run time, sorted.
    """

    license: str | None
    parameters: int
    source_sha256: str
    manifest_sha256: str
    edgellama: str
    recipe: Recipe
    options: tuple[str, ...] = ()
    swappable: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Mapping[str, Any], options: tuple[str, ...]) -> Provenance:
        """Provenance of an artifact for a target with these options, read from a manifest that may be incomplete."""
        source, recipe = manifest["source"], Recipe.from_dict(manifest["recipe"])
        sections = {name: manifest[name] for name in SECTIONS}
        sections["recipe"] = recipe_for(recipe, options)
        if "classifier" in manifest:
            classifier = manifest["classifier"].items()
            sections["classifier"] = {key: value for key, value in classifier if key not in COMPUTED}
        # The same weights from the hub and from a directory give the same artifact.
        sections["source"] = {key: value for key, value in source.items() if key != "hub"}
        return cls(
            source["license"],
            source["parameters"],
            source["sha256"],
            hashlib.sha256(to_json(sections).encode()).hexdigest(),
            manifest["tools"]["edgellama"],
            recipe,
            options,
            tuple(sorted({name for entry in manifest.get("adapters", ()) for name in entry["modules"]})),
        )

    @property
    def recipe_data(self) -> dict[str, Any]:
        """The recipe as data, without the options of other targets."""
        return recipe_for(self.recipe, self.options)

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"Llama, {self.parameters:,} parameters, recipe {self.recipe.name}: {self.recipe.summary}"


def recipe_for(recipe: Recipe, options: tuple[str, ...]) -> dict[str, Any]:
    """The recipe as data. Of TARGET_OPTIONS, it keeps the names in `options`."""
    return {k: v for k, v in recipe.to_dict().items() if k not in TARGET_OPTIONS or k in options}
