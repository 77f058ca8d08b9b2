"""Clients of a bundle's tokenizer.json: rewritten forms are equal, and ExecuTorch's tokenizer gives the same ids."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from edgellama.checkpoints.gguf_tokenizer import rebuild_tokenizer
from edgellama.text.probes import PROBES
from edgellama.text.tokenizer_clients import client_notes, readable
from tests.helpers.gguf_models import byte_level_metadata, trained_bpe
from tests.helpers.odd_checkpoints import CORPUS, llama3_bpe

TEXTS = [
    *PROBES,
    "<s>Hello</s> world",
    "a</s>b c",
    " Hello",
    "▁x ▁▁ y",
    "</s> x</s>",
    "12345 x² HelloWORLD don't",
]


def metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece-like BPE as transformers 5 saves it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    data["pre_tokenizer"]["split"] = split
    return data


def unigram() -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


def gguf(pre: str) -> dict[str, Any]:
    return json.loads(rebuild_tokenizer(byte_level_metadata(trained_bpe(), pre)).files["tokenizer.json"])  # type: ignore[no-any-return]


def executorch(data: bytes, directory: Path) -> Any:
    """ExecuTorch's tokenizer of this tokenizer.json. Raises RuntimeError if it cannot load it."""
    (directory / "tokenizer.json").write_bytes(data)
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = import_module("pytorch_tokenizers").CppHFTokenizer()
    tokenizer.load(str(directory))
    return tokenizer


def of_metaspace_alone() -> dict[str, Any]:
    """A model without byte tokens, whose decoder is Metaspace too."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *PROBES], trainer)
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


REWRITTEN = {
    "metaspace alone": of_metaspace_alone(),
    "always": metaspace("always", split=False),
    "always, split": metaspace("always", split=True),
    "never": metaspace("never", split=False),
    "never, split": metaspace("never", split=True),
    "deepseek-llm": gguf("deepseek-llm"),
    "deepseek-coder": gguf("deepseek-coder"),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten_forms_are_equal_and_load_in_executorch(name: str, tmp_path: Path) -> None:
    before = json.dumps(REWRITTEN[name]).encode()
    after = readable(before)
    assert after != before and readable(after) == after
    one, other = (tokenizers.Tokenizer.from_str(data.decode()) for data in (before, after))
    theirs = executorch(after, tmp_path)
    for text in TEXTS:
        ids = one.encode(text, add_special_tokens=False).ids
        assert other.encode(text, add_special_tokens=False).ids == ids, text
        assert other.decode(ids) == one.decode(ids), text
        assert list(theirs.encode(text)) == ids, text
    assert not any("ExecuTorch" in note for note in client_notes(after))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "tekken"])
def test_other_forms_stay_as_they_are_and_load(pre: str, tmp_path: Path) -> None:
    data = json.dumps(gguf(pre)).encode()
    assert readable(data) is data
    ours, theirs = tokenizers.Tokenizer.from_str(data.decode()), executorch(data, tmp_path)
    for text in TEXTS:
        assert list(theirs.encode(text)) == ours.encode(text, add_special_tokens=False).ids, text
    notes = client_notes(data)
    assert notes == (() if pre != "smollm" else notes[:1])


def whitespace() -> dict[str, Any]:
    tokenizer = llama3_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


UNREADABLE = {
    "first": (metaspace("first", split=False), "cannot load the pre-tokenizer Metaspace"),
    "unigram": (unigram(), "cannot load a Unigram model"),
    "whitespace": (whitespace(), "cannot load the pre-tokenizer Whitespace"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_executorch_cannot_load_is_named(name: str, tmp_path: Path) -> None:
    content, message = UNREADABLE[name]
    data = json.dumps(content).encode()
    assert readable(data) == data
    assert any(message in note and "ExecuTorch" in note for note in client_notes(data))
    with pytest.raises(RuntimeError, match="Failed to load"):
        executorch(data, tmp_path)


def test_a_normalizer_that_executorch_runs_otherwise_is_named(tmp_path: Path) -> None:
    tokenizer = llama3_bpe()
    tokenizer.normalizer = normalizers.NFC()
    data = tokenizer.to_str().encode()
    assert any("has no exact normalizer NFC" in note for note in client_notes(data))
    theirs = executorch(data, tmp_path)
    text = "na\u00efve caf\u00e9"
    assert list(theirs.encode(text)) != tokenizer.encode(text, add_special_tokens=False).ids


def test_a_form_that_would_not_be_equal_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellama.text.tokenizer_clients._equal", lambda before, after: False)
    data = json.dumps(REWRITTEN["always"]).encode()
    assert readable(data) is data
    assert any("Metaspace (prepend_scheme 'always')" in note for note in client_notes(data))


@pytest.mark.parametrize("pre", ["smollm", "deepseek-coder"])
def test_what_onnxruntime_genai_does_otherwise_is_named(pre: str) -> None:
    assert any("onnxruntime-genai" in note for note in client_notes(json.dumps(gguf(pre)).encode()))
