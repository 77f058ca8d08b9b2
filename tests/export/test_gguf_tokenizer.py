"""Tokenizers in GGUF files: llama.cpp gives the same ids and stops at the same tokens, or the export refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from edgellama.checkpoints import Checkpoint
from edgellama.errors import TokenizerError
from edgellama.export.gguf.lower import _add
from edgellama.export.gguf.tokenizer import END_TEXTS, INEXACT, INFILLING, NAMES, tokenizer_keys
from edgellama.export.plan import make_plan
from edgellama.model.config import LlamaConfig
from edgellama.recipe import RECIPES
from edgellama.runtimes.llama_cpp import LlamaModel
from edgellama.targets import TARGETS
from edgellama.text.probes import PROBES
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.tokenizer_json import PRE_TOKENIZERS, AddedToken, byte_level_bpe_json
from tests.helpers.gguf_models import CORPUS, TEXTS, tiny_config, trained_bpe

SHAPE = {
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
MARKUP = "<|begin|>user\nIt's 12345 <tool>x<|end|>\n <|begin|><|end|><tool><tool> 你好"


def vocabulary(path: Path, keys: Mapping[str, Any]) -> LlamaModel:
    """llama.cpp's tokenizer from a file with these keys and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**SHAPE, "llama.vocab_size": len(keys["tokenizer.ggml.tokens"]), **keys}.items():
        _add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return LlamaModel(path, vocabulary_only=True)


def byte_level(
    pre: str, *, ignore_merges: bool = False, add_bos: bool = False, add_eos: bool = False
) -> Tokenizer:
    model = json.loads(trained_bpe().to_str())["model"]
    count = len(model["vocab"])
    added = [
        AddedToken(count, "<|begin|>"),
        AddedToken(count + 1, "<|end|>"),
        AddedToken(count + 2, "<tool>", special=False),
        AddedToken(count + 3, "<reponame>"),
        AddedToken(count + 4, "<|turn|>"),
    ]
    data = byte_level_bpe_json(
        model["vocab"],
        [tuple(merge) for merge in model["merges"]],
        pre_tokenizer=pre,
        added_tokens=added,
        add_bos="<|begin|>" if add_bos else None,
        add_eos="<|end|>" if add_eos else None,
        ignore_merges=ignore_merges,
    )
    return Tokenizer({"tokenizer.json": data}, bos_token="<|begin|>", eos_token="<|end|>")


def config_of(tokenizer: Tokenizer, stops: tuple[str, ...] = ("<|end|>",), padding: int = 3) -> LlamaConfig:
    ids = tuple(tokenizer.token_id(text) for text in stops)
    return tiny_config(vocab_size=tokenizer.size + padding, eos_token_ids=ids)


def assert_same(model: LlamaModel, tokenizer: Tokenizer) -> None:
    for text in (*PROBES, *TEXTS, *CORPUS, MARKUP):
        for add in (False, True):
            expected = tokenizer.encode(text, add_special_tokens=add)
            assert model.tokenize(text, add_special=add) == expected, (text, add)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        ("gpt-2", False, "gpt-2"),
        ("smollm", False, "smollm"),
        ("llama-bpe", True, "llama-bpe"),
        ("llama-bpe", False, "smaug-bpe"),
        ("deepseek-coder", False, "deepseek-coder"),
    ],
)
def test_byte_level_tokenizers(pre: str, ignore_merges: bool, name: str, add: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(pre, ignore_merges=ignore_merges, add_bos=add, add_eos=add)
    config = config_of(tokenizer, ("<|end|>", "<|turn|>"))
    tokenizer = tokenizer.fitted(config)  # in the form that the bundle ships
    keys = tokenizer_keys(tokenizer, config)
    assert keys["tokenizer.ggml.pre"] == name and keys["tokenizer.ggml.add_bos_token"] is add
    model = vocabulary(tmp_path / "v.gguf", keys)
    assert_same(model, tokenizer)
    assert model.ends() == sorted(config.eos_token_ids) and model.adds_bos is add


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(prefix: bool, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=buffer,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(buffer.getvalue())
    tokenizer = Tokenizer.from_directory(tmp_path)
    config = config_of(tokenizer, ("</s>",))
    keys = tokenizer_keys(tokenizer, config)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is prefix
    model = vocabulary(tmp_path / "v.gguf", keys)
    assert_same(model, tokenizer)
    assert model.ends() == list(config.eos_token_ids)


def test_texts_that_always_end_an_answer(tmp_path: Path) -> None:
    """The list follows src/llama-vocab.cpp. `<|end|>` is left out there, because of `<|return|>` and `<|call|>`."""
    infilling = sorted(set().union(*INFILLING.values()))
    texts = [*"abcdef", *sorted(END_TEXTS), *infilling, "</s>", "<|other|>"]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1] * 6 + [3] * (len(texts) - 6),
        "tokenizer.ggml.merges": ["a b"],
        **{f"tokenizer.ggml.{role}_token_id": 1 for role in ("eos", "eot", "eom", *INFILLING)},
    }
    model = vocabulary(tmp_path / "v.gguf", keys)
    assert {texts[i] for i in model.ends()} == {"b"} | END_TEXTS - {"<|end|>"}


