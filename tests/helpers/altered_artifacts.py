"""Copies of a sound bundle with one thing altered, and the checks that do not pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.checkpoints import Checkpoint
from edgellama.commands.validate import validate
from edgellama.formats.pte_program import PteProgram
from edgellama.gate.references import References
from edgellama.model.llama import Llama

Edit = Callable[[Path], None]  # alters the artifact at a path


def altered_copy(bundle: Bundle, directory: Path, target: str, edit: Edit) -> Bundle:
    """A copy of the bundle in `directory` with one altered artifact and a manifest with its hashes."""
    copy = directory / "altered.edgellama"
    shutil.copytree(bundle.path, copy)
    edit(Bundle.open(copy).artifact(target))
    return with_manifest(copy, {})


def with_manifest(path: Path, changes: Mapping[str, Any]) -> Bundle:
    """Writes the manifest of the bundle at `path` again, with sections replaced and with all hashes."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    del manifest["files"]
    return write_manifest(path, manifest | dict(changes))


def failures(bundle: Bundle, checkpoint: Checkpoint, target: str, quantized: Llama | None) -> dict[str, str]:
    """Name and detail of the checks that do not pass. The limit of KL is too high to matter."""
    references = References.of(checkpoint, quantized)
    report = validate(
        bundle, reference=checkpoint, target=target, tokens=256, max_kl=100.0, references=references
    )
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}


def edit_method(path: Path, edit: Callable[[dict[str, Any]], None], name: str = "forward") -> None:
    """Alters one method of the .pte at `path`, as JSON data in the names of ExecuTorch's schema."""
    program = PteProgram.read(path)
    edit(next(plan for plan in program.data["execution_plan"] if plan["name"] == name))
    rewrite(program)


def rewrite(program: PteProgram) -> None:
    """Writes an altered program in place of its file."""
    new = program.path.with_suffix(".new")
    program.write(new)
    new.replace(program.path)
