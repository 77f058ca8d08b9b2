"""Tests of the command line: cheap help, exit codes, readable messages, clean output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellama import __version__, errors
from edgellama.bundle import Bundle
from edgellama.cli import arguments, dispatch, targets
from edgellama.cli.dispatch import VERBS, build_parser, load_verb, main
from edgellama.commands import export as export_phases
from edgellama.commands.export import export
from edgellama.errors import CheckFailed, EdgellamaError, Inconclusive, MissingDependencyError
from edgellama.export.xnnpack import lower
from edgellama.recipe import RECIPES
from tests.helpers.paths import ROOT, TINY
from tests.helpers.tiny_models import CONTEXT, Cut, copy_bound, write_hf

HEAVY = {"torch", "torchao", "executorch", "transformers", "numpy", "tokenizers", "tqdm", "jinja2", "gguf"}
# Buffered output, as in a user's Python. Unbuffered output would hide a missing flush.
ENVIRONMENT = {n: v for n, v in os.environ.items() if n != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    """All verbs run in one process, and its imports are listed at the end."""
    code = """
import sys
from edgellama.cli.dispatch import VERBS, main
for arguments in (["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)):
    try:
        main(arguments)
    except SystemExit as exit:
        assert exit.code == 0, arguments
assert main(["nonsense"]) == main([]) == main(["export", "x"]) == main(["run", "x", "-n", "none"]) == 2
import edgellama
print("modules:", *{name.partition(".")[0] for name in sys.modules})
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    assert not HEAVY & set(modules.split())
    for name, verb in VERBS.items():
        assert any(name in line and verb.summary in line for line in lines), name
    assert f"edgellama {__version__}" in lines


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["recipes", "int8"], ["targets"], ["targets", "--json", "-"]]
)
def test_listing_verbs_do_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; from edgellama.cli.dispatch import main; c = main({arguments}); sys.exit(c or 'torch' in sys.modules)"
    assert python(code).returncode == 0


def test_every_option_is_explained() -> None:
    for name in VERBS:
        (subparsers,) = [a for a in build_parser()._actions if a.dest == "verb"]
        choices: Any = subparsers.choices
        for action in choices[name]._actions:
            assert action.help or action.dest in ("bundle", "output"), (name, action.dest)


def test_every_verb_is_registered() -> None:
    """Each file of edgellama/cli is a verb or a helper of the verbs."""
    helpers = {"__init__", "arguments", "classify_options", "dispatch", "isolation", "report_files"}
    assert {file.stem for file in Path(targets.__file__).parent.glob("*.py")} - helpers == VERBS.keys()
    for name in VERBS:
        assert callable(load_verb(name).main) and callable(load_verb(name).options), name


EXIT_CODES = [
    *(
        (error("what went wrong", remedy="What to do."), error.exit_code)
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, EdgellamaError)
    ),
    (KeyboardInterrupt(), 130),
    (PermissionError(13, "Permission denied", "/some/file"), 2),
    (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"), 2),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2),
]


