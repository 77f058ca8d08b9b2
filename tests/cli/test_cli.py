"""The command line as a user meets it: help that costs nothing, exit codes, one readable message, clean output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgellama import __version__, errors
from edgellama.bundle import Bundle
from edgellama.cli import arguments, targets
from edgellama.cli.dispatch import VERBS, build_parser, main
from edgellama.commands.export import export
from edgellama.errors import CheckFailed, EdgellamaError, Inconclusive, MissingDependencyError
from edgellama.export.xnnpack import lower as to_xnnpack
from edgellama.recipe import RECIPES
from tests.helpers.tiny_models import CONTEXT, TINY, Cut, write_hf

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchao", "executorch", "transformers", "numpy", "tokenizers", "tqdm", "jinja2", "gguf"}
# Buffered, as a user's Python is: where everything is written at once, no one notices what is never flushed.
ENVIRONMENT = {n: v for n, v in os.environ.items() if n != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    """In one process, so that what one verb imports would be seen in the next."""
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
    *text, modules = done.stdout.splitlines()
    assert not HEAVY & set(modules.split())
    for name, verb in VERBS.items():
        assert any(name in line and verb.SUMMARY in line for line in text), name
    assert f"edgellama {__version__}" in text


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["recipes", "int8"], ["targets"], ["targets", "--json", "-"]]
)
def test_what_only_lists_imports_no_torch(arguments: list[str]) -> None:
    code = f"import sys; from edgellama.cli.dispatch import main; c = main({arguments}); sys.exit(c or 'torch' in sys.modules)"
    assert python(code).returncode == 0


def test_every_option_is_explained() -> None:
    for name in VERBS:
        (subparsers,) = [a for a in build_parser()._actions if a.dest == "verb"]
        choices: Any = subparsers.choices
        for action in choices[name]._actions:
            assert action.help or action.dest in ("bundle", "output"), (name, action.dest)


def test_every_verb_is_there() -> None:
    """Each verb is a file of edgellama/cli, and each such file a verb or a helper of the verbs."""
    helpers = {"__init__", "dispatch", "arguments", "isolation", "report_files"}
    assert {file.stem for file in Path(targets.__file__).parent.glob("*.py")} - helpers == VERBS.keys()
    for name, verb in VERBS.items():
        assert callable(verb.main) and callable(verb.options), name


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


def test_the_tree_of_errors_is_that_of_the_docstring() -> None:
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
    lines = [line for line in err.splitlines() if not line.startswith("open")]  # the stage that failed
    assert lines[0].startswith("edgellama: error: ") and lines[1].startswith("  ") and len(lines) == 2
    assert list(tmp_path.iterdir()) == []


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
def test_what_is_no_size(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "model", "-o", "x", "--max-bytes", text]) == 2
    assert "size" in capsys.readouterr().err or text.startswith("-")


def test_lists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and recipe.summary in out for name, recipe in RECIPES.items())
    assert main(["recipes", "int8"]) == 0
    assert json.loads(capsys.readouterr().out) == RECIPES["int8"].to_dict()
    assert main(["targets", "--json", str(tmp_path / "targets.json")]) == 0
    assert "xnnpack" in capsys.readouterr().out
    assert json.loads((tmp_path / "targets.json").read_text())[0]["artifact"] == "xnnpack/model.pte"


def test_a_recipe_that_was_printed_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    assert main(["recipes", "int4-fast", "--json", str(file)]) == 0
    assert main(["recipes", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == RECIPES["int4-fast"].to_dict()


@pytest.fixture
def lowered_before(cut: Callable[[int, str], Cut], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint of one layer on disk, and its file from another test in place of lowering."""
    made = cut(1, "int4-fast")
    monkeypatch.setattr(
        to_xnnpack, "lower_to_xnnpack", lambda model, to, provenance, *, progress: shutil.copy(made.path, to)
    )
    return write_hf(made.checkpoint, tmp_path / "model")


def test_json_on_standard_output_is_json_and_nothing_else(
    lowered_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of every verb, down to what native code writes to the file descriptor."""
    bundle = tmp_path / "new.edgellama"
    options = ["-r", "int4-fast", "--context", "128", "--json", "-"]
    assert main(["export", str(lowered_before), "-o", str(bundle), *options]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["manifest"] == Bundle.open(bundle).manifest
    assert "quality.kl" in err and str(bundle / "xnnpack/model.pte") in err
    assert main(["validate", str(bundle), "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["schema"] == "edgellama.report/1"
    for command in (["inspect", str(bundle)], ["recipes"], ["recipes", "fp32"], ["targets"]):
        assert main([*command, "--json", "-"]) == 0
        json.loads(capfd.readouterr().out)


def test_a_failed_export_is_exit_code_1_and_leaves_nothing(
    lowered_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["-r", "int4-fast", "--context", "128"]
    common = ["export", str(lowered_before), "-o", str(tmp_path / "new.edgellama"), *options]
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
    lowered_before: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("html", "markdown", "junit")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    bundle = tmp_path / "new.edgellama"
    common = ["export", str(lowered_before), "-o", str(bundle), "-r", "int4-fast", "--context", "128"]
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


def test_the_options_are_the_librarys_keywords(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is typed arrives, under the same name and with the same default."""
    from inspect import signature

    seen: dict[str, Any] = {}

    def record(checkpoint: Any, output: Any, **options: Any) -> Any:
        seen.update(options, checkpoint=checkpoint, output=output)
        raise CheckFailed("stop", remedy="here")

    from edgellama.commands import export as build

    monkeypatch.setattr(build, "export", record)
    assert main(["export", "model", "-o", "out"]) == 1
    defaults = {
        n: p.default for n, p in signature(export).parameters.items() if n in seen and n != "progress"
    }
    required = {"checkpoint": "model", "output": Path("out")}
    assert {n: v for n, v in seen.items() if n != "progress"} == {**defaults, **required}
    arguments = "export m -o o -t onnx -t xnnpack -r int8 --context 9 --max-bytes 1KB --max-kl 0.5 --no-validate --force"
    assert main(arguments.split()) == 1
    assert seen["targets"] == ["onnx", "xnnpack"] and seen["recipe"] == "int8"
    assert (seen["context"], seen["max_bytes"], seen["max_kl"]) == (9, 1000, 0.5)
    assert seen["validate"] is False and seen["force"] is True


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`edgellama recipes int8 | head -0`: no traceback while Python exits, either."""
    command = [sys.executable, "-m", "edgellama", "recipes", "int8"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 0


def test_the_terminal_of_a_user_is_clean_and_ctrl_c_is_130(tiny_bundle: Bundle) -> None:
    """A chat in a process of its own: an answer, then a real interrupt at the prompt; no warnings, no traceback."""
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


def test_a_module_run_as_a_program_is_the_command() -> None:
    command = [sys.executable, "-m", "edgellama", "recipes", "int9"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("edgellama: error: unknown recipe 'int9'\n  Did you mean 'int8'?")


def test_several_options_of_one_kind(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Sequence[str] = [
        "validate",
        str(tiny_bundle.path),
        "-t",
        "xnnpack",
        "-t",
        "xnnpack",
        "--json",
        "-",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "xnnpack"  # said twice, done once
    assert Bundle.open(tiny_bundle.path).context_length == CONTEXT
