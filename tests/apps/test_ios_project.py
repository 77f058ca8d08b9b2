"""Tests of the Xcode project, its property lists and its build step."""

from __future__ import annotations

import os
import plistlib
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from openstep_parser import OpenStepDecoder

from edgellama._version import __version__
from edgellama.bundle import Bundle
from edgellama.cli.dispatch import build_parser
from edgellama.host.executorch_versions import PROVEN
from edgellama.recipe import RECIPES
from edgellama.targets import TARGETS
from tests.helpers.swift_sources import DEMO, constants
from tests.helpers.xcode_build_step import TRUST, XcodeBuildStep, xcode_defaults

Objects = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    text = (DEMO / "EdgeLlama.xcodeproj/project.pbxproj").read_text(encoding="utf-8")
    parsed: dict[str, Any] = OpenStepDecoder.ParseFromString(text)
    return parsed


@pytest.fixture(scope="module")
def objects(project: dict[str, Any]) -> Objects:
    objects_by_id: Objects = project["objects"]
    return objects_by_id


def of(objects: Objects, isa: str) -> list[dict[str, Any]]:
    return [value for value in objects.values() if value["isa"] == isa]


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {name for part in value.values() for name in references(part)}
    if isinstance(value, list):
        return {name for part in value for name in references(part)}
    return {value} if re.fullmatch(r"[0-9A-F]{24}", str(value)) else set()


def settings(objects: Objects) -> list[dict[str, Any]]:
    return [c["buildSettings"] for c in of(objects, "XCBuildConfiguration")]


def test_every_object_exists_and_is_used(project: dict[str, Any], objects: Objects) -> None:
    used = references(list(objects.values())) | {project["rootObject"]}
    assert used == set(objects)
    assert project["objectVersion"] == "77"
    assert objects[project["rootObject"]]["isa"] == "PBXProject"
    text = (DEMO / "EdgeLlama.xcodeproj/project.pbxproj").read_text(encoding="utf-8")
    assert len(re.findall(r"^\t\t[0-9A-F]{24}.* = \{", text, re.MULTILINE)) == len(objects), "an id twice"


def test_every_file_exists(objects: Objects) -> None:
    paths = []
    for group in (*of(objects, "PBXGroup"), *of(objects, "PBXFileSystemSynchronizedRootGroup")):
        base = DEMO / group.get("path", "")
        assert base.is_dir(), base
        for child in group.get("children", []):
            entry = objects[child]
            if entry["isa"] == "PBXFileReference" and entry["sourceTree"] == "<group>":
                paths.append(base / entry["path"])
    assert {p.name for p in paths} == {
        p.name for p in (DEMO / "Config").iterdir() if p.name != "Local.xcconfig"
    }
    for path in paths:
        assert path.is_file(), path
    for configuration in settings(objects):
        for key in ("INFOPLIST_FILE", "CODE_SIGN_ENTITLEMENTS"):
            assert key not in configuration or (DEMO / configuration[key]).is_file()
    (package,) = of(objects, "XCLocalSwiftPackageReference")
    assert (DEMO / package["relativePath"] / "Package.swift").is_file()
    (phase,) = of(objects, "PBXShellScriptBuildPhase")
    for path in (*phase["inputFileListPaths"], *phase["outputFileListPaths"]):
        assert (DEMO / path.removeprefix("$(SRCROOT)/")).is_file(), path


def test_every_source_of_the_app_is_in_its_group(objects: Objects) -> None:
    (group,) = of(objects, "PBXFileSystemSynchronizedRootGroup")
    sources = {p for p in DEMO.rglob("*.swift") if "EdgeLlamaCore" not in p.relative_to(DEMO).parts}
    assert sources and all((DEMO / group["path"]) in p.parents for p in sources)
    assert len([p for p in sources if "@main" in p.read_text(encoding="utf-8")]) == 1


def test_versions_match_the_package(objects: Objects) -> None:
    (remote,) = of(objects, "XCRemoteSwiftPackageReference")
    assert remote["repositoryURL"] == "https://github.com/pytorch/executorch.git"
    assert remote["requirement"] == {"kind": "branch", "branch": f"swiftpm-{PROVEN[-1]}"}
    assert constants(DEMO / "App/Runtimes/ExecuTorchErrors.swift")["version"] == PROVEN[-1]
    configurations = settings(objects)
    assert {s["MARKETING_VERSION"] for s in configurations if "MARKETING_VERSION" in s} == {__version__}
    package = (DEMO / "EdgeLlamaCore/Package.swift").read_text(encoding="utf-8")
    (system,) = {s["IPHONEOS_DEPLOYMENT_TARGET"] for s in configurations if "IPHONEOS_DEPLOYMENT_TARGET" in s}
    assert f'.iOS("{system}")' in package and system == "18.0"
    assert package.startswith("// swift-tools-version: 5.9\n")
    assert ".package(" not in package, "the core depends on nothing"
    assert {s["SWIFT_STRICT_CONCURRENCY"] for s in configurations if "SWIFT_VERSION" in s} == {"complete"}


