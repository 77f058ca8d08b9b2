"""Tests of likelihoods, windows and stops for lm-evaluation-harness, against logits of the reference model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import UsageError
from edgellama.lm_eval import likelihood
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.text.tokenizer import Tokenizer

LENGTH = 32


@pytest.fixture(scope="module")
def runtime(tiny_checkpoint: Checkpoint) -> Runtime:
    return ReferenceRuntime(load_llama(tiny_checkpoint, LENGTH))


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 500, count)]


def expected(runtime: Runtime, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Log likelihood and greedy flag from one pass over all tokens, by torch's log_softmax."""
    runtime.reset()
    logits = runtime.forward_all([*context, *continuation][:-1])  # [context + continuation - 1, vocab_size]
    log_probabilities = logits.double().log_softmax(-1)[len(context) - 1 :]
    targets = torch.tensor(list(continuation))
    total = float(log_probabilities.gather(1, targets[:, None]).sum())
    return total, bool((log_probabilities.argmax(-1) == targets).all())


@pytest.mark.parametrize(("context", "continuation"), [(1, 1), (1, 5), (7, 1), (20, 12), (32, 1), (1, 32)])
def test_the_sum_of_log_softmax(context: int, continuation: int, runtime: Runtime) -> None:
    context_ids, continuation_ids = tokens(context), tokens(continuation, seed=1)
    total, greedy = likelihood.log_likelihood(runtime, context_ids, continuation_ids)
    assert total == pytest.approx(expected(runtime, context_ids, continuation_ids)[0], abs=1e-4)
    assert not greedy


def test_greedy_decoding_is_greedy(runtime: Runtime) -> None:
    context = tokens(5)
    runtime.reset()
    logits, generated = runtime.forward(context), []
    for _ in range(4):
        generated.append(int(logits.argmax()))
        logits = runtime.forward(generated[-1:])
    assert likelihood.log_likelihood(runtime, context, generated)[1]
    assert not likelihood.log_likelihood(runtime, context, [*generated[:3], generated[3] ^ 1])[1]
    assert likelihood.log_likelihood(runtime, context, []) == (0.0, True)


def test_a_long_context_is_cut_from_the_left(runtime: Runtime) -> None:
    """The context length limits the tokens that are fed. The last token of the continuation is not fed."""
    context, continuation = tokens(100), tokens(6, seed=1)
    total = likelihood.log_likelihood(runtime, context, continuation)[0]
    remaining = LENGTH + 1 - len(continuation)
    assert runtime.position == LENGTH
    assert total == pytest.approx(expected(runtime, context[-remaining:], continuation)[0], abs=1e-4)
    with pytest.raises(UsageError, match="33 tokens does not fit the context of 32"):
        likelihood.log_likelihood(runtime, context, tokens(33))
    with pytest.raises(UsageError, match="a token to begin with"):
        likelihood.log_likelihood(runtime, [], continuation)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 70, 100])
def test_windows_score_every_token_once(count: int) -> None:
    text = tokens(count)
    windows = list(likelihood.rolling_windows(text, 1, LENGTH))
    assert [token for _, continuation in windows for token in continuation] == text
    for context, continuation in windows:
        assert context and len(context) + len(continuation) - 1 <= LENGTH
    if count > LENGTH:
        assert windows[0][0] == [1] and windows[1][0][-1] == text[LENGTH - 1]


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 70, 100])
def test_windows_equal_those_of_the_harness(count: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", exc_type=ImportError)
    text = tokens(count)
    expected_windows = map(utils.make_disjoint_window, utils.get_rolling_token_windows(text, 1, LENGTH, 1))
    assert list(likelihood.rolling_windows(text, 1, LENGTH)) == list(expected_windows)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(tiny_checkpoint: Checkpoint) -> None:
    tokenizer = tiny_checkpoint.tokenizer
    for context, continuation in (
        ("The cat sat", " on the mat"),
        ("The cat sat ", "on the mat"),
        ("A\n\n", "b"),
    ):
        context_ids, continuation_ids = likelihood.encode_pair(tokenizer, context, continuation)
        assert [*context_ids, *continuation_ids] == likelihood.encode(tokenizer, context + continuation)
        assert context_ids == likelihood.encode(tokenizer, context.rstrip())
    assert likelihood.encode_pair(tokenizer, "The cat ", "sat") == likelihood.encode_pair(
        tokenizer, "The cat", " sat"
    )


def tokenizer_with_bos() -> Tokenizer:
    """A tokenizer that adds bos and eos to every text."""
    import json

    import tokenizers

    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "a": 1, "</s>": 2, "?": 3}, unk_token="?")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>", "</s>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    assert json.loads(model.to_str())
    return Tokenizer({"tokenizer.json": model.to_str().encode()}, bos_token="<s>", eos_token="</s>")


def test_bos_comes_once_and_eos_never() -> None:
    tokenizer = tokenizer_with_bos()
    assert tokenizer.encode("a a") == [0, 1, 1, 2]
    assert likelihood.encode(tokenizer, "a a") == [0, 1, 1]
    assert likelihood.encode(tokenizer, "<s>a a") == [0, 1, 1]
    assert likelihood.encode(tokenizer, "a a", add_bos=False) == [1, 1]
    assert likelihood.encode_pair(tokenizer, "a", " a") == ([0, 1], [1])


class Parrot(Runtime):
    """A runtime that generates a fixed sequence of tokens for any input."""

    name = "parrot"

    def __init__(self, answer: list[int], vocab_size: int) -> None:
        self.answer, self.vocab_size, self.context_length = answer, vocab_size, LENGTH
        self.prompt: list[int] = []
        self._next = 0

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        if position == 0:
            self.prompt, self._next = list(tokens), 0
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.answer[self._next % len(self.answer)]] = 1
        self._next += 1
        return logits


def test_text_ends_before_a_stop(tiny_checkpoint: Checkpoint) -> None:
    tokenizer = tiny_checkpoint.tokenizer
    answer = tokenizer.encode("one two\n\nthree four", add_special_tokens=False)
    parrot = Parrot([*answer, 2], tokenizer.size)

    def generate(until: list[str], max_tokens: int = 20, prompt: Sequence[int] = (5, 6, 7)) -> str:
        return likelihood.text_until(
            parrot,
            tokenizer,
            prompt,
            sample=lambda logits: int(logits.argmax()),
            until=until,
            max_tokens=max_tokens,
            stop_ids=[2],
        )

    assert generate([]) == "one two\n\nthree four"
    assert generate(["\n\n"]) == "one two"
    assert generate(["four", "three", ""]) == "one two\n\n"
    assert generate(["one"]) == ""
    assert tokenizer.encode(generate([], 2), add_special_tokens=False) == answer[:2]
    generate([], 20, prompt=tokens(50))
    assert parrot.prompt == tokens(50)[-(LENGTH - 20) :], "the prompt loses its beginning"
    with pytest.raises(UsageError, match="32 tokens are to be generated"):
        generate([], 32)