@pytest.mark.parametrize(
    ("error", "code"), EXIT_CODES, ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else ""
)
def test_errors_are_exit_codes_and_one_message(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(targets, "main", fail)
    assert main(["targets"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    if isinstance(error, EdgellamaError):
        assert err == "edgellama: error: what went wrong\n  What to do.\n"
    elif isinstance(error, UnicodeError):
        assert err.startswith("edgellama: error: input or output that is not") and len(err.splitlines()) == 2
    elif isinstance(error, OSError):
        assert err.startswith("edgellama: error: /some/file: Permission denied\n")
    else:
        assert "interrupted" in err


def test_every_error_is_in_the_docstring() -> None:
    assert {e.exit_code for e in (errors.UsageError, errors.BundleError, MissingDependencyError)} == {2}
    assert CheckFailed.exit_code == 1 and Inconclusive.exit_code == 3
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, EdgellamaError):
            assert name in (errors.__doc__ or ""), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VERB"),
        (["exprot"], "invalid choice: 'exprot'"),
        (["export", "model"], "-o/--output"),
        (["export", "model", "-o", "x", "--context", "many"], "a whole number of at least 1, got 'many'"),
        (["export", "model", "-o", "x", "--context", "-1"], "a whole number of at least 1, got '-1'"),
        (["export", "model", "-o", "x", "--max-bytes", "big"], "not a size: 'big'"),
        (["export", "model", "-o", "x", "--max-kl", "little"], "invalid float value: 'little'"),
        (["export", "model", "-o", "x", "--tokens", "9"], "unrecognized arguments"),
        (["export", "/nowhere", "-o", "x"], "/nowhere: no such file or directory"),
        (["export", str(TINY), "-o", "/no/where/x"], "/no/where: no such directory"),
        (["export", str(TINY), "-o", "x", "-r", "int4-fsat"], "Did you mean 'int4-fast'"),
        (["export", str(TINY), "-o", "x", "-t", "xnnpak"], "Did you mean 'xnnpack'"),
        (["export", str(TINY), "-o", "x", "--json", "/no/where.json"], "its directory does not exist"),
        (["validate", str(TINY)], "not a bundle"),
        (["validate", "/nowhere"], "not a bundle"),
        (["run", str(TINY), "-p", "x"], "not a bundle"),
        (["inspect", "/nowhere"], "/nowhere"),
        (["recipes", "int9"], "unknown recipe 'int9'"),
        (["targets", "--json", "/"], "cannot write '/': it is a directory"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_usage_errors_are_two_lines(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    lines = [line for line in err.splitlines() if not line.startswith("open")]  # without the failed stage
    assert lines[0].startswith("edgellama: error: ") and lines[1].startswith("  ") and len(lines) == 2
    assert list(tmp_path.iterdir()) == []


def test_windows_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        dispatch, "sys", SimpleNamespace(platform="win32", stdout=sys.stdout, stderr=sys.stderr)
    )
    assert main(["export", "model", "-o", "out"]) == 2
    assert "`edgellama export` does not run on Windows itself" in capsys.readouterr().err
    assert main(["recipes"]) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("120MB", 120_000_000),
        ("1.5GiB", 1_610_612_736),
        ("10 kb", 10_000),
        ("7kib", 7168),
        ("1e3", 1000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert arguments.size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "inf", "nan", "-1", "-5MB", "0", "1XB", "1e999", "0x10", "5M"])
def test_a_malformed_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "model", "-o", "x", "--max-bytes", text]) == 2
    assert "size" in capsys.readouterr().err or text.startswith("-")


def test_recipes_and_targets_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and recipe.summary in out for name, recipe in RECIPES.items())
    assert main(["recipes", "int8"]) == 0
    assert json.loads(capsys.readouterr().out) == RECIPES["int8"].to_dict()
    assert main(["targets", "--json", str(tmp_path / "targets.json")]) == 0
    assert "xnnpack" in capsys.readouterr().out
    assert json.loads((tmp_path / "targets.json").read_text())[0]["artifact"] == "xnnpack/model.pte"


