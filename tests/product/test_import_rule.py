"""The import rule: an arrow points down the list of rooms, never up, and two rooms of one floor stay apart where it says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from edgellama.export.lower import lowering_for
from edgellama.runtimes.load import opener_for
from edgellama.targets import TARGETS
from tests.helpers.paths import ROOT

# From the top down. A file may import its own room, a room of its own floor, and every floor below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("edgellama", "edgellama.__main__"),
    ("edgellama.cli",),
    ("edgellama.commands",),
    ("edgellama.gate", "edgellama.lm_eval", "edgellama.release"),
    ("edgellama.export", "edgellama.runtimes"),
    ("edgellama.bundle", "edgellama.checkpoints"),
    ("edgellama.targets", "edgellama.text"),
    ("edgellama.model", "edgellama.formats", "edgellama.report", "edgellama.host", "edgellama.emulator"),
    ("edgellama.recipe", "edgellama.files"),
    ("edgellama.errors", "edgellama._version", "edgellama.data", "edgellama.docs"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms of one floor that know nothing of each other.
APART = (("edgellama.export", "edgellama.runtimes"), ("edgellama.targets", "edgellama.text"))
# Targets are strangers: each is a folder of its own on three desks.
DESKS = ("edgellama.targets", "edgellama.export")
DYNAMIC = {"import_module", "__import__"}
FOLDERS = {target.name.removesuffix("-pte") for target in TARGETS.values()}
# Backends by the files that may import them.
BACKENDS = {
    "coremltools": (
        "edgellama/targets/coreml/",
        "export/coreml/",
        "runtimes/coreml",
        "edgellama/formats/coreml",
        "edgellama/formats/mlpackage",
    ),
    "executorch": (
        "edgellama/targets/executorch.py",
        "export/xnnpack/",
        "export/coreml/",
        "runtimes/xnnpack.py",
        "edgellama/host/executorch_libraries.py",
        "edgellama/formats/pte",
    ),
    "mlx": ("runtimes/mlx.py",),
    "mlx_lm": ("runtimes/mlx.py",),
    "onnx": ("export/onnx/", "edgellama/targets/onnx/", "edgellama/formats/onnx_"),
    "xllamacpp": ("runtimes/llama_cpp.py",),
    "onnxruntime": (
        "runtimes/onnx.py",
        "runtimes/emulated_worker.py",
        "edgellama/host/onnxruntime_library.py",
    ),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "edgellama" else ("edgellama", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    """Every file of the package, once: edgellama/export and edgellama/runtimes are links."""
    files = [f for folder in ("edgellama", "export", "runtimes") for f in (ROOT / folder).rglob("*.py")]
    links = (ROOT / "edgellama" / "export", ROOT / "edgellama" / "runtimes")
    return sorted(f for f in files if not any(f.is_relative_to(link) for link in links))


MODULES = {module_name(path): path for path in sources()}


def room_of(module: str) -> str:
    return next(r for r in sorted(FLOOR, key=len, reverse=True) if f"{module}.".startswith(f"{r}."))


def imports(path: Path, *, types: bool = True) -> set[str]:
    """Modules that a file imports, at its top or inside a function, and with `types` for its annotations."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not types:
        tree.body = [node for node in tree.body if not _is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return found


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


ARROWS = [(module, other) for module, path in MODULES.items() for other in imports(path)]


def violations(arrows: list[tuple[str, str]]) -> list[str]:
    found = []
    for module, other in arrows:
        if not other.startswith("edgellama") or module == "edgellama":
            continue
        here, there = room_of(module), room_of(other)
        if FLOOR[there] < FLOOR[here]:
            found.append(f"{module} -> {other}: {there} is above {here}")
        elif any(here in pair and there in pair and here != there for pair in APART):
            found.append(f"{module} -> {other}: {here} and {there} stay apart")
        elif here == there and here in DESKS:
            mine, theirs = (m.removeprefix(f"{here}.").split(".")[0] for m in (module, other))
            if {mine, theirs} <= FOLDERS and mine != theirs:
                found.append(f"{module} -> {other}: one target knows another")
    return found


def test_arrows_point_down() -> None:
    assert violations(ARROWS) == []


@pytest.mark.parametrize(
    "arrow",
    [
        ("edgellama.model.llama", "edgellama.export.plan"),
        ("edgellama.export.plan", "edgellama.runtimes.load"),
        ("edgellama.targets.onnx.limits", "edgellama.targets.coreml.limits"),
        ("edgellama.text.chat", "edgellama.targets.base"),
    ],
)
def test_an_arrow_that_points_up_is_found(arrow: tuple[str, str]) -> None:
    assert len(violations([arrow])) == 1


def test_no_circles() -> None:
    """Files in a circle cannot be read one after the other; a function's own imports count too."""
    graph = {m: imports(path, types=False) & MODULES.keys() - {m} for m, path in MODULES.items()}
    graph["edgellama"] = set()
    left = dict(graph)
    while left:
        ready = {module for module, others in left.items() if not others & left.keys()}
        assert ready, f"a circle among {sorted(left)}"
        left = {module: others for module, others in left.items() if module not in ready}


def test_imports_by_name_are_three() -> None:
    """An import by name is an arrow that the other tests cannot see: public names, verbs, and the callable package."""
    users = {
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        if DYNAMIC & set(map(_name, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert users == {"edgellama/__init__.py", "edgellama/cli/dispatch.py", "export/__init__.py"}


def _name(node: ast.AST) -> str | None:
    """Name that a node uses or imports, None for other nodes."""
    return next((str(getattr(node, key)) for key in ("id", "attr", "name") if hasattr(node, key)), None)


def test_backends_stay_in_their_files() -> None:
    wrong = [
        f"{MODULES[module].relative_to(ROOT)} imports {other}"
        for module, other in ARROWS
        for backend, places in BACKENDS.items()
        if other.split(".")[0] == backend and not str(MODULES[module].relative_to(ROOT)).startswith(places)
    ]
    assert wrong == []


def test_every_target_is_at_its_three_desks() -> None:
    """A row of the table alone would fail at the first export; each target is lowered and runs."""
    for target in TARGETS.values():
        assert callable(lowering_for(target)) and callable(opener_for(target))
        folder = target.name.removesuffix("-pte")
        for desk in (f"edgellama/targets/{folder}", f"export/{folder}", f"runtimes/{folder}.py"):
            assert (ROOT / desk).exists(), desk
