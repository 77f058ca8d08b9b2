"""Identity: what an artifact says about the model in it, where its format has room for that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellama.recipe import Recipe
from edgellama.report import to_json

# The sections of a manifest that are known before anything is lowered, and that decide what is.
SECTIONS = ("source", "model", "chat", "recipe")


@dataclass(frozen=True)
class Identity:
    """The same for every artifact of a bundle; free of names and paths, so that equal content has equal bytes.

    manifest_sha256: hash of the manifest's sections `SECTIONS` as sorted JSON. The manifest as a whole holds the
    hashes of the artifacts, so no artifact can hold the hash of that.
    """

    license: str | None
    parameters: int
    source_sha256: str
    manifest_sha256: str
    edgellama: str
    recipe: Recipe

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Identity:
        """Read off a manifest, complete or not yet."""
        source = manifest["source"]
        sections = to_json({name: manifest[name] for name in SECTIONS})
        return cls(
            source["license"],
            source["parameters"],
            source["sha256"],
            hashlib.sha256(sections.encode()).hexdigest(),
            manifest["tools"]["edgellama"],
            Recipe.from_dict(manifest["recipe"]),
        )

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"Llama, {self.parameters:,} parameters, recipe {self.recipe.name}: {self.recipe.summary}"
