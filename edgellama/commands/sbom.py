"""Verb `sbom`: the bill of materials of a bundle."""

from __future__ import annotations

from pathlib import Path

from edgellama.bundle import Bundle
from edgellama.errors import BundleError
from edgellama.release.sbom import bill_of_materials


def sbom(path: str | Path) -> str:
    """Bill of materials of the bundle at `path`, CycloneDX 1.6 as JSON text.

    Raises BundleError if a file of the bundle is missing or altered, because the bill has its hash.
    """
    bundle = Bundle.open(path)
    if problems := bundle.problems():
        raise BundleError(
            f"{bundle.path}: {'; '.join(problems[:3])}", remedy="Export the bundle again, or copy it again."
        )
    return bill_of_materials(bundle)
