"""Tests of names and places of checkpoints: local paths, folders of the Hugging Face cache, OWNER/NAME."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgellama.errors import CheckpointError
from edgellama.host.find_checkpoint import find_checkpoint
from edgellama.host.hub import HubName, HubOrigin, cache_folder, origin_of
from edgellama.host.hub_files import shards, weight_files
from tests.helpers.hub_cache import COMMIT, OTHER, cache_model
from tests.helpers.paths import TINY

FILES = {"config.json": b"{}", "model.safetensors": b"w"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in, with a cache of its own."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", HubName("meta-llama/Llama-3.2-1B")),
        ("o/n@v1.0", HubName("o/n", "v1.0")),
        ("o/n@refs/pr/7", HubName("o/n", "refs/pr/7")),
        ("o/n:n.Q8_0.gguf", HubName("o/n", None, "n.Q8_0.gguf")),
        ("o/n@main:sub/n.gguf", HubName("o/n", "main", "sub/n.gguf")),
        *[(text, None) for text in ("model", "./model", "/o/n", "a/b/c", "../n", "o/n@../x", "o/n@/etc")],
        *[
            (text, None)
            for text in ("o/n:/x.gguf", "o/n:../x.gguf", "o/n.gguf", "o/n.edgellama", "o/a--b", "")
        ],
    ],
)
def test_names(text: str, expected: HubName | None) -> None:
    assert HubName.parse(text) == expected
    assert expected is None or str(expected) == text


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        ({"HF_HOME": "/c", "XDG_CACHE_HOME": "/d"}, "/c/hub"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
    ],
)
def test_the_cache_lies_where_the_library_has_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_a_model_in_the_cache() -> None:
    snapshot = cache_model("org/tiny", FILES)
    said: list[str] = []
    assert find_checkpoint("org/tiny", say=said.append) == snapshot
    assert said == [f"org/tiny: snapshot {COMMIT} in the Hugging Face cache"]
    assert find_checkpoint(f"org/tiny@{COMMIT}") == snapshot
    assert origin_of(snapshot) == origin_of(snapshot / "x.gguf") == HubOrigin("org/tiny", COMMIT)
    assert origin_of(snapshot.parent) is None and origin_of(TINY) is None


def test_revisions() -> None:
    old = cache_model("org/tiny", FILES, commit=OTHER, reference="v1")
    new = cache_model("org/tiny", FILES)
    assert find_checkpoint("org/tiny") == new and find_checkpoint("org/tiny@v1") == old
    with pytest.raises(
        CheckpointError, match=f"no snapshot of revision v2 .*there: main, v1, {COMMIT}, {OTHER}"
    ):
        find_checkpoint("org/tiny@v2")


def test_a_commit_that_was_fetched_by_its_hash_is_the_only_snapshot() -> None:
    snapshot = cache_model("org/tiny", FILES, reference=None)
    assert find_checkpoint("org/tiny") == snapshot
    cache_model("org/tiny", FILES, commit=OTHER, reference=None)
    with pytest.raises(CheckpointError, match=r"no snapshot of revision main"):
        find_checkpoint("org/tiny")


def test_what_lacks_is_named() -> None:
    with pytest.raises(CheckpointError) as missing:
        find_checkpoint("org/tiny")
    assert "no such model in the Hugging Face cache" in missing.value.message
    assert "https://huggingface.co/org/tiny" in missing.value.remedy and "--download" in missing.value.remedy
    snapshot = cache_model("org/tiny", {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"only a part of it .* its weights are not there"):
        find_checkpoint("org/tiny")
    assert find_checkpoint("org/tiny", weights=False) == snapshot
    index = (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    shard = {"model-00001-of-00002.safetensors": b"w"}
    cache_model("org/sharded", {"config.json": b"{}", "model.safetensors.index.json": index, **shard})
    with pytest.raises(CheckpointError, match=r"1 of its files .*model-00002-of-00002"):
        find_checkpoint("org/sharded")
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or directory\n"):
        find_checkpoint("nowhere")


def test_a_local_path_wins_and_says_so(home: Path) -> None:
    cache_model("org/tiny", FILES)
    shutil.copytree(TINY, home / "work/org/tiny")
    said: list[str] = []
    assert find_checkpoint("org/tiny", say=said.append) == Path("org/tiny")
    assert len(said) == 1 and "is a local path and also a model" in said[0] and "org/tiny@main" in said[0]
    assert find_checkpoint("org/tiny@main") != Path("org/tiny")


def test_a_folder_of_the_cache_stands_for_its_snapshot(home: Path) -> None:
    snapshot = cache_model("org/tiny", FILES)
    said: list[str] = []
    folder = shutil.copytree(snapshot.parents[1], home / "models--org--tiny", symlinks=True)
    assert find_checkpoint(folder, say=said.append) == folder / "snapshots" / COMMIT
    assert f"its snapshot {COMMIT} is read" in said[0]


def test_a_lone_gguf(home: Path) -> None:
    folder = home / "gguf"
    folder.mkdir()
    for name in ("config.json", "README.md", "model.gguf"):
        (folder / name).write_bytes(b"")
    assert find_checkpoint(folder) == folder / "model.gguf"
    (folder / "model-f16.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 GGUF models.*: model-f16\.gguf, model\.gguf"):
        find_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert find_checkpoint(folder) == folder


def test_parts_are_one_gguf_model(home: Path) -> None:
    folder = home / "gguf"
    folder.mkdir()
    for part in (1, 2):
        (folder / f"m-0000{part}-of-00002.gguf").write_bytes(b"")
    assert find_checkpoint(folder) == folder / "m-00001-of-00002.gguf"


def test_a_gguf_of_the_cache_by_its_name() -> None:
    snapshot = cache_model("org/gguf", {"a.gguf": b"", "b.gguf": b""})
    assert find_checkpoint("org/gguf:b.gguf") == snapshot / "b.gguf"
    with pytest.raises(CheckpointError, match="2 GGUF models") as several:
        find_checkpoint("org/gguf")
    assert several.value.remedy == "Name one of them: org/gguf:FILE."
    with pytest.raises(CheckpointError, match="no such file in snapshot"):
        find_checkpoint("org/gguf:c.gguf")


def test_weights_come_in_one_form() -> None:
    names = ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "training_args.bin", "a.gguf"]

    def index(_: str) -> bytes:
        return b'{"weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors", "c": "../x", "d": ".."}}'

    assert weight_files(names, index) == ["model.safetensors"]
    assert weight_files(names[1:], index) == ["pytorch_model.bin"]
    assert weight_files(names[2:], index) == ["consolidated.00.pth"]
    assert weight_files(names[3:], index) == []
    indexed, shard = "model.safetensors.index.json", "s-1.safetensors"
    assert weight_files([*names, indexed, shard], index) == [indexed, shard, "s-2.safetensors"]
    assert weight_files([*names, indexed], index) == ["model.safetensors"], "an index of another save"
    assert shards(b"[]") == shards(b"{") == shards(b'{"weight_map": 3}') == []
