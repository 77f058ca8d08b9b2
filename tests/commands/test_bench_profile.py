"""Tests of `edgellama bench --profile`: parts are told apart, and add up to the time of a token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgellama.bundle import Bundle
from edgellama.cli.dispatch import main
from edgellama.errors import BundleError
from edgellama.formats.pte_profile import ProfiledCall, ProfiledRun
from edgellama.host import executorch_versions
from edgellama.host.executorch_versions import has_event_tracer
from edgellama.targets.xnnpack.profile import PARTS, seconds_by_part


def call(name: str, seconds: float, *operators: str) -> ProfiledCall:
    """A call in which each operator takes a second."""
    return ProfiledCall(name, seconds, tuple((operator, 1.0) for operator in operators))


NORM = ("Square (NC)", "Multiply (ND)")
RUN = ProfiledRun(
    100.0,
    (
        call("select_copy.int_out", 1.0),
        call("embedding_byte.dtype_out", 2.0),
        call("", 5.0, *NORM, "Fully Connected"),
        call("update_cache.out", 1.0),
        call("custom_sdpa.out", 4.0),
        call("", 20.0, "Fully Connected", "Add", *NORM, "Fully Connected", "Add", *NORM, "Fully Connected"),
        call("custom_sdpa.out", 4.0),
        call("", 20.0, "Fully Connected", "Add", *NORM, "Fully Connected", "Add", *NORM, "Fully Connected"),
    ),
)


def test_the_parts_of_a_token() -> None:
    seconds = seconds_by_part(RUN)
    assert seconds == {
        "embedding": 2.0,
        "q k v o": 3.0 + 5.0 + 2.0,
        "attention": 9.0,
        "MLP": 8.0,
        "head": 3.0,
        "rest": 68.0,
    }
    assert sum(seconds.values()) == RUN.seconds


def test_delegates_of_another_layout_are_refused() -> None:
    unknown = ProfiledRun(9.0, (call("", 3.0, *NORM), call("", 3.0, "Fully Connected")))
    with pytest.raises(BundleError, match="cannot be told apart"):
        seconds_by_part(unknown)


@pytest.mark.skipif(not has_event_tracer(), reason="ExecuTorch 1.4 has no event tracer")
def test_shares_add_up_to_the_time_of_a_token(tiny_bundle: Bundle, tmp_path: Path) -> None:
    output, page = tmp_path / "profile.json", tmp_path / "profile.html"
    options = [
        "--prompt-tokens",
        "8",
        "--decode-tokens",
        "3",
        "--repeat",
        "2",
    ]  # the pool of this process stays
    command = ["bench", "--profile", str(tiny_bundle.path), *options]
    assert main([*command, "--json", str(output), "--html", str(page)]) == 0
    data = json.loads(output.read_text())
    (row,) = data["rows"]
    assert (data["schema"], row["prompt_tokens"], row["threads"] > 0) == ("edgellama.profile/1", 8, True)
    assert [part["part"] for part in row["parts"]] == [*PARTS, "outside"]
    assert sum(part["share"] for part in row["parts"]) == pytest.approx(1)
    # Operators of the tiny model take less than XNNPACK's microsecond, so a part may have no time.
    assert all(0 <= part["seconds"]["low"] <= part["seconds"]["high"] for part in row["parts"])
    assert row["parts"][0]["seconds"]["low"] > 0 and row["parts"][2]["seconds"]["low"] > 0
    assert row["covered"] == pytest.approx(sum(part["share"] for part in row["parts"][:-1]))
    text = page.read_text()
    assert text.count("<svg role") == 1 and "Where the time goes" in text and "custom" not in text


def test_a_runtime_without_the_tracer_is_refused(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(executorch_versions, "version", lambda name: "1.4.0")
    assert main(["bench", "--profile", str(tiny_bundle.path)]) == 2
    err = capsys.readouterr().err
    assert "ExecuTorch 1.4.0 has no event tracer" in err and "pip install 'executorch==1.5.1'" in err
