"""Tokenizers rebuilt from Meta's tokenizer.model, against tiktoken and SentencePiece."""

from __future__ import annotations

import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken

from edgellama.errors import TokenizerError
from edgellama.text import tokenizer_json, tokenizer_model
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.tokenizer_json import LLAMA3_SPLIT
from edgellama.text.tokenizer_model import llama3_special_names, rebuild
from tests.helpers.meta_models import directory, ranks, tiktoken_file, training_text


@cache
def sentencepiece_file(**options: Any) -> bytes:
    """Small SentencePiece BPE with byte fallback and split digits, except for `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text().split("\n")),
        model_writer=model,
        vocab_size=900,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "split_digits": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "minloglevel": 2,
            "num_threads": 1,
            **options,
        },
    )
    return model.getvalue()


def texts() -> list[str]:
    """Spaces, pieces of the training text, and random mixtures of characters."""
    rng, source = random.Random(0), training_text()
    starts = [rng.randrange(len(source)) for _ in range(300)]
    pieces = [source[start : start + rng.randrange(120)] for start in starts]
    pool = "ab  \n\t1234🙂é,.-<你"
    mixed = ["".join(rng.choice(pool) for _ in range(rng.randrange(40))) for _ in range(300)]
    return ["", " ", "aaaaaaaaaaaa", *(" " * n for n in range(2, 40)), *pieces, *mixed]


def test_ranks_split_as_tiktoken_does(tmp_path: Path) -> None:
    special = {name: len(ranks()) + place for place, name in enumerate(llama3_special_names())}
    theirs = tiktoken.Encoding(
        "small", pat_str=LLAMA3_SPLIT, mergeable_ranks=dict(ranks()), special_tokens=special
    )
    ours = Tokenizer.from_directory(directory(tmp_path, tiktoken_file(ranks())))
    for text in (*texts(), "<|eot_id|>a<|reserved_special_token_247|> <|begin_of_text|>"):
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [special["<|begin_of_text|>"], *ids]
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert (ours.bos_token, ours.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_the_256_special_tokens_of_llama_3() -> None:
    names = llama3_special_names()
    published = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        2: "<|reserved_special_token_0|>",
        3: "<|reserved_special_token_1|>",
        4: "<|finetune_right_pad_id|>",
        5: "<|reserved_special_token_2|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
        11: "<|reserved_special_token_3|>",
        255: "<|reserved_special_token_247|>",
    }
    assert len(names) == len(set(names)) == 256
    assert {place: names[place] for place in published} == published


def test_a_word_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    """tiktoken looks up a whole word first. Llama 3 has tokens that no merge reaches."""
    extended = dict(ranks()) | {b"zqzq": len(ranks())}
    ours = Tokenizer.from_directory(directory(tmp_path, tiktoken_file(extended)))
    assert ours.encode("zqzq", add_special_tokens=False) == [len(ranks())]


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_pieces_split_as_sentencepiece_does(add_dummy_prefix: bool, tmp_path: Path) -> None:
    model = sentencepiece_file(add_dummy_prefix=add_dummy_prefix)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = Tokenizer.from_directory(directory(tmp_path, model))
    for text in texts():
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [theirs.bos_id(), *ids]
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_token, ours.eos_token, ours.size) == ("<s>", "</s>", 900)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": "<|x|>"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_sentencepiece_model_of_another_kind_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="rebuilt from this file would split"):
        rebuild(directory(tmp_path, sentencepiece_file(**options)) / "tokenizer.model")


def test_the_proof_catches_merges_in_the_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tokenizer_json.merges_of_scores
    monkeypatch.setattr(tokenizer_model, "merges_of_scores", lambda scores: sorted(right(scores)))
    with pytest.raises(TokenizerError, match="rebuilt from this file would split"):
        rebuild(directory(tmp_path, tiktoken_file(ranks())) / "tokenizer.model")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither tiktoken's text nor a SentencePiece model"),
        (b"\x00garbage\xff" * 50, "neither tiktoken's text nor a SentencePiece model"),
        (b"YQ== 0\nYg== one\n", "line 2 is not"),
        (b"YQ== 0\nYg== 2\n", "ranks are not 0 to 1"),
        (b"YQ== 0\nYg== 1\n", "no token for byte 0x00"),
    ],
)
def test_a_damaged_tokenizer_model_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        rebuild(directory(tmp_path, data) / "tokenizer.model")


def test_a_truncated_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError):
        rebuild(directory(tmp_path, sentencepiece_file()[:-3000]) / "tokenizer.model")
