"""Tests of `sbom`: valid CycloneDX that names everything a bundle is made of, and the same bytes every time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.cli.dispatch import main
from edgellama.commands.sbom import sbom
from edgellama.errors import BundleError
from tests.helpers.paths import VECTORS

HASH = "ab" * 32
ADAPTER = {"layout": "peft", "sha256": HASH, "parameters": 9}


def checked(text: str) -> dict[str, Any]:
    """The bill as data, proven valid."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert error is None, error
    data: dict[str, Any] = json.loads(text)
    return data


def changed(folder: Path, **changes: Any) -> Path:
    path = Path(shutil.copytree(VECTORS / "bundle", folder / "copy.edgellama"))
    manifest = Bundle.open(path).manifest
    kept = {k: v for k, v in manifest.items() if k not in ("schema", "files")}
    source = changes.pop("source", {})
    write_manifest(path, kept | changes | {"source": manifest["source"] | source})
    return path


def test_it_is_valid_and_the_same_every_time(tiny_bundle: Bundle) -> None:
    text = sbom(tiny_bundle.path)
    assert sbom(tiny_bundle.path) == text
    data = checked(text)
    assert "timestamp" not in data["metadata"] and str(tiny_bundle.path) not in text
    card = data["metadata"]["component"]["modelCard"]
    row = tiny_bundle.manifest["accuracy"]["xnnpack"]
    metric = card["quantitativeAnalysis"]["performanceMetrics"][0]
    assert (metric["value"], metric["slice"]) == (str(row["kl_mean"]), "xnnpack")
    assert metric["confidenceInterval"]["lowerBound"] == str(row["kl_mean_ci95"][0])
    hashes = {c["name"]: c["hashes"][0]["content"] for c in data["components"] if c["type"] == "file"}
    assert hashes == {name: entry["sha256"] for name, entry in tiny_bundle.manifest["files"].items()}
    tools = {c["name"]: c["version"] for c in data["metadata"]["tools"]["components"]}
    assert tools == tiny_bundle.manifest["tools"]


def test_source_adapters_datasets_and_licences_are_named(tmp_path: Path) -> None:
    swappable = {"base_sha256": HASH, "rank": 2, "modules": ["q"], "files": {}, "name": "style"}
    report = {
        "schema": "edgellama.export/1",
        "notes": [],
        "tensors": [],
        "calibration": {"tokens": 7, "windows": 1, "sha256": HASH, "texts": [{"name": "ours"}]},
    }
    hub = {"repository": "owner/model", "revision": "0123456789ab"}
    source = {
        "license": "apache-2.0",
        "hub": hub,
        "adapters": [ADAPTER | {"weight": 0.5}],
        "base_sha256": HASH,
    }
    path = changed(tmp_path, source=source, adapters=[ADAPTER | swappable])
    (path / "reports").mkdir()
    (path / "reports/export.json").write_text(json.dumps(report))
    manifest = Bundle.open(path).manifest
    write_manifest(path, {k: v for k, v in manifest.items() if k not in ("schema", "files")})
    data = checked(sbom(path))
    components = {c["bom-ref"]: c for c in data["components"]}
    assert components["source"]["name"] == "owner/model"
    assert components["source"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert components["source"]["externalReferences"][0]["url"].endswith("/owner/model/tree/0123456789ab")
    assert components["merged/1"]["name"] == "merged adapter 1"
    assert components["adapter/style"]["hashes"][0]["content"] == HASH
    assert components["dataset/calibration"]["name"] == "calibration: ours"
    card = data["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["datasets"] == [{"ref": "dataset/calibration"}]
    (depends,) = [d["dependsOn"] for d in data["dependencies"] if d["ref"] == "model"]
    assert set(depends) == components.keys()


@pytest.mark.parametrize("name", ["llama3.2", "Our own terms", "MIT OR Apache-2.0", "", None])
def test_every_licence_gives_a_valid_bill(name: str | None, tmp_path: Path) -> None:
    data = checked(sbom(changed(tmp_path, source={"license": name})))
    assert ("licenses" in data["metadata"]["component"]) == bool(name)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = changed(tmp_path), tmp_path / "sbom.json"
    assert main(["sbom", str(path)]) == 0
    assert main(["sbom", str(path), "-o", str(file)]) == 0
    assert capsys.readouterr().out == file.read_text()
    (path / "xnnpack/model.pte").write_bytes(b"x")
    assert main(["sbom", str(path)]) == 2
    with pytest.raises(BundleError, match="has 1 bytes"):
        sbom(path)
