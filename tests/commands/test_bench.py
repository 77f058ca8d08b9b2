"""bench: what it measures is there and adds up; no test here says how fast anything is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.cli.dispatch import main
from edgellama.commands.bench import Spread, bytes_per_token, candidates, measured_bandwidth, ratio
from edgellama.errors import UsageError


@pytest.fixture(scope="module")
def result(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("bench")
    other, output = directory / "other.edgellama", directory / "bench.json"
    shutil.copytree(tiny_bundle.path, other)
    options = ["--prompt-tokens", "8", "--prompt-tokens", "64", "--decode-tokens", "4", "--repeat", "3"]
    command = ["bench", str(tiny_bundle.path), str(other), *options, "--threads", "1", "--json", str(output)]
    command += ["--html", str(directory / "bench.html")]
    assert main(command) == 0
    data: dict[str, Any] = json.loads(output.read_text())
    page = (directory / "bench.html").read_text()
    assert page.count("<svg role") == 2 and data["machine"]["processor"] in page
    return data


def test_two_bundles_in_turns(result: dict[str, Any], tiny_bundle: Bundle) -> None:
    assert result["schema"] == "edgellama.bench/1" and result["machine"]["cores"] >= 1
    names = [row["name"] for row in result["candidates"]]
    assert names == [f"{tiny_bundle.path.name}:xnnpack", "other.edgellama:xnnpack"]
    for row in result["candidates"]:
        assert (row["runtime"], row["threads"]) == ("executorch-xnnpack", 1)
        assert row["artifact_bytes"] == tiny_bundle.artifact("xnnpack").stat().st_size
        assert row["load_s"] > 0 and row["peak_resident_bytes"] > 1e8
        assert [run["prompt_tokens"] for run in row["runs"]] == [8, 64]
        for run in row["runs"]:
            for key in ("time_to_first_token_s", "prefill_tok_s", "decode_tok_s"):
                assert 0 < run[key]["low"] <= run[key]["median"] <= run[key]["high"]
            share = run["bytes_per_token"] * run["decode_tok_s"]["median"] / result["bandwidth"]["median"]
            assert run["bandwidth_share"] == pytest.approx(share)
    assert [(r["name"], r["over"], r["prompt_tokens"]) for r in result["ratios"]] == [
        (names[1], names[0], 8),
        (names[1], names[0], 64),
    ]
    for row in result["ratios"]:
        low, high = row["decode"]["ci95"]
        assert low <= row["decode"]["mean"] <= high


def test_bytes_of_a_token(tiny_bundle: Bundle) -> None:
    """Every linear once, and the keys and values of the tokens so far; of the embedding only a row, not counted."""
    int4 = 4 * (3 * 128 * 352 + 2 * 128 * 128 + 2 * 128 * 64)
    weights = int4 // 2 + int4 // 32 * 2 + 512 * 128 + 512 * 4
    assert bytes_per_token(tiny_bundle, "xnnpack", 0) == weights
    assert bytes_per_token(tiny_bundle, "xnnpack", 10) == weights + 10 * 2 * 4 * 4 * 64


def test_ratio_and_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    found = ratio([2.0, 8.0])
    assert found["mean"] == pytest.approx(4.0)
    # Student's t with one degree of freedom, on logarithms that differ by ln 4.
    half = 12.71 * math.log(4) / math.sqrt(2) / math.sqrt(2)
    assert found["ci95"] == pytest.approx([4 * math.exp(-half), 4 * math.exp(half)])
    assert ratio([1.0, 1.0, 1.0])["ci95"] == [1.0, 1.0]


def test_bandwidth_is_measured() -> None:
    spread = measured_bandwidth(1)
    assert 1e8 < spread.low <= spread.median <= spread.high < 1e13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-tokens", "120", "--decode-tokens", "64"], "do not fit into a context of 128"),
        (["--repeat", "1"], "no spread"),
        (["-t", "coreml"], "no artifact to measure"),
        (["-t", "xnnpak"], "unknown target"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], message: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_bundle.path), *options]) == 2
    assert message in capsys.readouterr().err


def test_bundles_of_one_name_are_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="same name"):
        candidates([tiny_bundle, tiny_bundle], None)


def test_an_artifact_that_cannot_be_loaded(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.edgellama"
    shutil.copytree(tiny_bundle.path, broken)
    (broken / "xnnpack/model.pte").write_bytes(b"no model")
    assert main(["bench", str(broken), "--prompt-tokens", "8", "--decode-tokens", "4"]) == 2
    assert "xnnpack/model.pte" in capsys.readouterr().err
