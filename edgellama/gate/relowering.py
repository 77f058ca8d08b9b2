"""Relowering: the quantized model is lowered again, and the file must be what comes out.

Lowering is deterministic. With the tools that made the bundle, the result is equal byte for byte. With other
versions of them, the instructions and values are compared instead of the bytes.

This covers what no arithmetic of the gate can see under the noise of a deep model. Examples are an attention
with a scale 1 % off, two norms exchanged, a second method and nodes that nothing reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgellama._version import __version__
from edgellama.bundle import Bundle
from edgellama.errors import BundleError, LoweringError
from edgellama.export.lower import lowering_for
from edgellama.files import is_left_by_a_file_manager
from edgellama.formats.listing import first_difference
from edgellama.gate.subject import Section
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.report import Check, check
from edgellama.targets import Target
from edgellama.targets.base import tool_versions

NAME = "structure.relowered"
_PIECE = 1 << 20  # bytes that are compared at once


def examine_relowering(bundle: Bundle, target: Target, quantized: Llama, progress: Progress) -> Section:
    """The check `structure.relowered` of one artifact. It takes as long as the export's own lowering."""
    with progress.stage("lower again"), tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / Path(target.artifact).name
        provenance = target.provenance(bundle.manifest)
        try:
            lowering_for(target, bundle.tokenizer)(quantized, path, provenance, progress=Progress())
            return Section((_compared(bundle, target, quantized, path),))
        except (BundleError, LoweringError) as error:
            return Section((check(NAME, False, detail=error.message),))


def other_tools(bundle: Bundle, target: Target) -> list[str]:
    """Tools that made the bundle in another version than the installed one, such as `torch 2.12.0`."""
    recorded = bundle.manifest["tools"]
    installed = tool_versions([target]) | {"edgellama": __version__}
    return [
        f"{name} {recorded.get(name, 'unknown')}"
        for name, version in sorted(installed.items())
        if recorded.get(name) != version
    ]


def _compared(bundle: Bundle, target: Target, quantized: Llama, lowered: Path) -> Check:
    artifact = bundle.artifact(target.name)
    tools = other_tools(bundle, target)
    unequal = list(_unequal_files(artifact, lowered))
    if not unequal:
        return check(NAME, True, value=0, limit=0, detail="equal byte for byte")
    difference = first_difference(target.listing(artifact, quantized), target.listing(lowered, quantized))
    if tools and difference is None:
        detail = f"equal instructions; the bytes were not compared, because {', '.join(tools)} made the file"
        return check(NAME, True, value=0, limit=0, detail=detail)
    made = f", lowered by {', '.join(tools)}" if tools else ""
    detail = f"{difference or 'equal instructions, other bytes'}{made} (in {', '.join(unequal[:3])})"
    return check(NAME, False, value=len(unequal), limit=0, detail=detail)


def _unequal_files(artifact: Path, lowered: Path) -> Iterator[str]:
    """Names of files that differ or that one side lacks.

    A directory that is no package may hold more files: those of clients, which the export adds.
    """
    if lowered.is_file():
        if not _equal(artifact, lowered):
            yield artifact.name
        return
    own = {f.relative_to(lowered) for f in lowered.rglob("*") if f.is_file()}
    files = (f for f in artifact.rglob("*") if f.is_file() and not is_left_by_a_file_manager(f))
    theirs = {f.relative_to(artifact) for f in files}
    package = artifact.suffix == ".mlpackage"
    for file in sorted(own | theirs if package else own):
        if file not in own or file not in theirs or not _equal(artifact / file, lowered / file):
            yield str(file)


def _equal(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as a, other.open("rb") as b:
        return all(x == b.read(_PIECE) for x in iter(lambda: a.read(_PIECE), b""))
