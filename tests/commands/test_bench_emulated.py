"""Instructions on emulated Arm. Skipped, with the reason, without an emulator that counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgellama.bundle import Bundle
from edgellama.cli import main
from edgellama.commands.bench import candidates
from edgellama.commands.bench_emulated import count_instructions
from edgellama.emulator.counter import counter
from edgellama.emulator.installed import find_emulator
from edgellama.errors import EdgellamaError, MissingDependencyError, UsageError


def reason() -> str | None:
    """The reason why nothing can be counted here; None if it can."""
    try:
        counter(find_emulator())
    except EdgellamaError as error:
        return f"{error.message}. {error.remedy}"
    return None


REASON = reason()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.slow
def test_counts_grow_with_the_prompt_and_repeat(tiny_bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "counts.json"
    options = ["--prompt-tokens", "8", "--prompt-tokens", "32", "--decode-tokens", "3"]
    assert main(["bench", str(tiny_bundle.path), "--emulate", "arm64", *options, "--json", str(output)]) == 0
    data = json.loads(output.read_text())
    short, long = data["rows"]
    assert data["schema"] == "edgellama.instructions/1" and data["decode_tokens"] == 3
    assert short["name"] == "xnnpack" and short["processor"] == "cortex-a76"
    assert 1e5 < short["prefill_instructions"] < long["prefill_instructions"]
    decode = long["decode_instructions"]
    assert 1e5 < decode["low"] <= decode["median"] <= decode["high"] < 1.2 * decode["low"]
    assert decode["median"] < short["prefill_instructions"]


def test_an_emulator_is_needed(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLAMA_EMULATOR", str(tmp_path))
    with pytest.raises(MissingDependencyError):
        count_instructions(candidates([tiny_bundle], None), ["arm64"])
    with pytest.raises(UsageError):
        count_instructions(candidates([tiny_bundle], None), ["x86"])