def test_the_project_links_the_kernels_of_the_artifacts(objects: Objects, tiny_bundle: Bundle) -> None:
    products = {p["productName"] for p in of(objects, "XCSwiftPackageProductDependency")}
    (target,) = of(objects, "PBXNativeTarget")
    (phase,) = of(objects, "PBXFrameworksBuildPhase")
    linked = {objects[objects[f]["productRef"]]["productName"] for f in phase["files"]}
    assert products == linked == {objects[p]["productName"] for p in target["packageProductDependencies"]}
    kernels = {
        "llama": "kernels_llm",
        "quantized_decomposed": "kernels_quantized",
        "torchao": "kernels_torchao",
    }
    (artifact,) = tiny_bundle.manifest["artifacts"]
    spaces = {name.partition("::")[0] for name in artifact["requires"]["operators"] if "::" in name}
    assert spaces, artifact["requires"]["operators"]
    needed = {kernels.get(space, "kernels_optimized") for space in spaces}
    assert needed | {"executorch", "backend_xnnpack", "backend_coreml", "EdgeLlamaCore"} <= products
    # Kernels and backends register themselves when they load. Without this flag the linker drops them.
    assert all("-all_load" in s["OTHER_LDFLAGS"] for s in settings(objects) if "OTHER_LDFLAGS" in s)


def test_property_lists() -> None:
    info = plistlib.loads((DEMO / "Config/Info.plist").read_bytes())
    assert info["UIFileSharingEnabled"] and info["LSSupportsOpeningDocumentsInPlace"]
    assert info["CFBundleShortVersionString"] == "$(MARKETING_VERSION)"
    assert "UILaunchScreen" in info
    assert not {key for key in info if "UsageDescription" in key or key == "NSAppTransportSecurity"}
    entitlements = plistlib.loads((DEMO / "Config/EdgeLlama.entitlements").read_bytes())
    assert entitlements == {"com.apple.developer.kernel.increased-memory-limit": True}


def test_the_scheme_runs_the_optimized_build(objects: Objects) -> None:
    path = DEMO / "EdgeLlama.xcodeproj/xcshareddata/xcschemes/EdgeLlama.xcscheme"
    scheme = ElementTree.parse(path).getroot()
    for reference in scheme.iter("BuildableReference"):
        assert objects[reference.attrib["BlueprintIdentifier"]]["name"] == "EdgeLlama"
    launch = scheme.find("LaunchAction")
    assert launch is not None and launch.attrib["buildConfiguration"] == "Release"


def test_the_build_step_declares_its_inputs_and_outputs() -> None:
    script = (DEMO / "Config/export-model.sh").read_text(encoding="utf-8")
    read = (DEMO / "Config/model-inputs.xcfilelist").read_text().split()
    (written,) = (DEMO / "Config/model-outputs.xcfilelist").read_text().split()
    assert "$(EDGELLAMA_CHECKPOINT)" in read and "$(SRCROOT)/Config/export-model.sh" in read
    assert written == "$(TARGET_BUILD_DIR)/$(UNLOCALIZED_RESOURCES_FOLDER_PATH)/model.edgellama/manifest.json"
    assert "$TARGET_BUILD_DIR/$UNLOCALIZED_RESOURCES_FOLDER_PATH/model.edgellama" in script
    assert set(re.findall(r"\$(EDGELLAMA\w*)", script)) == set(xcode_defaults()) - TRUST
    assert xcode_defaults()["EDGELLAMA_RECIPE"] in RECIPES
    assert set(xcode_defaults()["EDGELLAMA_TARGETS"].split()) <= set(TARGETS)


@pytest.mark.skipif(os.name == "nt", reason="a shell script for macOS")
def test_the_build_step_calls_export(tmp_path: Path) -> None:
    step = XcodeBuildStep(tmp_path)
    (step.model / "my model.gguf").touch()
    done = step.run()
    assert done.returncode == 0, done.stdout + done.stderr
    called = build_parser().parse_args(step.arguments.read_text().splitlines())
    assert called.checkpoint == str(step.model / "my model.gguf")
    assert called.output == tmp_path / "built products/EdgeLlama.app/model.edgellama"
    assert called.target == xcode_defaults()["EDGELLAMA_TARGETS"].split()
    assert (called.recipe, str(called.context)) == (
        xcode_defaults()["EDGELLAMA_RECIPE"],
        xcode_defaults()["EDGELLAMA_CONTEXT"],
    )
    assert called.force and not called.no_validate
    (step.model / "my model.gguf").unlink()
    (step.model / "config.json").touch()
    assert step.run().returncode == 0
    assert step.arguments.read_text().splitlines()[1] == str(step.model)


@pytest.mark.skipif(os.name == "nt", reason="a shell script for macOS")
def test_the_build_step_reports_errors(tmp_path: Path) -> None:
    step = XcodeBuildStep(tmp_path, exit_code=3)
    without_checkpoint = step.run()
    assert without_checkpoint.returncode == 0
    assert without_checkpoint.stdout.startswith("note: no checkpoint")
    assert not step.arguments.exists()
    (step.model / "a.gguf").touch()
    failed = step.run()
    assert failed.returncode == 3 and "error: edgellama export ended with exit code 3" in failed.stdout
    (step.model / "b.gguf").touch()
    two_checkpoints = step.run()
    assert "error: " in two_checkpoints.stdout and two_checkpoints.returncode == 2
    (step.model / "b.gguf").unlink()
    step.environment["EDGELLAMA"] = "no-such-command"
    missing = step.run()
    assert missing.returncode == 2 and "no-such-command is not found" in missing.stdout
