"""The targets: one row each. A new target is a row here and the files that the row names."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgellama.errors import MissingDependencyError, UsageError, did_you_mean


@dataclass(frozen=True)
class Target:
    """Where an artifact will run. `artifact` is its path in a bundle; the others are `module:name`.

    lower(model, path, progress) writes the artifact. runtime(path) runs it. structure(path, model) answers the
    gate's exact questions about the file. describe(path, model) fills the manifest's artifact entry.
    numerics(model) is a block in which the quantized torch model computes as the target does.
    """

    name: str
    summary: str
    artifact: str
    lower: str
    runtime: str
    structure: str
    describe: str
    numerics: str
    extra: str | None = None

    def load(self, role: str) -> Any:
        """The function or class that plays `role` (`lower`, `runtime`, `structure`, `describe`)."""
        module, _, name = getattr(self, role).partition(":")
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if self.extra is None or (error.name or "").startswith("edgellama"):
                raise
            raise MissingDependencyError(
                f"target {self.name!r} needs the package {error.name!r}, which is not installed",
                remedy=f"pip install 'edgellama[{self.extra}]'",
            ) from error

    def artifact_in(self, bundle: Path) -> Path:
        return bundle / self.artifact


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "xnnpack",
            "ExecuTorch .pte for the CPU of Android and iOS devices, and Linux",
            "xnnpack/model.pte",
            lower="edgellama.export.to_xnnpack:lower_to_xnnpack",
            runtime="edgellama.runtimes.pte:PteRuntime",
            structure="edgellama.structure_xnnpack:check_structure",
            describe="edgellama.xnnpack_artifact:describe_artifact",
            numerics="edgellama.xnnpack_numerics:xnnpack_numerics",
        ),
    )
}


def find_target(name: str) -> Target:
    """The target of that name. Raises UsageError with the list, and the closest name."""
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(name, TARGETS)
    raise UsageError(f"unknown target {name!r}", remedy=f"{hint}Targets: {', '.join(sorted(TARGETS))}.")
