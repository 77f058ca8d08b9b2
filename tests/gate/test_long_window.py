"""Tests of the long window: its text, its calls, and the noise that single calls are judged by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgellama.bundle.golden import GoldenSequence
from edgellama.checkpoints import Checkpoint
from edgellama.gate.golden import PREFILL_PIECE, feed
from edgellama.gate.limits import LONGEST
from edgellama.gate.long_window import calls, long_text, run_long
from edgellama.gate.noise import Noise, geometric_mean
from edgellama.runtimes.base import Logits, Runtime
from edgellama.text.windows import default_texts


class Recorder(Runtime):
    """A runtime that notes its calls as (tokens, position)."""

    name = "recorder"
    vocab_size = 4

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.calls: list[tuple[int, int]] = []

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        self.calls.append((len(tokens), position))
        return np.full(4, position + len(tokens) - 1, np.float32)


@pytest.mark.parametrize("context", [8, 9, 63, 64, 128, 511, 2048, LONGEST, *range(LONGEST + 1, LONGEST + 5)])
def test_the_whole_context_is_fed_and_its_last_two_positions_are_compared(context: int) -> None:
    runtime = Recorder(context)
    run = run_long(runtime, [1] * context)
    assert runtime.position == context and run.positions[-2:] == (context - 2, context - 1)
    assert run.logits[:, 0].tolist() == list(run.positions), "each row is that of its position"
    if context == 2048:
        assert {length for length, _ in runtime.calls} >= {64, 65, 100, 127, 128, 129, 255, 257, 512}
        assert [length for length, _ in runtime.calls[-64:]] == [1] * 64


def test_calls_of_64_and_more_begin_at_odd_offsets() -> None:
    starts = np.cumsum([0, *calls(1984)])
    odd = {length for length, start in zip(calls(1984), starts, strict=False) if start % 2}
    assert odd >= {64, 65, 100, 128, 129}


@pytest.mark.parametrize("length", [8, 20, 128, 2048, 5000])
def test_the_text_repeats_its_digits_at_the_end(length: int, tiny_checkpoint: Checkpoint) -> None:
    tokenizer = tiny_checkpoint.tokenizer
    tokens = long_text(tokenizer, default_texts(), length)
    start = len(tokenizer.encode(""))
    repeated = length // 16
    assert len(tokens) == length and tokens == long_text(tokenizer, default_texts(), length)
    assert tokens[length - repeated :] == tokens[start : start + repeated]
    if repeated > 100:
        text = tokenizer.decode(tokens[-repeated:])
        assert sum(character.isdigit() for character in text) > len(text) / 2


def test_golden_prefill_comes_in_pieces_of_the_apps() -> None:
    runtime, tokens = Recorder(2000), tuple([1] * 1100)
    rows = feed(runtime, GoldenSequence("long", "", True, None, tokens, 1090))
    expected = [(PREFILL_PIECE, 0), (PREFILL_PIECE, 512), (67, 1024), *((1, n) for n in range(1091, 1100))]
    assert runtime.calls == expected and rows[:, 0].tolist() == list(range(1090, 1100))


def test_noise_of_positions_and_of_runs() -> None:
    noise = Noise.of([np.array([1e-8, 1e-8, 1e-2, 1e-8, 1e-6, 1e-6, 1e-6, 1e-6])])
    assert noise.position == 1e-2 and noise.run == pytest.approx(1e-6)
    assert geometric_mean(np.array([0.0, 1.0])) == pytest.approx(1e-6)
    assert np.isnan(geometric_mean(np.array([np.nan, 1.0])))
    assert Noise(0.0, 0.0).limits(1e-4) == Noise(1e-4, 1e-4)
