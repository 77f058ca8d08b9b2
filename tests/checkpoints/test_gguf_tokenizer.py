"""Tokenizers rebuilt from GGUF metadata, against the tokenizers that the metadata was made from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.gguf_tokenizer import rebuild_tokenizer
from edgellama.text.token_stream import BYTE_OF_CHARACTER
from edgellama.text.tokenizer_json import LLAMA3_SPLIT, TEKKEN_SPLIT
from edgellama.text.tokenizer_json import PRE_TOKENIZERS as BUILT
from tests.helpers.gguf_models import CORPUS, TEXTS, byte_level_metadata, smollm2, trained_bpe

PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": lambda: splits(LLAMA3_SPLIT),
    "falcon3": lambda: splits(LLAMA3_SPLIT),
    "smaug-bpe": lambda: splits(LLAMA3_SPLIT),
    "tekken": lambda: splits(TEKKEN_SPLIT),
    "deepseek-coder": lambda: splits(
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", digits=True
    ),
}
IGNORE_MERGES = ("llama-bpe", "falcon3", "tekken")


def splits(*regexes: str, digits: bool = False) -> Any:
    """Regexes in sequence, each match alone, as in the models' tokenizer.json."""
    pre = tokenizers.pre_tokenizers
    return pre.Sequence(
        [
            *(pre.Split(tokenizers.Regex(regex), "isolated") for regex in regexes),
            *([pre.Digits(individual_digits=True)] if digits else []),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# Words of "HelloWORLD don't 12345 x²  你好，世界\r\n\n  ½ !?—“q” Ա·ա" by each pre-tokenizer's rules.
WORDS = {
    "tekken": "Hello|WORLD| don|'t| |1|2|3|4|5| x|²| | 你好|，世界|\r\n\n| | |½| !?—“|q|”| Ա|·ա",
    "deepseek-llm": "HelloWORLD| don|'|t| |1|2|3|4|5| x|²|  |你好|，|世界|\r|\n|\n|  |½| !?|—|“|q|”| Ա|·ա",
    "deepseek-coder": "HelloWORLD| don|'|t| |1|2|3|4|5| x|²| | |你好|，|世界|\r|\n|\n|  |½| !?|—“|q|”| Ա|·|ա",
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_ids_are_those_of_the_original(pre: str) -> None:
    trained = json.loads(trained_bpe().to_str())
    # This word is in the vocabulary, but no merge makes it. Only ignore_merges finds it.
    trained["model"]["merges"] = [pair for pair in trained["model"]["merges"] if "".join(pair) != "Ġdays"]
    trained["model"]["ignore_merges"] = pre in IGNORE_MERGES
    original = tokenizers.Tokenizer.from_str(json.dumps(trained))
    metadata = byte_level_metadata(original, pre)
    original.pre_tokenizer = PRE_TOKENIZERS[pre]()
    original.add_special_tokens(["<|begin|>", "<|end|>"])
    original.add_tokens(["<tool>"])
    rebuilt = rebuild_tokenizer(metadata)
    for text in [*CORPUS, *TEXTS]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text, add_special_tokens=False) == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)
    days = rebuilt.encode(" days", add_special_tokens=False)
    assert (days == [metadata["tokenizer.ggml.tokens"].index("Ġdays")]) == (pre in IGNORE_MERGES)
    assert rebuilt.decode(rebuilt.encode("<|begin|>a<tool>")) == "a<tool>"
    assert (rebuilt.bos_token, rebuilt.eos_token, rebuilt.chat_template) == ("<|begin|>", "<|end|>", None)


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_those_of_the_model_s_rules(pre: str) -> None:
    data = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    built = tokenizers.Tokenizer.from_str(json.dumps(data | {"pre_tokenizer": BUILT[pre]}))
    expected = WORDS[pre].split("|")
    words = built.pre_tokenizer.pre_tokenize_str("".join(expected))
    assert [bytes(BYTE_OF_CHARACTER[c] for c in word).decode() for word, _ in words] == expected


def test_a_name_that_adds_bos_adds_none_to_a_file_without_one() -> None:
    """Falcon3 has no bos. llama.cpp would add the token 11 there; Hugging Face adds none."""
    metadata = byte_level_metadata(trained_bpe(), "falcon3")
    del metadata["tokenizer.ggml.bos_token_id"]
    rebuilt = rebuild_tokenizer(metadata)
    assert rebuilt.encode("x") == rebuilt.encode("x", add_special_tokens=False)


def test_the_pre_tokenizer_matters() -> None:
    """Guards the test above: the three pre-tokenizers give different ids for this text."""
    text = "The year 20245 has 365 days"
    names = ("gpt-2", "smollm", "llama-bpe")
    ids = [rebuild_tokenizer(byte_level_metadata(trained_bpe(), pre)).encode(text) for pre in names]
    assert len({tuple(i) for i in ids}) == 3


def test_all_names_of_llama_3_s_pre_tokenizer_give_one_file() -> None:
    files = [
        rebuild_tokenizer(byte_level_metadata(trained_bpe(), pre)).files["tokenizer.json"]
        for pre in ("llama-bpe", "llama3", "llama-v3")
    ]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("pre", "keys", "expected"),
    [
        ("smollm", {}, ["x"]),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, ["<|begin|>", "x"]),
        ("llama-bpe", {}, ["<|begin|>", "x"]),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, ["x"]),
        ("smollm", {"tokenizer.ggml.add_eos_token": True}, ["x", "<|end|>"]),
        (
            "smollm",
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True},
            ["<|begin|>", "x", "<|end|>"],
        ),
    ],
)
def test_tokens_added_to_every_text(pre: str, keys: dict[str, Any], expected: list[str]) -> None:
    metadata = byte_level_metadata(trained_bpe(), pre) | keys
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = rebuild_tokenizer(metadata)
    assert [tokens[i] for i in tokenizer.encode("x")] == expected
    assert [tokens[i] for i in tokenizer.encode("x", add_special_tokens=False)] == ["x"]


