"""Bundle: written whole or not at all, and nothing is read from it that is not what was written."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle, publish
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.publish import check_destination, staged
from edgellama.errors import BundleError, TokenizerError, UsageError
from edgellama.files import read_json
from edgellama.recipe import RECIPES

TINY = Path(__file__).parents[1] / "tiny_llama" / "model"
ARTIFACT, TOKENIZER, REPORT = "xnnpack/model.pte", "tokenizer/tokenizer.json", "reports/export.json"
SECTIONS: dict[str, Any] = {
    "name": "small",
    "tools": {"edgellama": "0.1.0", "torch": "2.13.0"},
    "source": {
        "format": "safetensors",
        "architecture": "llama",
        "parameters": 1000,
        "sha256": "0" * 64,
        "license": None,
    },
    "model": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_ids": [2, 0],
        "context_length": 128,
    },
    "chat": {"template": None, "format": None, "reason": "the checkpoint has no chat template"},
    "recipe": RECIPES["int4-fast"].to_dict(),
    "artifacts": [
        {
            "target": "xnnpack",
            "path": ARTIFACT,
            "bytes": 4096,
            "inputs": [{"name": "tokens", "dtype": "int64", "shape": [1, "T"], "range": [1, 128]}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, 512]}],
            "states": [],
            "methods": {"forward": None, "get_eos_ids": [2, 0]},
            "requires": {
                "runtime": "executorch",
                "min_version": "1.4.0",
                "backends": ["XnnpackBackend"],
                "operators": [],
                "min_os": {"android": "API 23"},
            },
            "quantization": [
                {
                    "scheme": "int4",
                    "bits": 4,
                    "group_size": 32,
                    "activations": "int8",
                    "tensors": 1,
                    "bytes": 99,
                }
            ],
            "memory": {"weights": 100, "kv_cache": 200, "peak_estimate": 400},
        }
    ],
    "accuracy": {},
}


def fill(directory: Path) -> Bundle:
    """A small bundle in an empty directory; its artifact is noise, everything else is sound."""
    for name in (ARTIFACT, TOKENIZER, REPORT):
        (directory / name).parent.mkdir()
    (directory / ARTIFACT).write_bytes(bytes(range(256)) * 16)
    shutil.copy(TINY / "tokenizer.json", directory / TOKENIZER)
    (directory / REPORT).write_text("{}")
    return write_manifest(directory, SECTIONS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "small.edgellama"
    directory.mkdir()
    return fill(directory).path


@pytest.fixture
def manifest(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return data


def rewrite(path: Path, manifest: Any) -> None:
    (path / MANIFEST).write_text(json.dumps(manifest))


def use(path: Path) -> None:
    """Everything that a bundle is opened for."""
    bundle = Bundle.open(path)
    assert bundle.problems() == []
    assert bundle.config.vocab_size <= 512 and bundle.recipe.rules and bundle.context_length > 0
    assert [bundle.artifact(target).exists() for target in bundle.targets] == [True]
    assert bundle.tokenizer.size == 512


def test_a_sound_bundle_opens(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.problems() == []
    assert bundle.targets == ["xnnpack"]
    assert bundle.artifact("xnnpack") == path / ARTIFACT
    assert bundle.artifact_entry("xnnpack")["bytes"] == 4096
    assert bundle.config.eos_token_ids == (2, 0)
    assert bundle.context_length == 128
    assert bundle.recipe == RECIPES["int4-fast"]
    assert bundle.tokenizer.size == 512


def test_it_is_frozen_and_computes_its_parts_once(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.config is bundle.config
    assert bundle.recipe is bundle.recipe
    assert bundle.tokenizer is bundle.tokenizer
    with pytest.raises(dataclasses.FrozenInstanceError):
        bundle.path = path.parent  # type: ignore[misc]


def test_it_opens_by_a_relative_path_and_through_a_link(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path)
    use(Path("."))
    (path.parent / "link").symlink_to(path)
    use(path.parent / "link")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path) -> None:
    shutil.move(file, file.parent.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent.parent / "elsewhere")


def replace_folder_by_link(file: Path) -> None:
    shutil.move(file.parent, file.parent.parent.parent / "elsewhere")
    file.parent.symlink_to(file.parent.parent.parent / "elsewhere")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip, "sha256 differs"),
    (truncate, "bytes, the manifest says"),
    (Path.unlink, "is missing"),
    (replace_by_directory, "is missing"),
    (replace_by_link, "is a symbolic link"),
    (replace_folder_by_link, "is a symbolic link"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.parametrize("name", [ARTIFACT, TOKENIZER])
def test_damage_is_found_before_use(
    path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    bundle = Bundle.open(path)
    damage(path / name)
    assert any(problem.startswith(name) and message in problem for problem in bundle.problems())
    damaged, whole = (lambda: bundle.artifact("xnnpack"), lambda: bundle.tokenizer)[
        :: 1 if name == ARTIFACT else -1
    ]
    with pytest.raises(BundleError, match=message):
        damaged()
    whole()  # what is not read need not be sound


@pytest.mark.parametrize("name", ["extra.bin", "xnnpack/extra.bin", "tokenizer/chat_template.jinja"])
@pytest.mark.parametrize("plant", [Path.touch, os.mkfifo, lambda p: p.symlink_to(TINY / "tokenizer.json")])
def test_a_file_that_the_manifest_does_not_name_is_found(
    path: Path, name: str, plant: Callable[[Path], None]
) -> None:
    plant(path / name)
    bundle = Bundle.open(path)
    assert len(bundle.problems()) == 1 and bundle.problems()[0].startswith(name)
    if name.startswith("tokenizer/"):  # Tokenizer.from_directory would read it
        with pytest.raises(BundleError, match=r"chat_template\.jinja"):
            _ = bundle.tokenizer


def test_links_to_directories_and_a_linked_manifest_are_found(path: Path) -> None:
    (path / "folder").symlink_to(TINY)
    assert Bundle.open(path).problems() == ["folder is a symbolic link"]
    shutil.move(path / MANIFEST, path.parent / MANIFEST)
    (path / MANIFEST).symlink_to(path.parent / MANIFEST)
    with pytest.raises(BundleError, match=r"manifest\.json: this is a symbolic link"):
        Bundle.open(path)


def test_an_artifact_may_be_a_directory_and_is_verified_whole(path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"][0]["path"] = "xnnpack"
    rewrite(path, manifest)
    assert Bundle.open(path).artifact("xnnpack") == path / "xnnpack"
    (path / "xnnpack" / "extra").touch()
    with pytest.raises(BundleError, match="extra is not named"):
        Bundle.open(path).artifact("xnnpack")
    (path / "xnnpack" / "extra").unlink()
    flip(path / ARTIFACT)
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(path).artifact("xnnpack")


def test_a_nested_file_of_the_manifests_name_is_hashed_too(path: Path, manifest: dict[str, Any]) -> None:
    (path / "xnnpack" / MANIFEST).write_text("{}")
    bundle = write_manifest(path, manifest)
    assert bundle.problems() == []
    (path / "xnnpack" / MANIFEST).write_text("[]")
    assert len(bundle.problems()) == 1


def test_a_target_that_is_not_there(path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"][0]["target"] = "later"
    rewrite(path, manifest)
    bundle = Bundle.open(path)
    for find in (bundle.artifact, bundle.artifact_entry):
        with pytest.raises(BundleError, match=r"no artifact for target 'xnnpack' \(it has later\)"):
            find("xnnpack")
        with pytest.raises(UsageError, match="unknown target 'nonsense'"):
            find("nonsense")


@pytest.mark.parametrize("what", ["nothing", "file", "directory", "name too long"])
def test_not_a_bundle(tmp_path: Path, what: str) -> None:
    place = tmp_path / ("x" * 300 if what == "name too long" else "place")
    if what == "file":
        place.touch()
    if what == "directory":
        place.mkdir()
    with pytest.raises(BundleError):
        Bundle.open(place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b'{"schema": "edgellama.bundle/1", "name": "\xff"}', "not readable as JSON"),
        (b'{"schema": "edgellama.bundle/1", "name": "\\ud800"}', "surrogates"),
        (b'{"schema": "edgellama.bundle/1", "name": NaN}', "NaN is not a finite number"),
        (b'{"schema": "edgellama.bundle/1", "name": 1e999}', "1e999 is not a finite number"),
        (b'{"schema": "edgellama.bundle/1", "name": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"[" * 200_000, "recursion"),
        (b'{"a":' * 900 + b"0" + b"}" * 900, "recursion|schema is None"),
        (b"[]", "schema is 'list'"),
        (b"null", "schema is 'NoneType'"),
        (b"{}", "schema is None"),
        (
            b'{"schema": "edgellama.bundle/2"}',
            "schema is 'edgellama.bundle/2', expected 'edgellama.bundle/1'",
        ),
        (b'{"schema": ["edgellama.bundle/1"]}', "schema is"),
        (b'{"schema": "edgellama.bundle/1"}', "has no name, tools"),
    ],
)
def test_a_manifest_that_is_none(path: Path, content: bytes, message: str) -> None:
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(path)


@pytest.mark.parametrize("section", [*SECTIONS, "files"])
def test_a_missing_section_is_named(path: Path, manifest: dict[str, Any], section: str) -> None:
    del manifest[section]
    rewrite(path, manifest)
    with pytest.raises(BundleError, match=f"has no {section}"):
        Bundle.open(path)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in JSON data."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places(value)


@pytest.mark.parametrize(
    "wrong", [None, True, -1, 1.5, 10**30, "x\x1b[2J", [], [[]], {}, {"": None}], ids=repr
)
def test_a_wrong_value_anywhere_gives_a_bundle_error_or_none(
    path: Path, manifest: dict[str, Any], wrong: Any
) -> None:
    refused = 0
    for number, _ in enumerate(list(places(manifest))):
        data = copy.deepcopy(manifest)
        container, key = list(places(data))[number]
        container[key] = wrong
        rewrite(path, data)
        try:
            bundle = Bundle.open(path)
            for part in ("targets", "config", "recipe", "context_length", "tokenizer"):
                getattr(bundle, part)
            for target in bundle.targets:
                bundle.artifact(target)
            bundle.problems()
        except BundleError:
            refused += 1
    assert refused > 90  # of some 120 places; the rest may hold such a value


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"num_key_value_heads": 3}),
        ("model", {"head_dim": 33}),
        ("model", {"num_hidden_layers": 10**9}),
        ("recipe", {"algorithm": "magic"}),
        (
            "recipe",
            {"rules": [{"modules": "*", "scheme": {"bits": 5, "group_size": 32, "int8_activations": True}}]},
        ),
        ("recipe", {"calibration": []}),
    ],
)
def test_values_of_the_right_type_that_cannot_be(
    path: Path, manifest: dict[str, Any], section: str, change: dict[str, Any]
) -> None:
    manifest[section] |= change
    rewrite(path, manifest)
    bundle = Bundle.open(path)  # `run` needs no recipe: one of a later version must not keep it from running
    with pytest.raises(BundleError, match=f"its {section} section"):
        getattr(bundle, "config" if section == "model" else "recipe")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../outside",
            "xnnpack/../../outside",
            "/etc/hostname",
            "xnnpack\\..\\..\\outside",
            "..",
            "a/..",
            "/",
        ),
        *("", ".", "./a", "a/./b", "a//b", "a/", "a/.", "a\0", "a\n", "\x1b[2J"),
    ],
)
def test_a_path_that_leaves_the_bundle_is_refused(path: Path, manifest: dict[str, Any], name: str) -> None:
    (path.parent / "outside").write_bytes(b"")
    as_file, as_artifact = copy.deepcopy(manifest), copy.deepcopy(manifest)
    as_file["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    as_artifact["artifacts"][0]["path"] = name
    for data in (as_file, as_artifact):
        rewrite(path, data)
        with pytest.raises(BundleError, match="A path inside the bundle"):
            Bundle.open(path)


def test_an_artifact_must_be_among_the_files(path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"][0]["path"] = "xnnpack/model"  # a prefix of the file's name, and no directory
    rewrite(path, manifest)
    with pytest.raises(BundleError, match="is not among its files"):
        Bundle.open(path)


def test_two_artifacts_for_one_target_are_refused(path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"] *= 2
    rewrite(path, manifest)
    with pytest.raises(BundleError, match="several artifacts for one target"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y"])
def test_a_name_that_the_system_refuses_is_a_problem_and_no_crash(
    path: Path, manifest: dict[str, Any], name: str
) -> None:
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    manifest["artifacts"][0]["path"] = "x" * 300
    rewrite(path, manifest)
    bundle = Bundle.open(path)
    assert "cannot be read" in bundle.problems()[0]
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.artifact("xnnpack")


def test_a_bundle_without_a_usable_tokenizer(path: Path) -> None:
    (path / TOKENIZER).write_text("{}")
    bundle = write_manifest(path, SECTIONS)
    with pytest.raises(TokenizerError):
        _ = bundle.tokenizer


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.files has no tokenizer/tokenizer\.json"):
        write_manifest(tmp_path, SECTIONS)


def test_staged_appears_whole(tmp_path: Path) -> None:
    destination = tmp_path / "new.edgellama"
    with staged(destination, force=False) as directory:
        fill(directory)
        assert not destination.exists()
    use(destination)
    assert list(tmp_path.iterdir()) == [destination]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (
        destination.stat().st_mode == plain.stat().st_mode
    )  # not private to its maker, as temporary ones are


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("force", [False, True])
def test_an_error_leaves_everything_as_it_was(
    tmp_path: Path, path: Path, force: bool, error: type[BaseException]
) -> None:
    before = (path / MANIFEST).read_bytes()
    with pytest.raises(error), staged(path if force else tmp_path / "new", force=force) as directory:
        fill(directory)
        raise error
    assert list(tmp_path.iterdir()) == [path]
    assert (path / MANIFEST).read_bytes() == before
    use(path)


def test_force_replaces_a_bundle(tmp_path: Path, path: Path) -> None:
    (path / "old").touch()
    with staged(path, force=True) as directory:
        fill(directory)
    use(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("second", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_while_replacing_brings_the_old_bundle_back(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, second: BaseException
) -> None:
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise second
        return rename(source, target)

    monkeypatch.setattr(publish, "exchange", lambda one, other: False)  # as on a file system that cannot
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)), staged(path, force=True) as directory:
        fill(directory)
        (directory / "mark").touch()
    use(path)
    assert list(tmp_path.iterdir()) == [path]


def make_directory(place: Path) -> None:
    place.mkdir()


def make_other_manifest(place: Path) -> None:
    """A web application's, say: many directories have a manifest.json."""
    place.mkdir()
    (place / MANIFEST).write_text('{"name": "app", "icons": []}')