def test_a_printed_recipe_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    assert main(["recipes", "int4-fast", "--json", str(file)]) == 0
    assert main(["recipes", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == RECIPES["int4-fast"].to_dict()


@pytest.fixture
def one_layer_model(cut: Callable[[int, str], Cut], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint of one layer on disk. Its lowered file is copied from the session's cut."""
    one_layer = cut(1, "int4-fast")

    def copy_artifact(model: Any, path: Path, provenance: Any, *, progress: Any) -> None:
        copy_bound(one_layer.path, path, provenance)

    monkeypatch.setattr(lower, "lower_to_xnnpack", copy_artifact)
    return write_hf(one_layer.checkpoint, tmp_path / "model")


def test_json_on_standard_output_is_json_and_nothing_else(
    one_layer_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The output of every verb is JSON, including writes of native code to the file descriptor."""
    bundle = tmp_path / "new.edgellama"
    options = ["-r", "int4-fast", "--context", "128", "--json", "-"]
    assert main(["export", str(one_layer_model), "-o", str(bundle), *options]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["manifest"] == Bundle.open(bundle).manifest
    assert "quality.kl" in err and str(bundle / "xnnpack/model.pte") in err
    assert main(["validate", str(bundle), "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["schema"] == "edgellama.report/1"
    for command in (["inspect", str(bundle)], ["recipes"], ["recipes", "fp32"], ["targets"]):
        assert main([*command, "--json", "-"]) == 0
        json.loads(capfd.readouterr().out)


def test_a_failed_export_is_exit_code_1_and_leaves_nothing(
    one_layer_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["-r", "int4-fast", "--context", "128"]
    common = ["export", str(one_layer_model), "-o", str(tmp_path / "new.edgellama"), *options]
    before = sorted(tmp_path.iterdir())
    assert main([*common, "--max-kl", "1e-6"]) == 1
    assert "quality.kl is" in capfd.readouterr().err
    assert main([*common, "--max-bytes", "100KB"]) == 1
    assert "the limit is 100000" in capfd.readouterr().err
    assert main([*common, "--max-kl", "0.1", "--no-validate"]) == 2
    assert sorted(tmp_path.iterdir()) == before
    assert main([*common, "--max-kl", "0.5", "--max-bytes", "1MB"]) == 0
    capfd.readouterr()
    assert main(common) == 2
    assert "exists" in capfd.readouterr().err
    assert main([*common, "--force", "--no-validate"]) == 0


def test_an_export_writes_its_report_files_whether_it_passes_or_not(
    one_layer_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("html", "markdown", "junit")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    bundle = tmp_path / "new.edgellama"
    common = ["export", str(one_layer_model), "-o", str(bundle), "-r", "int4-fast", "--context", "128"]
    assert main([*common, *options, "--max-kl", "1e-6"]) == 1
    assert "✕ Fail" in files["html"].read_text() and not bundle.exists()
    assert files["markdown"].read_text().startswith("### ❌ edgellama: `new` failed")
    assert '<failure message="quality.kl is' in files["junit"].read_text()
    assert main([*common, *options]) == 0
    assert "✓ Pass" in files["html"].read_text() and 'failures="0"' in files["junit"].read_text()
    assert str(tmp_path) not in files["html"].read_text()
    before = sorted(tmp_path.iterdir())
    for wrong in (["--no-validate"], ["--plan"]):
        assert main([*common, "--force", *options, *wrong]) == 2
    for wrong in (["--html", "-"], ["--html", str(tmp_path / "no/x.html")], ["--html", str(tmp_path)]):
        assert main([*common, "--force", *wrong]) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_the_options_are_the_keywords_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options reach `export` under the same names and with the same defaults."""
    passed: dict[str, Any] = {}

    def record(checkpoint: Any, output: Any, **options: Any) -> Any:
        passed.update(options, checkpoint=checkpoint, output=output)
        raise CheckFailed("stop", remedy="here")

    monkeypatch.setattr(export_phases, "export", record)
    assert main(["export", "model", "-o", "out"]) == 1
    names = [name for name in signature(export).parameters if name in passed and name != "progress"]
    defaults = {name: signature(export).parameters[name].default for name in names}
    required = {"checkpoint": "model", "output": Path("out")}
    assert {name: v for name, v in passed.items() if name != "progress"} == {**defaults, **required}
    arguments = "export m -o o -t onnx -t xnnpack -r int8 --context 9 --max-bytes 1KB --max-kl 0.5 --no-validate --force"
    assert main(arguments.split()) == 1
    assert passed["targets"] == ["onnx", "xnnpack"] and passed["recipe"] == "int8"
    assert (passed["context"], passed["max_bytes"], passed["max_kl"]) == (9, 1000, 0.5)
    assert passed["validate"] is False and passed["force"] is True


def test_a_closed_pipe_is_no_error() -> None:
    """`edgellama recipes int8 | head -0` gives no traceback, not even at the exit of Python."""
    command = [sys.executable, "-m", "edgellama", "recipes", "int8"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 0


def test_the_terminal_of_a_user_is_clean_and_ctrl_c_is_130(tiny_bundle: Bundle) -> None:
    """A chat in its own process: an answer, then an interrupt at the prompt, without warnings or traceback."""
    command = [sys.executable, "-m", "edgellama", "run", str(tiny_bundle.path), "--chat", "-n", "8"]
    with subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write("Good morning.\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        speed = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert answer.strip()
    assert speed.startswith("[") and "prompt tokens at" in speed, speed
    assert rest == "\nedgellama: interrupted\n"


def test_the_package_run_as_a_module_is_the_command() -> None:
    command = [sys.executable, "-m", "edgellama", "recipes", "int9"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("edgellama: error: unknown recipe 'int9'\n  Did you mean 'int8'?")


def test_several_options_of_one_kind(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    targets_twice = ["-t", "xnnpack", "-t", "xnnpack"]
    assert main(["validate", str(tiny_bundle.path), *targets_twice, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "xnnpack"  # validated once
    assert Bundle.open(tiny_bundle.path).context_length == CONTEXT
