"""Tests of `edgellama bench`: figures are complete and consistent. No test depends on the speed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.cli.dispatch import main
from edgellama.commands.bench import (
    Spread,
    bytes_per_token,
    candidates,
    measured_bandwidth,
    ratio,
    read_bench,
)
from edgellama.errors import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of `bench` on the tiny bundle and a copy of it."""
    directory = tmp_path_factory.mktemp("bench")
    copy, output = directory / "other.edgellama", directory / "bench.json"
    shutil.copytree(tiny_bundle.path, copy)
    options = ["--prompt-tokens", "8", "--prompt-tokens", "64", "--decode-tokens", "4", "--repeat", "3"]
    command = ["bench", str(tiny_bundle.path), str(copy), *options, "--threads", "1", "--json", str(output)]
    command += ["--html", str(directory / "bench.html")]
    assert main(command) == 0
    data: dict[str, Any] = json.loads(output.read_text())
    assert read_bench(output) == data  # conforms to the published schema
    page = (directory / "bench.html").read_text()
    assert page.count("<svg role") == 2 and data["machine"]["processor"] in page
    return data


def test_two_bundles_are_measured_in_turns(benchmark: dict[str, Any], tiny_bundle: Bundle) -> None:
    assert benchmark["schema"] == "edgellama.bench/1" and benchmark["machine"]["cores"] >= 1
    names = [candidate["name"] for candidate in benchmark["candidates"]]
    assert names == [f"{tiny_bundle.path.name}:xnnpack", "other.edgellama:xnnpack"]
    for candidate in benchmark["candidates"]:
        assert (candidate["runtime"], candidate["threads"]) == ("executorch-xnnpack", 1)
        assert candidate["artifact_bytes"] == tiny_bundle.artifact("xnnpack").stat().st_size
        assert candidate["load_s"] > 0 and candidate["peak_resident_bytes"] > 1e8
        assert [run["prompt_tokens"] for run in candidate["runs"]] == [8, 64]
        for run in candidate["runs"]:
            for key in ("time_to_first_token_s", "prefill_tok_s", "decode_tok_s"):
                assert 0 < run[key]["low"] <= run[key]["median"] <= run[key]["high"]
            share = run["bytes_per_token"] * run["decode_tok_s"]["median"] / benchmark["bandwidth"]["median"]
            assert run["bandwidth_share"] == pytest.approx(share)
    assert [(r["name"], r["over"], r["prompt_tokens"]) for r in benchmark["ratios"]] == [
        (names[1], names[0], 8),
        (names[1], names[0], 64),
    ]
    for row in benchmark["ratios"]:
        low, high = row["decode"]["ci95"]
        assert low <= row["decode"]["mean"] <= high


def test_bytes_of_a_token(tiny_bundle: Bundle) -> None:
    """Counts each linear once, and keys and values of earlier tokens. The row of the embedding is not counted."""
    int4 = 4 * (3 * 128 * 352 + 2 * 128 * 128 + 2 * 128 * 64)
    weights = int4 // 2 + int4 // 32 * 2 + 512 * 128 + 512 * 4
    assert bytes_per_token(tiny_bundle, "xnnpack", 0) == weights
    assert bytes_per_token(tiny_bundle, "xnnpack", 10) == weights + 10 * 2 * 4 * 4 * 64


def test_ratio_and_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    summary = ratio([2.0, 8.0])
    assert summary["mean"] == pytest.approx(4.0)
    # Student's t with one degree of freedom, on logarithms that differ by ln 4.
    half = 12.706204736 * math.log(4) / math.sqrt(2) / math.sqrt(2)
    assert summary["ci95"] == pytest.approx([4 * math.exp(-half), 4 * math.exp(half)])
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
def test_impossible_measurements_are_refused(
    options: list[str], message: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_bundle.path), *options]) == 2
    assert message in capsys.readouterr().err


def test_bundles_with_the_same_name_are_refused(tiny_bundle: Bundle) -> None:
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