Edit = Callable[[dict[str, Any]], object]
REFUSED: dict[str, tuple[Edit, str]] = {
    "regex": (
        lambda data: data["pre_tokenizer"]["pretokenizers"].pop(0),
        "its pre-tokenizer is none of gpt-2",
    ),
    "ignore_merges": (
        lambda data: data["model"].update(ignore_merges=True),
        "'smollm' not with ignore_merges",
    ),
    "normalizer": (lambda data: data.update(normalizer={"type": "NFC"}), "its normalizer is NFC"),
    "flag": (lambda data: data["added_tokens"][2].update(lstrip=True), "token '<tool>' has the flag lstrip"),
    "dropout": (lambda data: data["model"].update(dropout=0.1), "dropout 0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_have_is_refused_by_name(name: str) -> None:
    edit, words = REFUSED[name]
    tokenizer = byte_level("smollm")
    data = json.loads(tokenizer.files["tokenizer.json"])
    if name == "regex":
        data["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"})
        data["pre_tokenizer"]["pretokenizers"].reverse()
    edit(data)
    altered = Tokenizer({"tokenizer.json": json.dumps(data).encode()})
    with pytest.raises(TokenizerError, match=words):
        tokenizer_keys(altered, config_of(tokenizer))


def test_stop_tokens_take_the_keys_that_are_free(tmp_path: Path) -> None:
    tokenizer = byte_level("smollm")
    config = config_of(tokenizer, ("<|end|>", "<|turn|>", "<tool>"))
    keys = tokenizer_keys(tokenizer, config)
    roles = {role: keys[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")}
    assert list(roles.values()) == list(config.eos_token_ids)
    assert vocabulary(tmp_path / "v.gguf", keys).ends() == sorted(config.eos_token_ids)


def test_more_stop_tokens_than_keys_are_refused_by_name() -> None:
    tokenizer = byte_level("smollm")
    config = config_of(tokenizer, ("<|end|>", "<|turn|>", "<tool>", "<|begin|>"))
    with pytest.raises(TokenizerError, match=r"no key for the stop tokens '<\|begin\|>'"):
        tokenizer_keys(tokenizer, config)
    with pytest.raises(TokenizerError, match="no token ends an answer"):
        tokenizer_keys(tokenizer, replace(config, eos_token_ids=()))


def test_every_pre_tokenizer_has_a_name_or_is_refused() -> None:
    assert NAMES.keys() | INEXACT.keys() == PRE_TOKENIZERS.keys()
    for pre, words in (
        ("tekken", "knows capitals of ASCII only"),
        ("deepseek-llm", "leaves several digits together"),
    ):
        tokenizer = byte_level(pre, ignore_merges=pre == "tekken")
        with pytest.raises(TokenizerError, match=words):
            tokenizer_keys(tokenizer, config_of(tokenizer))


def test_a_plan_refuses_the_tokenizer_before_the_slow_part(tiny_checkpoint: Checkpoint) -> None:
    one = tiny_checkpoint.first_layers(1)
    broken = replace(one, config=replace(one.config, eos_token_ids=()))
    with pytest.raises(TokenizerError, match="target gguf cannot hold this tokenizer"):
        make_plan(broken, RECIPES["int8"], [TARGETS["gguf"]], 16)
    make_plan(broken, RECIPES["int8"], [TARGETS["xnnpack"]], 16)
