"""Tests of `edgellama inspect`: it shows the files as they are on disk, and fails on damaged bundles."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Ggml

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.cli.dispatch import main
from edgellama.commands.inspect import inspect
from edgellama.errors import BundleError, CheckpointError, InputError
from edgellama.report.tables import SHOWN, WIDTH, to_text
from tests.helpers.gguf_models import convert, source, tiny_config
from tests.helpers.paths import ROOT, TINY

ARTIFACT = "xnnpack/model.pte"


@pytest.fixture
def bundle_copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy.edgellama"))


def rows(table: list[dict[str, Any]], label: str) -> dict[Any, dict[str, Any]]:
    """Rows of a table by their label, which must be unique."""
    assert len({row[label] for row in table}) == len(table)
    return {row[label]: row for row in table}


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_checkpoint() -> None:
    data = inspect(TINY)
    header = (TINY / "model.safetensors").read_bytes()
    stored = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    stored.pop("__metadata__", None)
    size = sum(t["data_offsets"][1] - t["data_offsets"][0] for t in stored.values())
    assert (data["kind"], data["format"]) == ("checkpoint", "safetensors")
    assert (data["bytes"], data["parameters"], data["bits_per_weight"]) == (size, size // 2, 16)
    assert data["dtypes"] == [
        {"dtype": "BF16", "tensors": len(stored), "parameters": size // 2, "bytes": size, "share": 1.0}
    ]
    modules = rows(data["modules"], "module")
    assert sum(row["bytes"] for row in modules.values()) == size
    assert sum(row["share"] for row in modules.values()) == pytest.approx(1)
    assert modules["mlp.down_proj"]["tensors"] == 4
    assert modules["embed_tokens"]["bytes"] == 512 * 128 * 2
    assert "lm_head" not in modules and modules.keys() >= {"norm", "input_layernorm", "self_attn.k_proj"}
    assert [row["bytes"] for row in data["modules"]] == sorted(
        (r["bytes"] for r in data["modules"]), reverse=True
    )
    assert data["config"]["num_key_value_heads"] == 2
    assert data["tokenizer"]["chat_template"] is True
    assert data["tokenizer"]["tokens"] == 512
    assert data["tokenizer"]["special_tokens"] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert data["tokenizer"]["stops_at"] == ["<|im_end|>", "<|endoftext|>"]
    assert rows(data["files"], "file")["model.safetensors"]["bytes"] == len(header)


def test_gguf(tmp_path: Path) -> None:
    config = tiny_config()
    data = inspect(convert(source(config), Ggml.Q8_0).write(tmp_path / "model.gguf"))
    dtypes = rows(data["dtypes"], "dtype")
    norms = 256 * (2 * config.num_hidden_layers + 1)
    assert dtypes["F32"]["bytes"] == 4 * norms
    assert dtypes["Q8_0"]["bytes"] == (config.parameters - norms) // 32 * 34
    assert data["bits_per_weight"] == pytest.approx(8.5, abs=0.1)
    assert data["license"] == "mit"
    assert data["tokenizer"]["chat_template"] is False
    assert any("quantized" in note for note in data["notes"])


def test_bundle(tiny_bundle: Bundle) -> None:
    data = inspect(tiny_bundle.path)
    assert (data["kind"], data["name"], data["problems"]) == ("bundle", "tiny", [])
    (artifact,) = data["artifacts"]
    assert artifact["bytes"] == (tiny_bundle.path / ARTIFACT).stat().st_size
    assert artifact["memory"]["kv_cache"] == 2 * 4 * 4 * tiny_bundle.context_length * 2 * 32
    assert artifact["requires"]["backends"] == ["XnnpackBackend"]
    assert "llama::custom_sdpa.out" in artifact["requires"]["operators"]
    linears = [row for row in artifact["quantization"] if row["modules"] == "linear"]
    assert rows(linears, "scheme")["int4"]["tensors"] == 16
    tensors = rows(data["tensors"], "module")
    assert (tensors["mlp.up_proj"]["scheme"], tensors["mlp.up_proj"]["tensors"]) == ("int4 g32 a8", 4)
    assert tensors["mlp.up_proj"]["bytes"] == 4 * (352 * 128 // 2 + 352 * 128 // 32 * 2)
    assert 15 < tensors["mlp.up_proj"]["worst_sqnr_db"] < tensors["embed_tokens"]["worst_sqnr_db"]
    assert tensors["norm"]["worst_sqnr_db"] is None
    report = json.loads((tiny_bundle.path / "reports" / "validate-xnnpack.json").read_text())
    assert data["accuracy"]["xnnpack"]["kl_mean_ci95"] == report["quality"]["kl_mean_ci95"]
    assert data["accuracy"]["xnnpack"]["verdict"] == "pass"
    files = rows(data["files"], "file")
    assert files.keys() == tiny_bundle.manifest["files"].keys()
    assert all(row["as_exported"] for row in data["files"])
    assert data["bytes"] == sum(f.stat().st_size for f in map(tiny_bundle.path.joinpath, files))
    assert data["recipe"]["rules"][0] == {"modules": "model.embed_tokens", "scheme": "int8 channel"}


def test_inspecting_a_bundle_imports_no_torch(tiny_bundle: Bundle) -> None:
    code = "import sys; from edgellama.commands.inspect import inspect; inspect(sys.argv[1]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tiny_bundle.path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_pte(tiny_bundle: Bundle) -> None:
    (entry,) = tiny_bundle.manifest["artifacts"]
    data = inspect(tiny_bundle.path / ARTIFACT)
    assert (data["kind"], data["bytes"]) == ("pte", entry["bytes"])
    assert data["weight_bytes"] == entry["memory"]["weights"]
    assert 0.85 < data["weight_share"] == data["weight_bytes"] / data["bytes"] < 1
    linears = rows(data["linears"], "scheme")
    assert (linears["int4"]["group_size"], linears["int4"]["activations"]) == (32, "int8")
    assert (linears["int4"]["tensors"], linears["int8"]["tensors"]) == (16, 1)
    assert linears["int4"]["parameters"] == 4 * (3 * 128 * 352 + 2 * 128 * 128 + 2 * 128 * 64)
    constants = rows(data["constants"], "dtype")
    assert constants["int8"]["bytes"] == 512 * 128  # the embedding
    assert constants.keys() == {"int8", "float32"}
    assert rows(data["operators"], "operator")["llama::update_cache.out"]["calls"] == 8
    assert data["delegates"][0]["backend"] == "XnnpackBackend"
    methods = {name: row["value"] for name, row in rows(data["methods"], "method").items()}
    assert methods == entry["methods"]


def damage_nothing(path: Path) -> str:
    return ""


def damage_artifact(path: Path) -> str:
    flip_last_bit(path / ARTIFACT)
    return "xnnpack/model.pte is not the file that was exported"


def damage_report(path: Path) -> str:
    (path / "reports" / "export.json").write_text("[")
    return "reports/export.json has 1 bytes"


def damage_by_an_extra_file(path: Path) -> str:
    (path / "notes.txt").touch()
    return "notes.txt is not named in the manifest"


@pytest.mark.parametrize("damage", [damage_nothing, damage_artifact, damage_report, damage_by_an_extra_file])
def test_a_mismatch_is_shown_with_the_other_data_and_fails(
    bundle_copy: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = damage(bundle_copy)
    assert main(["inspect", str(bundle_copy), "--json", "-"]) == bool(expected)
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert expected in " ".join(data["problems"])
    assert expected in " ".join(err.split())
    assert len(data["files"]) == 15 and data["artifacts"][0]["bytes"] > 0  # the other data
    altered = [row["file"] for row in data["files"] if not row["as_exported"]]
    assert altered == [name for name in (ARTIFACT, "reports/export.json") if expected.startswith(name)]
    assert bool(data["tensors"]) is not (damage is damage_report)


def test_text_and_json_show_the_same_data(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle_copy), "--json", str(bundle_copy.parent / "out.json")]) == 0
    out, err = capsys.readouterr()
    data = inspect(bundle_copy)
    assert json.loads((bundle_copy.parent / "out.json").read_text()) == data
    assert out.strip() == to_text({key: value for key, value in data.items() if key != "schema"})
    assert err == ""
    low, high = data["accuracy"]["xnnpack"]["kl_mean_ci95"]
    size = f"{data['artifacts'][0]['bytes']:,}"
    for text in (f"[{low:.4g}, {high:.4g}]", "int4 g32 a8", size, "XnnpackBackend"):
        assert text in out


def test_a_file_name_that_is_not_unicode_stays_json(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle_copy / os.fsdecode(b"caf\xe9")).touch()
    assert main(["inspect", str(bundle_copy), "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["caf\udce9 is not named in the manifest"]


@pytest.mark.parametrize(
    "content",
    [
        *("[]", '{"schema": "edgellama.export/1"}', '{"schema": "edgellama.export/1", "tensors": [1]}'),
        '{"schema": "edgellama.export/1", "tensors": [{"name": 1, "scheme": "", "shape": [], "bytes": 1, "sqnr_db": 1}]}',
        '{"schema": "edgellama.export/1", "tensors": [{"name": "a", "scheme": "", "shape": [1.5], "bytes": 1, "sqnr_db": 1}]}',
        '{"schema": "edgellama.export/1", "tensors": [{"name": "a", "scheme": "", "shape": [], "bytes": -1, "sqnr_db": 1}]}',
        '{"schema": "edgellama.export/1", "tensors": [{"name": "a", "scheme": "", "shape": [], "bytes": 1, "sqnr_db": NaN}]}',
    ],
)
def test_a_malformed_report_is_refused(bundle_copy: Path, content: str) -> None:
    (bundle_copy / "reports" / "export.json").write_text(content)
    write_manifest(bundle_copy, json.loads((bundle_copy / "manifest.json").read_text()))
    with pytest.raises(BundleError, match="not the report of an export"):
        inspect(bundle_copy)


def test_a_report_of_another_version_is_left_out(bundle_copy: Path) -> None:
    (bundle_copy / "reports" / "export.json").write_text('{"schema": "edgellama.export/2"}')
    write_manifest(bundle_copy, json.loads((bundle_copy / "manifest.json").read_text()))
    assert inspect(bundle_copy)["tensors"] == []


@pytest.mark.parametrize("damage", ["empty", "half", "magic", "noise", "string in the delegate"])
def test_a_damaged_pte_gives_one_message(
    tiny_bundle: Bundle, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((tiny_bundle.path / ARTIFACT).read_bytes())
    if damage == "empty":
        data.clear()
    elif damage == "half":
        del data[len(data) // 2 :]
    elif damage == "magic":
        data[4] = 0
    elif damage == "noise":
        data[16:2000] = bytes(range(248)) * 8
    else:  # flatc refuses this name of a constant in an XNNPACK payload, and prints its options to both streams
        key = re.compile(rb"[0-9a-f]{64}").search(data, data.index(b"XH00"))
        assert key is not None
        data[key.start()] = 0xFF
    (tmp_path / "model.pte").write_bytes(data)
    capfd.readouterr()
    assert main(["inspect", str(tmp_path / "model.pte")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"edgellama: error: {tmp_path}/model.pte: not a readable .pte")
    assert err.count("\n") == 2


@pytest.mark.parametrize("kind", ["text", "empty directory", "shard", "directory.pte"])
def test_the_refusal_of_other_files_lists_the_accepted_kinds(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "text":
        path.write_text("hello")
    elif kind == "shard":
        path = TINY / "model.safetensors"
    else:
        path.mkdir()
    with pytest.raises(InputError, match=r"(?s)neither .*bundle.*config\.json.*\.gguf.*params\.json.*\.pte"):
        inspect(path)


def test_a_broken_input_gives_the_error_of_its_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        inspect(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text('{"name": "a web application"}')
    with pytest.raises(BundleError, match="schema is None"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type"):
        inspect(tmp_path)


def test_a_checkpoint_beside_a_foreign_manifest_is_a_checkpoint(tmp_path: Path) -> None:
    path = Path(shutil.copytree(TINY, tmp_path / "model"))
    (path / "manifest.json").write_text("{}")
    assert inspect(path)["kind"] == "checkpoint"


def test_table() -> None:
    text = to_text(
        {"rows": [{"name": "a", "bytes": 1234567}, {"name": "long name", "bytes": None, "share": 0.5}]}
    )
    assert text.splitlines() == [
        "",
        "rows",
        "  name           bytes  share",
        "  a          1,234,567      -",
        "  long name          -  50.0%",
    ]


def test_block() -> None:
    data: dict[str, Any] = {
        "peak_bytes": 1_500_000,
        "small_bytes": 999,
        "eos_token_ids": [128_009, 1],
        "interval": [0.012345, 0.5],
        "ok": True,
        "none": None,
        "notes": [],
        "affix": "user\n",
        "blank": "",
        "inner": {"large": 123456.0, "deep": [{"x": 1, "y": [{"z": 2}]}]},
    }
    assert to_text(data).splitlines() == [
        "peak bytes     1,500,000 (1.5 MB)",
        "small bytes    999 (1.0 kB)",
        "eos token ids  [128009, 1]",
        "interval       [0.01235, 0.5]",
        "ok             yes",
        "none           -",
        "notes          none",
        'affix          "user\\n"',
        'blank          ""',
        "",
        "inner",
        "  large  123456",
        "  deep",
        "    x  1",
        "    y",
        "      z",
        "      2",
    ]


def test_long_lists_wrap_and_are_shortened() -> None:
    lines = to_text({"operators": [f"aten::operator_{i}.out" for i in range(SHOWN + 5)]}).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    assert all(line.startswith(" " * len("operators  ")) for line in lines[1:])
    assert " ".join(" ".join(lines).split()).endswith("aten::operator_23.out and 5 more")


def test_control_characters_do_not_reach_the_terminal() -> None:
    hostile = "\x1b[2J\r\n\u202e\x9b"
    text = to_text({"name": hostile, hostile: 1, "list": [hostile], "rows": [{hostile: hostile}]})
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.count("\\x1b[2J\\r\\n\\u202e\\x9b") == 5
