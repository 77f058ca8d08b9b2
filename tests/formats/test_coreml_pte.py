"""Core ML packages inside a .pte: unpacked unchanged, and never outside of their directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
import torch
from executorch.backends.apple.coreml import executorchcoreml
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.partition import CoreMLPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn

from edgellama.cli.dispatch import main
from edgellama.commands.inspect import inspect
from edgellama.errors import BundleError
from edgellama.formats.coreml_pte import BACKEND, extracted_package, extracted_packages, unpack
from edgellama.formats.mlpackage import read_mlpackage
from edgellama.formats.pte import delegate_data, read_pte
from edgellama.host.log_filters import coremltools_quiet, ignored_deprecations

Files = dict[str, bytes]


class Two(nn.Module):
    """Two linears with erf between them, which a partitioner can leave outside of its delegates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.erf(self.first(x)))
        return y


def lower(path: Path, **options: Any) -> Path:
    """Lowers `Two` with ExecuTorch's own backend. Each delegate holds its package inline."""
    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=ct.target.iOS18)
    partitioner = CoreMLPartitioner(compile_specs=specs, **options)
    with coremltools_quiet(), ignored_deprecations():
        program = torch.export.export(Two().eval(), (torch.zeros(1, 32),))
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
        path.write_bytes(edge.to_executorch().buffer)
    return path


@pytest.fixture(scope="module")
def single_package_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pte with a single Core ML package."""
    return lower(tmp_path_factory.mktemp("pte") / "whole.pte", lower_full_graph=True)


@pytest.fixture(scope="module")
def two_package_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pte with two Core ML packages and erf between them."""
    outside = ["aten.erf.default"]
    return lower(tmp_path_factory.mktemp("pte") / "parts.pte", skip_ops_for_coreml_delegation=outside)


def files(directory: Path) -> Files:
    """Content of every file below a directory, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_package_comes_out_as_it_went_in(single_package_pte: Path, tmp_path: Path) -> None:
    blobs, _ = delegate_data(single_package_pte, BACKEND)
    assert executorchcoreml.unflatten_directory_contents(blobs[0], str(tmp_path))
    (package,) = tmp_path.rglob("*.mlpackage")
    with extracted_package(single_package_pte) as extracted:
        assert files(extracted) == files(package)
        contents = read_mlpackage(extracted)
    assert not extracted.exists()
    assert contents.operators["linear"] == 2
    assert read_pte(single_package_pte).backends == {"CoreMLBackend": 1}


def test_several_packages_are_shown_and_not_run(two_package_pte: Path) -> None:
    with extracted_packages(two_package_pte) as packages:
        assert [read_mlpackage(p).operators["linear"] for p in packages] == [1, 1]
    with pytest.raises(BundleError, match="2 Core ML packages in it"), extracted_package(two_package_pte):
        pass
    data = inspect(two_package_pte)
    assert [row["backend"] for row in data["delegates"]] == ["CoreMLBackend"]
    assert data["delegates"][0]["calls"] == 2
    assert data["operators"] == [{"operator": "aten::erf.out", "calls": 1}]
    weights = [package["weight_bytes"] for package in data["coreml"]]
    assert data["weight_bytes"] == sum(weights) > 2 * 2 * 32 * 64


def test_inspect_shows_the_package_inside(
    single_package_pte: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(single_package_pte)]) == 0
    output = capsys.readouterr().out
    with extracted_package(single_package_pte) as package:
        unpacked = inspect(package)
    (inside,) = inspect(single_package_pte)["coreml"]
    assert {k: v for k, v in unpacked.items() if k not in ("schema", "path", "kind")} == inside
    assert "linear" in output and "CoreML8" in output and "float16" in output


Nodes = list[dict[str, Any]]


def blob(entries: Files, change: Callable[[Nodes], object] = lambda nodes: None) -> bytes:
    """Package of `entries` in ExecuTorch's format. `change` edits the table of files at its end."""
    nodes: Nodes = []
    data = b""
    for name, content in entries.items():
        region = {"offset": len(data), "size": len(content)}
        nodes.append({"children": {}, "dataRegion": region, "kind": 0, "name": name})
        data += content
    for name, children in (("model.mlpackage", list(entries)), ("root", ["model.mlpackage"])):
        places = {child: next(i for i, n in enumerate(nodes) if n["name"] == child) for child in children}
        nodes.append({"children": places, "dataRegion": {"offset": 0, "size": 0}, "kind": 1, "name": name})
    change(nodes)
    return data + json.dumps({"nodes": nodes}).encode()[::-1]