def make_link_to_bundle(place: Path) -> None:
    (place.parent / "target").mkdir()
    fill(place.parent / "target")
    place.symlink_to(place.parent / "target")


def make_broken_link(place: Path) -> None:
    place.symlink_to(place.parent / "nowhere")


OBSTACLES = [Path.touch, make_directory, make_other_manifest, make_link_to_bundle, make_broken_link]


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize(("force", "message"), [(False, "exists"), (True, "is not a bundle")])
def test_a_destination_that_exists_is_refused(
    tmp_path: Path, obstacle: Callable[[Path], None], force: bool, message: str
) -> None:
    obstacle(tmp_path / "place")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message), staged(tmp_path / "place", force=force):
        pytest.fail("work began")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_is_refused_without_force(path: Path) -> None:
    with pytest.raises(UsageError, match="exists"), staged(path, force=False):
        pytest.fail("work began")
    use(path)


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("force", [False, True])
def test_a_destination_that_appears_meanwhile_is_left_alone(
    tmp_path: Path, obstacle: Callable[[Path], None], force: bool
) -> None:
    place = tmp_path / "place"
    with pytest.raises(UsageError, match="exists"), staged(place, force=force) as directory:
        fill(directory)
        obstacle(place)
        before = sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(directory.parent))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_that_appears_meanwhile_needs_force(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(UsageError, match="exists"), staged(place, force=False) as directory:
        fill(directory)
        place.mkdir()
        (fill(place).path / "mark").touch()
    assert (place / "mark").exists()
    with staged(place, force=True) as directory:
        fill(directory)
    assert not (place / "mark").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("missing/new", "missing: no such directory"), ("\udcff", "not Unicode")]
)
def test_a_destination_that_cannot_be_made(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_destination(tmp_path / name, force=False)
    with pytest.raises(UsageError, match=message), staged(tmp_path / name, force=True):
        pytest.fail("work began")
    assert list(tmp_path.iterdir()) == []


def test_read_json_takes_plain_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 1.5, -1e-7, true]")
    assert read_json(tmp_path / "a.json") == [1, 1.5, -1e-7, True]
