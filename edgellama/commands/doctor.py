"""Verb `doctor`: targets that this machine can export, run or only interpret.

It also checks versions, memory and disk, with a remedy for each problem, and says whether Arm can be emulated.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from edgellama.emulator.installed import find_emulator
from edgellama.errors import MissingDependencyError, UsageError
from edgellama.export.lower import lowering_for
from edgellama.host.memory import free_memory
from edgellama.host.proven_versions import differences
from edgellama.runtimes.load import opener_for
from edgellama.targets import TARGETS

SCHEMA = "edgellama.doctor/1"
PYTHON = ">=3.11,<3.14"
MACOS = 14  # oldest that executorch and mlx have wheels for
# Needs of an export with its gate of SmolLM2-135M, the smallest model in common use.
MEMORY_BYTES, DISK_BYTES = 4_000_000_000, 2_000_000_000
COLLECTIONS = ("all", "demo", "test")  # extras of other extras, and of developers
BACKEND = "XnnpackBackend"
OPERATORS = (
    "llama::custom_sdpa.out",
    "llama::update_cache.out",
    "quantized_decomposed::embedding_byte.dtype_out",
)


@dataclass(frozen=True)
class Problem:
    """A fault of this machine, with its remedy."""

    what: str
    remedy: str


def doctor() -> dict[str, Any]:
    """Examines this machine: JSON data (schema `edgellama.doctor/1`). `problems` is empty if it is fit."""
    packages, wrong = _packages()
    targets, unfit = _targets()
    problems = [*_python(), *_mac(), *wrong, *_executorch(), *unfit, *_room()]
    return {
        "schema": SCHEMA,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "free_memory_bytes": free_memory(),
            "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        },
        "packages": packages,
        "differences": [asdict(difference) for difference in differences()],
        "targets": targets,
        "emulator": _emulator(),
        "problems": [asdict(problem) for problem in problems],
    }


def _python() -> Iterator[Problem]:
    if not SpecifierSet(PYTHON).contains(platform.python_version(), prereleases=True):
        yield Problem(
            f"Python is {platform.python_version()}; edgellama was proven with {PYTHON}",
            "Make an environment with Python 3.11: python3.11 -m venv .venv",
        )


def _mac() -> Iterator[Problem]:
    """Problems of a Mac for which torch, executorch or mlx have no wheels."""
    if sys.platform != "darwin":
        return
    if platform.machine() != "arm64":
        yield Problem(
            "this Python is for Intel processors; torch, executorch and mlx have wheels for Apple silicon alone",
            "Use a Mac with Apple silicon, and a Python for arm64 rather than one under Rosetta.",
        )
    if int(platform.mac_ver()[0].partition(".")[0]) < MACOS:
        yield Problem(
            f"macOS is {platform.mac_ver()[0]}; executorch and mlx have wheels from macOS {MACOS} on",
            "Update macOS.",
        )


def _packages() -> tuple[list[dict[str, Any]], list[Problem]]:
    """A row for each package that edgellama or an extra requires, and the problems with them."""
    rows, problems = [], []
    for requirement in sorted(_requirements(), key=lambda r: r.name):
        extra = _extra(requirement)
        installed = _version(requirement.name)
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        rows.append(
            {
                "package": requirement.name,
                "needed": str(requirement.specifier) or "any",
                "installed": installed or "no",
                "extra": extra,
            }
        )
        if (installed is None and extra is None) or (installed is not None and not fits):
            problems.append(
                Problem(
                    f"{requirement.name} is {installed or 'not installed'}; needed is {requirement.specifier}",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
            )
    return rows, problems


def _requirements() -> list[Requirement]:
    """Requirements of edgellama and of its extras, without `all`, `demo` and `test`."""
    try:
        requirements = [Requirement(line) for line in requires("edgellama") or ()]
    except PackageNotFoundError:
        return []
    return [r for r in requirements if r.name != "edgellama" and _extra(r) not in COLLECTIONS]


def _extra(requirement: Requirement) -> str | None:
    """Name of the extra that requires a package; None if edgellama itself requires it."""
    if requirement.marker is None:
        return None
    names = metadata("edgellama").get_all("Provides-Extra") or []
    # An extra of its own before `all` and `test`, which repeat the others.
    ordered = sorted(names, key=lambda name: (name in COLLECTIONS, name))
    return next((name for name in ordered if requirement.marker.evaluate({"extra": name})), None)


def _version(package: str) -> str | None:
    """Installed version, or None. Without the local part, because torch's CPU build is the same release."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def _executorch() -> Iterator[Problem]:
    """Problems with the backend and the operators that edgellama's .pte files need."""
    remedy = "Install executorch again from its wheel; a build from source may have left them out."
    try:
        from edgellama.host import executorch_libraries

        runtime = executorch_libraries.runtime()
        backends = runtime.backend_registry.registered_backend_names
        operators = runtime.operator_registry.operator_names
    except (ImportError, OSError, RuntimeError) as error:
        yield Problem(f"executorch cannot be loaded ({error})", remedy)
        return
    if BACKEND not in backends:
        yield Problem(f"executorch has no {BACKEND}", remedy)
    missing = [name for name in OPERATORS if name not in operators]
    if missing:
        yield Problem(f"executorch lacks the operators {', '.join(missing)}", remedy)


def _targets() -> tuple[list[dict[str, Any]], list[Problem]]:
    """A row for each target: export and run on this machine, possible or not. Also the problems."""
    rows, problems = [], []
    for target in TARGETS.values():
        export, run = _error_of(partial(lowering_for, target)), _error_of(partial(opener_for, target))
        for error in (export, run):
            if isinstance(error, ImportError):
                problems.append(
                    Problem(f"target {target.name}: {error}", "Install edgellama and its dependencies again.")
                )
        interpreted = target.interpreted_off_macos and sys.platform != "darwin"
        rows.append(
            {
                "target": target.name,
                "export": "yes" if export is None else f"no: {_reason(export)}",
                "run": f"no: {_reason(run)}" if run else "interpreted only" if interpreted else "yes",
            }
        )
    return rows, problems


def _error_of(load: Callable[[], object]) -> Exception | None:
    """The error of an import that fails on this machine; None if it succeeds."""
    from edgellama.host.log_filters import coremltools_quiet

    try:
        with coremltools_quiet():
            load()
    except (MissingDependencyError, ImportError) as error:
        return error
    return None


def _reason(error: Exception) -> str:
    return error.remedy if isinstance(error, MissingDependencyError) else str(error)


def _emulator() -> dict[str, str]:
    """Row of the Arm emulator. Its absence is no problem, because nothing but `--emulate` needs it."""
    try:
        emulator = find_emulator()
    except (MissingDependencyError, UsageError) as error:
        return {"arm64": f"no: {error.message}. {error.remedy}"}
    return {"arm64": f"yes: {emulator.summary}, in {emulator.directory}"}


def _room() -> Iterator[Problem]:
    """Problems with free memory and disk space."""
    memory, disk = free_memory(), shutil.disk_usage(Path.cwd()).free
    if memory is not None and memory < MEMORY_BYTES:
        yield Problem(
            f"{memory / 1e9:.1f} GB of memory are free; even SmolLM2-135M takes {MEMORY_BYTES / 1e9:.0f} GB to export",
            "Close other programs, or use a larger machine.",
        )
    if disk < DISK_BYTES:
        yield Problem(
            f"{disk / 1e9:.1f} GB are free on the disk of {Path.cwd()}; an export wants {DISK_BYTES / 1e9:.0f} GB",
            "Free some space, or work on another disk.",
        )