def test_blobs_of_these_tests_unpack_with_executorch_too(tmp_path: Path) -> None:
    entries = {"a": b"1", "b": b"", "c": b"222"}
    content = blob(entries)
    (tmp_path / "theirs").mkdir()
    assert executorchcoreml.unflatten_directory_contents(content, str(tmp_path / "theirs"))
    unpack(content, tmp_path / "ours")
    assert files(tmp_path / "ours") == {f"model.mlpackage/{name}": data for name, data in entries.items()}
    assert files(tmp_path / "theirs" / "root") == files(tmp_path / "ours")


@pytest.mark.parametrize("name", ["../../out", "/tmp/edgellama-out", "..", ".", "", "a/b", "a\\b", "a\0"])
def test_names_that_lead_outside_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a file is named"):
        unpack(blob({"a": b"1"}, lambda nodes: nodes[-2].update(children={name: 0})), tmp_path / "d")
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda nodes: nodes[0]["dataRegion"].update(size=10**9),
        lambda nodes: nodes[0]["dataRegion"].update(offset=-1),
        lambda nodes: nodes[0]["dataRegion"].update(size="1"),
        lambda nodes: nodes[-2].update(children={"a": 1}),
        lambda nodes: nodes[-2].update(children={"a": 99}),
        lambda nodes: nodes[-2].update(children=7),
        lambda nodes: nodes[-2].pop("kind"),
        lambda nodes: nodes.extend(
            {"children": {"x": i}, "kind": 1} for i in range(len(nodes) - 1, len(nodes) + 50)
        ),
        lambda nodes: nodes.clear(),
    ],
)
def test_damaged_tables_are_refused(change: Callable[[Nodes], object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        unpack(blob({"a": b"1"}, change), tmp_path / "d")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"model.mlmodel", b"../../../evil", "a file is named '../../../evil'"),
        (b"model.mlpackage", b"model.mlmodelc0", r"holds 0 packages .*model.mlmodelc0"),
        (b'"children"', b'"kinderen"', "its table of files is none"),
        (b'{"nodes"', b'["nodes"', "is damaged"),
    ],
)
def test_a_damaged_pte_gives_one_message(
    old: bytes,
    new: bytes,
    message: str,
    single_package_pte: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, length = single_package_pte.read_bytes(), min(len(old), len(new))
    old, new = old[:length][::-1], new[:length][::-1]
    assert old in content
    path = tmp_path / "model.pte"
    path.write_bytes(content.replace(old, new))
    with pytest.raises(BundleError, match=message) as caught, extracted_packages(path):
        pass
    assert caught.value.message.startswith(f"{path}: a Core ML delegate")
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("reference", [b"CMJR{}", b'CMJR{"key": "x"}', b'CMJR{"key": []}', b"CMJR["])
def test_a_missing_referenced_package_is_refused(
    reference: bytes, single_package_pte: Path, tmp_path: Path
) -> None:
    """A dangling reference, padded to the same length, replaces the package."""
    blobs, _ = delegate_data(single_package_pte, BACKEND)
    path = tmp_path / "model.pte"
    path.write_bytes(single_package_pte.read_bytes().replace(blobs[0], reference.ljust(len(blobs[0]))))
    with pytest.raises(BundleError, match="a package that is not in the file"), extracted_packages(path):
        pass