def test_padding_of_the_vocabulary_adds_no_token() -> None:
    metadata = byte_level_metadata(trained_bpe(), "gpt-2")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{size}]", f"[PAD{size + 1}]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    assert rebuild_tokenizer(metadata).size == size


def trained_sentencepiece(*, prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """Small SentencePiece BPE, with or without a space before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(original: sentencepiece.SentencePieceProcessor, *, prefix: bool) -> dict[str, Any]:
    """Metadata of GGUF for a SentencePiece model, with llama.cpp's numbers for kinds of tokens."""
    ids = range(original.vocab_size())
    kinds = {2: original.is_unknown, 3: original.is_control, 5: original.is_unused, 6: original.is_byte}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(original.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": [next((k for k, is_k in kinds.items() if is_k(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
        **({} if prefix else {"tokenizer.ggml.add_space_prefix": False}),
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_the_original(prefix: bool) -> None:
    original = trained_sentencepiece(prefix=prefix)
    rebuilt = rebuild_tokenizer(sentencepiece_metadata(original, prefix=prefix))
    for text in [*CORPUS, *TEXTS]:
        ids = original.encode(text)
        assert rebuilt.encode(text, add_special_tokens=False) == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)
    # llama.cpp's default for this kind: bos is added, eos is not.
    assert rebuilt.encode("fox") == [original.bos_id(), *original.encode("fox")]
    assert rebuilt.encode("fox</s>")[-1] == original.eos_id()
    assert rebuilt.decode([original.bos_id(), *original.encode("fox"), original.eos_id()]) == "fox"


def test_sentencepiece_vocabulary_padded_to_the_embedding() -> None:
    original = trained_sentencepiece(prefix=True)
    metadata = sentencepiece_metadata(original, prefix=True)
    size = original.vocab_size()
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{size}]", f"[PAD{size + 1}]"]
    metadata["tokenizer.ggml.scores"] += [-10000.0] * 2
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    assert rebuild_tokenizer(metadata).size == size


def test_smollm2_in_executorch_s_tokenizer(tmp_path: Path) -> None:
    """ExecuTorch's text runner reads the same tokenizer.json with its own C++ code."""
    from pytorch_tokenizers import CppHFTokenizer

    tokenizer = open_checkpoint(smollm2()).tokenizer
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    runner = CppHFTokenizer()
    runner.load(str(tmp_path))
    assert (runner.bos_tok(), runner.eos_tok()) == (1, 2)
    for text in [*CORPUS, *TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]:
        assert runner.encode(text, 0, 0) == tokenizer.encode(text), text
