"""Tokens that stand outside tokenizer.json, the pad token, and flags of a lone tokenizer.model, as in transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from edgellama.checkpoints import open_checkpoint
from edgellama.errors import TokenizerError
from edgellama.text.chat import ChatTemplate
from edgellama.text.probes import PROBES
from edgellama.text.tokenizer import Tokenizer
from tests.helpers.odd_checkpoints import CORPUS, EOS, IM_END, IM_START, llama3_bpe, write_checkpoint

SIZE = llama3_bpe(()).get_vocab_size(with_added_tokens=True)
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
DECODER = {
    str(SIZE): {"content": IM_START, **FLAGS},
    str(SIZE + 1): {"content": IM_END, **FLAGS, "special": False, "rstrip": True},
}
TEXT = "<|im_start|>user\nHi there<|im_end|>  <tool>\nx <|im_end|> y"

Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "added_tokens_decoder": ({"added_tokens_decoder": DECODER}, {}),
    "added_tokens.json": ({}, {"added_tokens.json": {IM_START: SIZE, IM_END: SIZE + 1}}),
    "added_tokens.json, special": (
        {"additional_special_tokens": [IM_START, IM_END]},
        {"added_tokens.json": {IM_START: SIZE, IM_END: SIZE + 1, "<tool>": SIZE + 2}},
    ),
    "special tokens without ids": ({"extra_special_tokens": [IM_START, IM_END]}, {}),
    "special_tokens_map.json": (
        {},
        {
            "special_tokens_map.json": {"eos_token": {"content": EOS, **FLAGS}, "unk_token": IM_START},
            "added_tokens.json": {IM_START: SIZE},
        },
    ),
    "a decoder hides the older files": (
        {"added_tokens_decoder": {str(SIZE): DECODER[str(SIZE)]}},
        {"added_tokens.json": {"<tool>": SIZE + 1}},
    ),
    "nothing outside": ({}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config, files = CASES[name]
    directory = write_checkpoint(
        tmp_path / "model", tokenizer=llama3_bpe(()), rows=SIZE + 3, tokenizer_config=config, files=files
    )
    theirs = AutoTokenizer.from_pretrained(str(directory))
    ours = open_checkpoint(directory).tokenizer
    ids = theirs.encode(TEXT)
    assert ours.encode(TEXT) == ids
    for special in (False, True):
        assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(
            ids, skip_special_tokens=special
        )
    bundle = tmp_path / "tokenizer"
    bundle.mkdir()
    for file, data in ours.files.items():
        (bundle / file).write_bytes(data)
    again = Tokenizer.from_directory(bundle)
    assert again.encode(TEXT) == ids
    assert again.files == ours.files and again.notes == ()
    assert bool(Tokenizer.from_directory(directory).notes) == (name != "nothing outside")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {IM_START: SIZE + 5}}, f"gives id {SIZE + 5} .* would get id {SIZE}"),
        (
            {"added_tokens.json": {IM_START: 3}},
            "gives id 3 to '<|im_start|>', and tokenizer.json gives it to",
        ),
        ({"added_tokens.json": {IM_START: "3"}}, "has id '3', expected a number"),
    ],
)
def test_ids_that_cannot_be_given_are_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tokenizer=llama3_bpe(()), rows=SIZE + 9, files=files)
    with pytest.raises(TokenizerError, match=message.replace("|", r"\|")):
        open_checkpoint(directory)


@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens_decoder"])
def test_a_pad_token_beyond_the_embedding_is_left_out(place: str, tmp_path: Path) -> None:
    inside = place == "tokenizer.json"
    decoder = {} if inside else {"added_tokens_decoder": {str(SIZE): {"content": "[PAD]", **FLAGS}}}
    directory = write_checkpoint(
        tmp_path / "model",
        tokenizer=llama3_bpe(("[PAD]",) if inside else ()),
        rows=SIZE,
        tokenizer_config={"pad_token": "[PAD]", **decoder},
    )
    checkpoint = open_checkpoint(directory)
    assert any("pad token [PAD]" in note and "left out" in note for note in checkpoint.notes)
    assert max(checkpoint.tokenizer.encode("a [PAD] b")) < SIZE
    for name, data in checkpoint.tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    assert Tokenizer.from_directory(tmp_path).size == SIZE


def test_another_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tokenizer=llama3_bpe((IM_END,)), rows=SIZE)
    with pytest.raises(TokenizerError, match=f"token ids up to {SIZE}, the model only {SIZE} embeddings"):
        open_checkpoint(directory)


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_padding_of_any_size_is_noted(extra: int, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tokenizer=llama3_bpe(()), rows=SIZE + extra)
    notes = [note for note in open_checkpoint(directory).notes if "padding" in note]
    assert notes == ([f"{extra} of {SIZE + extra} embedding rows have no token (padding)"] if extra else [])


def test_a_bos_id_of_another_token_is_noted(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", config={"bos_token_id": 5})
    assert any(
        "bos_token_id is 5, and the tokenizer's bos_token" in n for n in open_checkpoint(directory).notes
    )


def test_templates_see_every_special_token(tmp_path: Path) -> None:
    template = "{{ pad_token }}|{{ unk_token }}|{{ tool_token }}|{{ bos_token }}|{{ sep_token is defined }}"
    tokens = {"pad_token": EOS, "unk_token": EOS, "tool_token": IM_END}
    directory = write_checkpoint(tmp_path / "model", tokenizer_config={"chat_template": template, **tokens})
    rendered = ChatTemplate.of(open_checkpoint(directory).tokenizer).render(
        [{"role": "user", "content": "x"}]
    )
    theirs = AutoTokenizer.from_pretrained(str(directory))
    assert rendered == theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert rendered == f"{EOS}|{EOS}|{IM_END}|<|begin_of_text|>|False"


def sentencepiece_directory(directory: Path, **config: Any) -> int:
    """Replaces tokenizer.json by a tokenizer.model. Returns the number of pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | config))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return int(processor.get_piece_size())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tokenizer_class": None},
        {"tokenizer_class": None, "add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": True, "legacy": False},
        {"add_bos_token": True, "legacy": True},
        {"add_bos_token": True, "add_prefix_space": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("added", [False, True])
def test_flags_of_a_lone_tokenizer_model(config: dict[str, Any], added: bool, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", config={"bos_token_id": 1, "eos_token_id": 2}, rows=450)
    count = sentencepiece_directory(directory, **config)
    if added:
        (directory / "added_tokens.json").write_text(json.dumps({IM_START: count, IM_END: count + 1}))
    theirs = AutoTokenizer.from_pretrained(str(directory))
    ours = open_checkpoint(directory).tokenizer
    texts = [*PROBES, "Hello world", "a</s>b c", "a</s> b", "def f(x):\n    return"]
    if added:
        texts += ["<|im_start|>user\nHello<|im_end|>\n", "x <|im_end|> y"]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    if added:
        assert {count, count + 1} <= set(ours.encode("x<|im_start|>user\nHello<|im_end|>\n"))
