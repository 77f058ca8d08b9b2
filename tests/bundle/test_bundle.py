"""Tests of `Bundle`: it is written completely or not at all, and damaged files are detected before use."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle, publish
from edgellama.bundle import bundle as bundle_module
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.publish import check_destination, staged
from edgellama.errors import BundleError, TokenizerError, UsageError
from edgellama.files import file_sha256, read_json
from edgellama.recipe import RECIPES
from tests.helpers.json_places import places
from tests.helpers.paths import TINY
from tests.helpers.small_bundle import ARTIFACT, SECTIONS, TOKENIZER, write_small_bundle


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    directory = tmp_path / "small.edgellama"
    directory.mkdir()
    return write_small_bundle(directory).path


@pytest.fixture
def manifest(bundle_path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle_path / MANIFEST).read_text())
    return data


def rewrite(bundle_path: Path, manifest: Any) -> None:
    (bundle_path / MANIFEST).write_text(json.dumps(manifest))


def check_usable(bundle_path: Path) -> None:
    """Asserts that a bundle opens, has no problems, and that each part can be read."""
    bundle = Bundle.open(bundle_path)
    assert bundle.problems() == []
    assert bundle.config.vocab_size <= 512 and bundle.recipe.rules and bundle.context_length > 0
    assert [bundle.artifact(target).exists() for target in bundle.targets] == [True]
    assert bundle.tokenizer.size == 512


def test_a_sound_bundle_opens(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    assert bundle.problems() == []
    assert bundle.targets == ["xnnpack"]
    assert bundle.artifact("xnnpack") == bundle_path / ARTIFACT
    assert bundle.artifact_entry("xnnpack")["bytes"] == 4096
    assert bundle.config.eos_token_ids == (2, 0)
    assert bundle.context_length == 128
    assert bundle.recipe == RECIPES["int4-fast"]
    assert bundle.tokenizer.size == 512


def test_a_bundle_is_frozen_and_computes_its_parts_once(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    assert bundle.config is bundle.config
    assert bundle.recipe is bundle.recipe
    assert bundle.tokenizer is bundle.tokenizer
    with pytest.raises(dataclasses.FrozenInstanceError):
        bundle.path = bundle_path.parent  # type: ignore[misc]


def test_a_bundle_opens_by_a_relative_path_and_through_a_link(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle_path)
    check_usable(Path("."))
    (bundle_path.parent / "link").symlink_to(bundle_path)
    check_usable(bundle_path.parent / "link")


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
def test_damage_is_detected_before_use(
    bundle_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    bundle = Bundle.open(bundle_path)
    damage(bundle_path / name)
    assert any(problem.startswith(name) and message in problem for problem in bundle.problems())
    read_damaged, read_sound = (lambda: bundle.artifact("xnnpack"), lambda: bundle.tokenizer)[
        :: 1 if name == ARTIFACT else -1
    ]
    with pytest.raises(BundleError, match=message):
        read_damaged()
    read_sound()  # files that are not read may be damaged


@pytest.mark.parametrize("name", ["extra.bin", "xnnpack/extra.bin", "tokenizer/chat_template.jinja"])
@pytest.mark.parametrize("plant", [Path.touch, os.mkfifo, lambda p: p.symlink_to(TINY / "tokenizer.json")])
def test_a_file_outside_the_manifest_is_detected(
    bundle_path: Path, name: str, plant: Callable[[Path], None]
) -> None:
    plant(bundle_path / name)
    bundle = Bundle.open(bundle_path)
    assert len(bundle.problems()) == 1 and bundle.problems()[0].startswith(name)
    if name.startswith("tokenizer/"):  # `Tokenizer.from_directory` reads this file
        with pytest.raises(BundleError, match=r"chat_template\.jinja"):
            _ = bundle.tokenizer


@pytest.mark.parametrize(
    "name", [".DS_Store", "tokenizer/.DS_Store", "._manifest.json", "tokenizer/Thumbs.db", "desktop.ini"]
)
def test_files_of_file_managers_are_no_part_of_a_bundle(bundle_path: Path, name: str) -> None:
    (bundle_path / name).write_bytes(b"left by a file manager")
    check_usable(bundle_path)
    rewritten = json.loads((bundle_path / MANIFEST).read_text())
    del rewritten["files"]
    assert name not in write_manifest(bundle_path, rewritten).manifest["files"]


@pytest.mark.parametrize("name", [".DS_Store", "._x"])
def test_a_link_or_folder_with_such_a_name_is_detected(bundle_path: Path, name: str) -> None:
    (bundle_path / name).symlink_to(bundle_path / MANIFEST)
    (bundle_path / "tokenizer" / name).mkdir()
    (bundle_path / "tokenizer" / name / "more.txt").write_text("x")
    assert Bundle.open(bundle_path).problems() == [
        f"{name} is a symbolic link",
        f"tokenizer/{name}/more.txt is not named in the manifest",
    ]


def test_links_to_directories_and_a_linked_manifest_are_detected(bundle_path: Path) -> None:
    (bundle_path / "folder").symlink_to(TINY)
    assert Bundle.open(bundle_path).problems() == ["folder is a symbolic link"]
    shutil.move(bundle_path / MANIFEST, bundle_path.parent / MANIFEST)
    (bundle_path / MANIFEST).symlink_to(bundle_path.parent / MANIFEST)
    with pytest.raises(BundleError, match=r"manifest\.json: this is a symbolic link"):
        Bundle.open(bundle_path)


def test_all_files_of_a_directory_artifact_are_verified(bundle_path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"][0]["path"] = "xnnpack"
    rewrite(bundle_path, manifest)
    assert Bundle.open(bundle_path).artifact("xnnpack") == bundle_path / "xnnpack"
    (bundle_path / "xnnpack" / "extra").touch()
    with pytest.raises(BundleError, match="extra is not named"):
        Bundle.open(bundle_path).artifact("xnnpack")
    (bundle_path / "xnnpack" / "extra").unlink()
    flip(bundle_path / ARTIFACT)
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(bundle_path).artifact("xnnpack")


def test_a_nested_file_of_the_manifests_name_is_hashed_too(
    bundle_path: Path, manifest: dict[str, Any]
) -> None:
    (bundle_path / "xnnpack" / MANIFEST).write_text("{}")
    bundle = write_manifest(bundle_path, manifest)
    assert bundle.problems() == []
    (bundle_path / "xnnpack" / MANIFEST).write_text("[]")
    assert len(bundle.problems()) == 1


def test_a_missing_target_is_refused(bundle_path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"][0]["target"] = "later"
    rewrite(bundle_path, manifest)
    bundle = Bundle.open(bundle_path)
    for find in (bundle.artifact, bundle.artifact_entry):
        with pytest.raises(BundleError, match=r"no artifact for target 'xnnpack' \(it has later\)"):
            find("xnnpack")
        with pytest.raises(UsageError, match="unknown target 'nonsense'"):
            find("nonsense")


@pytest.mark.parametrize("kind", ["nothing", "file", "directory", "name too long"])
def test_a_path_without_a_bundle_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / ("x" * 300 if kind == "name too long" else "place")
    if kind == "file":
        place.touch()
    if kind == "directory":
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
def test_a_malformed_manifest_is_refused(bundle_path: Path, content: bytes, message: str) -> None:
    (bundle_path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_path)


@pytest.mark.parametrize("section", [*SECTIONS, "files"])
def test_a_missing_section_is_named(bundle_path: Path, manifest: dict[str, Any], section: str) -> None:
    del manifest[section]
    rewrite(bundle_path, manifest)
    with pytest.raises(BundleError, match=f"has no {section}"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize(
    "wrong", [None, True, -1, 1.5, 10**30, "x\x1b[2J", [], [[]], {}, {"": None}], ids=repr
)
def test_a_wrong_value_anywhere_gives_a_bundle_error_or_none(
    bundle_path: Path, manifest: dict[str, Any], wrong: Any
) -> None:
    refused = 0
    for i, _ in enumerate(list(places(manifest))):
        data = copy.deepcopy(manifest)
        container, key = list(places(data))[i]
        container[key] = wrong
        rewrite(bundle_path, data)
        try:
            bundle = Bundle.open(bundle_path)
            for part in ("targets", "config", "recipe", "context_length", "tokenizer"):
                getattr(bundle, part)
            for target in bundle.targets:
                bundle.artifact(target)
            bundle.problems()
        except BundleError:
            refused += 1
    assert refused > 90  # of about 120 places; the other places accept such a value


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
def test_impossible_values_of_the_right_type_are_refused(
    bundle_path: Path, manifest: dict[str, Any], section: str, change: dict[str, Any]
) -> None:
    manifest[section] |= change
    rewrite(bundle_path, manifest)
    # Opening succeeds, because `run` needs no recipe and must accept recipes of later versions.
    bundle = Bundle.open(bundle_path)
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
def test_a_path_that_leaves_the_bundle_is_refused(
    bundle_path: Path, manifest: dict[str, Any], name: str
) -> None:
    (bundle_path.parent / "outside").write_bytes(b"")
    as_file, as_artifact = copy.deepcopy(manifest), copy.deepcopy(manifest)
    as_file["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    as_artifact["artifacts"][0]["path"] = name
    for data in (as_file, as_artifact):
        rewrite(bundle_path, data)
        with pytest.raises(BundleError, match="A path inside the bundle"):
            Bundle.open(bundle_path)


def test_an_artifact_must_be_among_the_files(bundle_path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"][0]["path"] = "xnnpack/model"  # a prefix of the file's name, not a directory
    rewrite(bundle_path, manifest)
    with pytest.raises(BundleError, match="is not among its files"):
        Bundle.open(bundle_path)


def test_two_artifacts_for_one_target_are_refused(bundle_path: Path, manifest: dict[str, Any]) -> None:
    manifest["artifacts"] *= 2
    rewrite(bundle_path, manifest)
    with pytest.raises(BundleError, match="several artifacts for one target"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y"])
def test_a_file_name_that_the_system_refuses_is_a_problem(
    bundle_path: Path, manifest: dict[str, Any], name: str
) -> None:
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    manifest["artifacts"][0]["path"] = "x" * 300
    rewrite(bundle_path, manifest)
    bundle = Bundle.open(bundle_path)
    assert "cannot be read" in bundle.problems()[0]
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.artifact("xnnpack")


def test_an_unusable_tokenizer_is_an_error(bundle_path: Path) -> None:
    (bundle_path / TOKENIZER).write_text("{}")
    bundle = write_manifest(bundle_path, SECTIONS)
    with pytest.raises(TokenizerError):
        _ = bundle.tokenizer


def test_writing_refuses_an_invalid_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.files has no tokenizer/tokenizer\.json"):
        write_manifest(tmp_path, SECTIONS)


def test_a_staged_bundle_appears_complete(tmp_path: Path) -> None:
    destination = tmp_path / "new.edgellama"
    with staged(destination, force=False) as directory:
        write_small_bundle(directory)
        assert not destination.exists()
    check_usable(destination)
    assert list(tmp_path.iterdir()) == [destination]
    plain = tmp_path / "plain"
    plain.mkdir()
    # Temporary directories are private to their owner, but the bundle is not.
    assert destination.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("force", [False, True])
def test_an_error_leaves_the_destination_unchanged(
    tmp_path: Path, bundle_path: Path, force: bool, error: type[BaseException]
) -> None:
    before = (bundle_path / MANIFEST).read_bytes()
    with pytest.raises(error), staged(bundle_path if force else tmp_path / "new", force=force) as directory:
        write_small_bundle(directory)
        raise error
    assert list(tmp_path.iterdir()) == [bundle_path]
    assert (bundle_path / MANIFEST).read_bytes() == before
    check_usable(bundle_path)


def test_force_replaces_a_bundle(tmp_path: Path, bundle_path: Path) -> None:
    (bundle_path / "old").touch()
    with staged(bundle_path, force=True) as directory:
        write_small_bundle(directory)
    check_usable(bundle_path)
    assert list(tmp_path.iterdir()) == [bundle_path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_while_replacing_restores_the_old_bundle(
    tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise error
        return rename(source, target)

    # A file system without exchange of directories.
    monkeypatch.setattr(publish, "exchange", lambda source, target: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)), staged(bundle_path, force=True) as directory:
        write_small_bundle(directory)
        (directory / "mark").touch()
    check_usable(bundle_path)
    assert list(tmp_path.iterdir()) == [bundle_path]


def make_directory(place: Path) -> None:
    place.mkdir()


def make_other_manifest(place: Path) -> None:
    """A directory with a manifest.json of another kind, as web applications have."""
    place.mkdir()
    (place / MANIFEST).write_text('{"name": "app", "icons": []}')


def make_link_to_bundle(place: Path) -> None:
    (place.parent / "target").mkdir()
    write_small_bundle(place.parent / "target")
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


def test_a_bundle_is_refused_without_force(bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"), staged(bundle_path, force=False):
        pytest.fail("work began")
    check_usable(bundle_path)


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("force", [False, True])
def test_a_destination_that_appears_during_the_export_is_kept(
    tmp_path: Path, obstacle: Callable[[Path], None], force: bool
) -> None:
    place = tmp_path / "place"
    with pytest.raises(UsageError, match="exists"), staged(place, force=force) as directory:
        write_small_bundle(directory)
        obstacle(place)
        before = sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(directory.parent))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_that_appears_during_the_export_needs_force(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(UsageError, match="exists"), staged(place, force=False) as directory:
        write_small_bundle(directory)
        place.mkdir()
        (write_small_bundle(place).path / "mark").touch()
    assert (place / "mark").exists()
    with staged(place, force=True) as directory:
        write_small_bundle(directory)
    assert not (place / "mark").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("missing/new", "missing: no such directory"), ("\udcff", "not Unicode")]
)
def test_an_impossible_destination_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_destination(tmp_path / name, force=False)
    with pytest.raises(UsageError, match=message), staged(tmp_path / name, force=True):
        pytest.fail("work began")
    assert list(tmp_path.iterdir()) == []


def test_read_json_accepts_plain_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 1.5, -1e-7, true]")
    assert read_json(tmp_path / "a.json") == [1, 1.5, -1e-7, True]


def test_a_second_manifest_hashes_only_files_written_since(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file keeps its hash until it is written to, whether its size changes or not."""
    hashed: list[str] = []

    def recorded_sha256(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    bundle, artifact = Bundle.open(bundle_path), bundle_path / ARTIFACT
    for file in bundle_path.rglob("*"):
        if file.is_file() and file.name != MANIFEST:
            os.utime(file, (1, 1))
    monkeypatch.setattr(bundle_module, "file_sha256", recorded_sha256)
    (bundle_path / "reports" / "new.json").write_text("{}")
    again = write_manifest(bundle_path, SECTIONS, hashed=bundle)
    assert hashed == ["new.json"]
    assert again.manifest["files"].items() > bundle.manifest["files"].items()
    for content in (artifact.read_bytes()[::-1], artifact.read_bytes() + b"more"):
        artifact.write_bytes(content)
        before, again = again, write_manifest(bundle_path, SECTIONS, hashed=again)
        assert again.artifact_sha256("xnnpack") != before.artifact_sha256("xnnpack")
        assert again.problems() == []
