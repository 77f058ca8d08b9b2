"""The reader of .mlpackage directories: what it reads, and what it refuses in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgellama.checkpoint import Checkpoint
from edgellama.coreml_pte_file import extracted_package
from edgellama.errors import BundleError
from edgellama.export.pipeline import quantized_llama
from edgellama.export.to_coreml import lower_to_coreml
from edgellama.inspect import inspect
from edgellama.mlpackage_file import read_mlpackage
from edgellama.progress import Progress
from edgellama.recipe import RECIPES
from tests.tiny_models import CONTEXT, Cut, identity

MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def package(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), RECIPES["int4-fast"], CONTEXT)
    path = tmp_path_factory.mktemp("package") / "model.mlpackage"
    lower_to_coreml(model, path, identity(RECIPES["int4-fast"]), progress=Progress())
    return path


def test_what_is_read(package: Path) -> None:
    read = read_mlpackage(package)
    (function,) = read.functions
    assert (read.specification, function.opset, read.minimum_os) == (
        9,
        "CoreML8",
        {"ios": "18", "macos": "15"},
    )
    assert [(x.name, x.dtype, x.shape) for x in function.inputs] == [
        ("inputIds", "int32", (1, (1, CONTEXT))),
        ("causalMask", "float16", (1, 1, (1, CONTEXT), (1, CONTEXT))),
    ]
    assert [(x.name, x.dtype, x.shape) for x in function.states] == [
        ("keyCache", "float16", (1, 1, 2, CONTEXT, 32)),
        ("valueCache", "float16", (1, 1, 2, CONTEXT, 32)),
    ]
    assert all(x.description for x in (*function.inputs, *function.states))
    weight = function.weights["model_layers_0_mlp_down_proj_weight"]
    assert (weight.scheme, weight.bits, weight.group_size, weight.shape) == ("int4 g32", 4, 32, (128, 352))
    assert weight.nbytes == 128 * 352 // 2 + 2 * 128 * 11
    codes = weight.parts["data"].array()
    assert codes.dtype == np.int8 and (int(codes.min()), int(codes.max())) == (-8, 7)
    assert read.bytes == sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
    assert read.weight_bytes == (package / WEIGHTS).stat().st_size
    assert read.operators["scaled_dot_product_attention"] == 1


def test_inspect_shows_it(package: Path) -> None:
    data = inspect(package)
    assert data["kind"] == "mlpackage"
    assert data["minimum_os"] == {"ios": "18", "macos": "15"}
    assert [f["function"] for f in data["functions"]] == ["main"]
    assert data["functions"][0]["inputs"].startswith(f"inputIds int32 [1, 1..{CONTEXT}], causalMask float16")
    schemes = {row["scheme"]: row for row in data["weights"]}
    assert set(schemes) == {"int4 g32", "int8 channel", "float16"}
    assert schemes["int8 channel"]["bytes"] == 512 * 128 + 2 * 512
    assert sum(row["share"] for row in data["weights"]) == pytest.approx(1)
    assert {"operator": "linear", "calls": 8} in data["operators"]
    assert json.loads(data["user_defined"]["edgellama.recipe"])["name"] == "int4-fast"


Damage = Callable[[Path], object]
DAMAGES: dict[str, Damage] = {
    "no manifest": lambda p: (p / "Manifest.json").unlink(),
    "manifest is no JSON": lambda p: (p / "Manifest.json").write_text("{"),
    "manifest is a list": lambda p: (p / "Manifest.json").write_text("[]"),
    "manifest without a root": lambda p: (p / "Manifest.json").write_text('{"itemInfoEntries": {}}'),
    "manifest leads outside": lambda p: (p / "Manifest.json").write_text(
        (p / "Manifest.json").read_text().replace("com.apple.CoreML/model", "../../../com.apple.CoreML/model")
    ),
    "no model": lambda p: (p / MODEL).unlink(),
    "model is garbage": lambda p: (p / MODEL).write_bytes(b"\xff" * 1000),
    "model is empty": lambda p: (p / MODEL).write_bytes(b""),
    "model is cut off": lambda p: (p / MODEL).write_bytes((p / MODEL).read_bytes()[:-500]),
    "a link": lambda p: (p / "link").symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_packages_are_refused(name: str, package: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    shutil.copytree(package, path)
    DAMAGES[name](path)
    with pytest.raises(BundleError) as caught:
        read_mlpackage(path)
    assert caught.value.message.startswith(str(path)) and caught.value.remedy


def test_weights_that_are_cut_off_are_refused_when_read(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    shutil.copytree(package, path)
    stored = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(stored[: len(stored) // 2])
    weights = read_mlpackage(path).functions[0].weights
    with pytest.raises(BundleError, match=r"weight\.bin is damaged"):
        for weight in weights.values():
            for part in weight.parts.values():
                part.array()


def test_mutated_models_are_refused_or_read(package: Path, tmp_path: Path) -> None:
    """No crash, no traceback: a changed byte leaves a package that reads, or a sentence."""
    path = tmp_path / "model.mlpackage"
    shutil.copytree(package, path)
    stored = (path / MODEL).read_bytes()
    random, refused = np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(stored)
        for at in random.integers(0, len(stored), 4):
            changed[at] = random.integers(0, 256)
        (path / MODEL).write_bytes(changed)
        try:
            for function in read_mlpackage(path).functions:
                assert function.weights is not None
        except BundleError:
            refused += 1
    assert 0 < refused < 150


def test_a_pte_without_core_ml_holds_no_package(cut: Callable[[int, str], Cut]) -> None:
    with pytest.raises(BundleError, match="0 Core ML packages"), extracted_package(cut(1, "int4-fast").path):
        pass


def test_reading_takes_no_memory_for_weights(package: Path) -> None:
    read = read_mlpackage(package)
    assert all(part.data is None for w in read.functions[0].weights.values() for part in w.parts.values())
    assert torch.from_numpy(read.functions[0].weights["cos"].parts["val"].array()).shape == (CONTEXT, 16)
