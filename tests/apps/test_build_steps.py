"""Tests of the contract of the three build steps: the table in docs/pipelines.md.

The scripts of the Action and of the Xcode phase run here. The Gradle task is only read.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from edgellama.bundle import Bundle
from edgellama.cli.dispatch import build_parser
from edgellama.recipe import RECIPES
from edgellama.targets import TARGETS
from tests.helpers.paths import ROOT, TINY
from tests.helpers.xcode_build_step import TRUST, XcodeBuildStep, xcode_defaults

ACTION = ROOT / ".github/actions/export"
PIPELINES = (ROOT / "edgellama/docs/pipelines.md").read_text(encoding="utf-8")
GRADLE = (ROOT / "android_demo/build.gradle.kts").read_text(encoding="utf-8")
REPORTS = ("--html", "--markdown", "--junit")


def contract() -> list[list[tuple[str, str]]]:
    """Rows of the table: (name, default) for the Action, Gradle and Xcode, and the option."""
    table = PIPELINES[PIPELINES.index("| setting | Action input |") :].split("\n\n", 1)[0]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines()[2:]]

    def cell(text: str) -> tuple[str, str]:
        name, *default = re.findall(r"`([^`]+)`", text) or [text]
        return name, (default or [""])[0]

    return [[cell(text) for text in row[1:]] for row in rows]


def action() -> dict[str, Any]:
    """Content of action.yml."""
    data: dict[str, Any] = yaml.safe_load((ACTION / "action.yml").read_text(encoding="utf-8"))
    return data


def test_the_names_are_three_spellings_of_one_name() -> None:
    rows = contract()
    assert len(rows) == 6
    for (inputs, _), (gradle, _), (xcode, _), (option, _) in rows:
        assert gradle == re.sub(r"-(.)", lambda m: m[1].upper(), inputs)
        assert xcode == f"EDGELLAMA_{inputs.upper().replace('-', '_')}"
        assert option in ("CHECKPOINT", f"--{inputs}", f"--{inputs.removesuffix('s')}")


def test_every_option_of_the_contract_is_an_option_of_export() -> None:
    words = ["export", "model", "--output", "out"]
    for *_, (option, _) in contract()[1:]:
        words += [option, "1"]
    args = build_parser().parse_args([*words, *(w for name in REPORTS for w in (name, "file"))])
    settings = (args.target, args.recipe, args.context, args.max_kl, args.max_bytes)
    assert settings == (["1"], "1", 1, 1.0, 1)


def test_the_defaults_match_the_table() -> None:
    inputs, settings = action()["inputs"], xcode_defaults()
    for (name, default), (gradle, gradle_default), (xcode, xcode_default), _ in contract():
        assert inputs[name].get("default", "") == default, name
        assert inputs[name].get("required", False) == (name == "checkpoint")
        declared = re.search(rf'gradleProperty\("{gradle}"\)(?:\.orElse\("(.*?)"\))?', GRADLE)
        assert declared is not None and (declared[1] or "") == gradle_default, gradle
        if name != "checkpoint":
            assert settings[xcode] == xcode_default, xcode
        if name == "recipe":
            assert {default, gradle_default, xcode_default} <= RECIPES.keys()
        if name == "targets":
            assert {t for d in (default, gradle_default, xcode_default) for t in d.split()} <= TARGETS.keys()
    assert set(settings) == {"EDGELLAMA", *TRUST, *(xcode for _, _, (xcode, _), _ in contract())}
    assert re.search(r'gradleProperty\("edgellama"\)\.orElse\("edgellama"\)', GRADLE)


def test_gradle_passes_every_setting_and_every_report() -> None:
    """The task is read, not run, because Gradle is not available."""
    task = GRADLE[GRADLE.index('register<Exec>("exportModel")') : GRADLE.index("// gradle pushBundle")]
    assert set(re.findall(r'"(--[\w-]+)"', task)) - {"--version"} == {
        *(option for *_, (option, _) in contract()[1:]),
        *("--output", "--force", *REPORTS),
    }
    for _, (name, _), _, (option, _) in contract():
        assert re.search(rf"\b{name}\.(get|map|getOrElse)\b", task), name
        if option.startswith("--max"):
            assert f'"{option}" to {name}.get()' in task
    assert (
        "outputs.dir(bundle)" in task and "outputs.dir(reports)" in task and "isIgnoreExitValue" not in GRADLE
    )
    properties = set(re.findall(r'gradleProperty\("(\w+)"\)', GRADLE))
    assert properties == {"edgellama", "bundle", "adb", *(name for _, (name, _), _, _ in contract())}


FAKE = """#!/bin/sh
printf '%s\\n' "$@" >> "$ARGUMENTS"; echo -- >> "$ARGUMENTS"
[ "$1" = export ] && exit {export}
exit {validate}
"""


class Job:
    """Environment of a job on GitHub: files for outputs and summary, a workspace, inputs with their defaults."""

    def __init__(self, directory: Path, **inputs: str) -> None:
        self.directory, self.inputs = directory, inputs
        self.output, self.summary = directory / "output", directory / "summary"
        self.arguments = directory / "arguments"
        (directory / "bin").mkdir()
        (directory / "temp").mkdir()
        self.output.touch()
        self.command("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')

    def command(self, name: str, content: str) -> None:
        """Puts an executable script on the PATH of the job."""
        path = self.directory / "bin" / name
        path.write_text(content)
        path.chmod(0o755)

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """Runs the step of that name with bash, as the step declares."""
        (step,) = [step for step in action()["runs"]["steps"] if step.get("name") == name]
        assert step["shell"] == "bash"
        environment = {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "GITHUB_ACTION_PATH": str(ACTION),
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "RUNNER_TEMP": str(self.directory / "temp"),
            "ARGUMENTS": str(self.arguments),
            **{n: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", self._input, v) for n, v in step["env"].items()},
        }
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
        return subprocess.run(
            command, cwd=self.directory, env=environment, check=False, capture_output=True, text=True
        )

    def _input(self, expression: re.Match[str]) -> str:
        name = expression[1]
        return self.inputs.get(name) or str(action()["inputs"][name].get("default", ""))

    @property
    def outputs(self) -> dict[str, str]:
        """Outputs of the step by name."""
        return dict(line.split("=", 1) for line in self.output.read_text().splitlines())

    @property
    def called(self) -> list[list[str]]:
        """Arguments of each call of the command."""
        return [call.splitlines() for call in self.arguments.read_text().split("--\n")[:-1]]


SETTINGS = {
    "checkpoint": "a model; $(touch hacked)",
    "targets": "xnnpack onnx",
    "recipe": "int8",
    "context": "256",
    "max-kl": "0.25",
    "max-bytes": "120MB",
}


def parsed(call: list[str]) -> dict[str, Any]:
    """Settings of the contract in a call of export by any of the steps."""
    args = vars(build_parser().parse_args(call))
    assert args["verb"] == "export" and args["force"] and not args["no_validate"]
    assert {args[name[2:]].suffix for name in REPORTS} == {".html", ".md", ".xml"}
    return {key: args[key] for key in ("checkpoint", "target", "recipe", "context", "max_kl", "max_bytes")}


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_the_action_and_xcode_make_the_same_call(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    job = Job(tmp_path / "job", **SETTINGS)
    job.command("edgellama", FAKE.format(export=0, validate=0))
    done = job.run("Export and validate")
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "xcode").mkdir()
    step = XcodeBuildStep(tmp_path / "xcode")
    step.environment |= {f"EDGELLAMA_{k.upper().replace('-', '_')}": v for k, v in SETTINGS.items()}
    assert step.run().returncode == 0
    expected = {
        "checkpoint": SETTINGS["checkpoint"],
        "target": ["xnnpack", "onnx"],
        "recipe": "int8",
        "context": 256,
        "max_kl": 0.25,
        "max_bytes": 120_000_000,
    }
    assert parsed(job.called[0]) == expected
    assert parsed(step.arguments.read_text().splitlines()) == expected
    assert not list(tmp_path.rglob("hacked"))
    validation = build_parser().parse_args(job.called[1])
    assert (validation.verb, validation.tokens) == ("validate", 4096)
    assert (validation.max_kl, validation.baseline) == (0.25, None)
    by_default = XcodeBuildStep(tmp_path)
    (by_default.model / "a.gguf").touch()
    assert by_default.run().returncode == 0
    assert parsed(by_default.arguments.read_text().splitlines())["max_kl"] is None


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.parametrize(
    ("export", "validate", "verdict"),
    [
        (0, 0, "pass"),
        (1, 0, "fail"),
        (3, 0, "inconclusive"),
        (2, 0, None),
        (0, 1, "fail"),
        (0, 3, "inconclusive"),
    ],
)
def test_exit_codes_are_passed_on(tmp_path: Path, export: int, validate: int, verdict: str | None) -> None:
    job = Job(tmp_path, checkpoint="model", baseline="old.json")
    job.command("edgellama", FAKE.format(export=export, validate=validate))
    done = job.run("Export and validate")
    code = export or validate
    assert done.returncode == code and job.outputs["exit-code"] == str(code)
    assert job.outputs.get("verdict") == verdict
    assert ("bundle" in job.outputs) == (export == 0)
    assert ("::error::" in done.stdout) == (code != 0)
    if export == 0:
        assert str(build_parser().parse_args(job.called[1]).baseline) == "old.json"
    (tmp_path / "x").mkdir()
    step = XcodeBuildStep(tmp_path / "x", exit_code=code)
    (step.model / "a.gguf").touch()
    assert step.run().returncode == code


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_the_action_installs_itself(tmp_path: Path) -> None:
    for directory, inputs, requirement in (
        ("plain", {}, f"{ACTION}/../../.."),
        ("onnx", {"targets": "xnnpack onnx"}, f"{ACTION}/../../..[onnx]"),
        ("pinned", {"requirement": "edgellama==0.1.0"}, "edgellama==0.1.0"),
    ):
        (tmp_path / directory).mkdir()
        job = Job(tmp_path / directory, **inputs)
        job.command("python", FAKE.format(export=0, validate=0))
        assert job.run("Install edgellama").returncode == 0
        assert job.called == [["-m", "pip", "install", requirement]]
    assert (ACTION / "../../../pyproject.toml").resolve() == ROOT / "pyproject.toml"


def test_the_action_puts_no_input_into_a_script() -> None:
    """An input in the text of a script would run as a command, chosen by anyone who sets the input."""
    data = action()
    assert data["runs"]["using"] == "composite"
    for step in data["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert ("uses" in step) != ("run" in step)
        for words in json.dumps(step).split("${{")[1:]:
            expression = words.partition("}}")[0]
            assert re.search(r"inputs\.([\w-]+)|steps\.export\.outputs", expression)
            assert all(name in data["inputs"] for name in re.findall(r"inputs\.([\w-]+)", expression))
    for name, output in data["outputs"].items():
        assert output["value"] == f"${{{{ steps.export.outputs.{name} }}}}" and output["description"]
        assert f"`{name}`" in PIPELINES
    assert all(entry["description"] for entry in data["inputs"].values())
    assert os.access(ACTION / "export.sh", os.X_OK)


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.slow
def test_the_action_on_a_real_model(tmp_path: Path) -> None:
    """The step with the real edgellama: bundle, outputs, summary, reports."""
    inputs = {"checkpoint": str(TINY), "recipe": "int4-fast", "context": "128", "tokens": "512"}
    job = Job(tmp_path, **inputs, bundle="ours.edgellama")
    job.command("edgellama", f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m edgellama "$@"\n')
    done = job.run("Export and validate")
    assert done.returncode == 0, done.stdout + done.stderr
    bundle, reports = Bundle.open(tmp_path / "ours.edgellama"), Path(job.outputs["reports"])
    report = json.loads((reports / "report.json").read_text())
    assert job.outputs == {
        "reports": str(reports),
        "bundle": "ours.edgellama",
        "exit-code": "0",
        "verdict": "pass",
        "kl": str(report["quality"]["kl_mean"]),
        "bytes": str(bundle.manifest["artifacts"][0]["bytes"]),
    }
    assert set(job.outputs) == set(action()["outputs"])
    assert job.summary.read_text().startswith("### ✅ edgellama: `ours` passed")
    assert "✓ Pass" in (reports / "report.html").read_text()
    assert ElementTree.parse(reports / "report.xml").getroot().get("failures") == "0"
