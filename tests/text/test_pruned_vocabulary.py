"""Pruned vocabularies: equal pieces for the corpus, pieces for any text, and the ids in every file."""

from __future__ import annotations

import json

import pytest

from edgellama import data
from edgellama.checkpoints import Checkpoint
from edgellama.errors import TokenizerError, UsageError
from edgellama.text.pruned_vocabulary import kept_ids, pruned
from edgellama.text.tokenizer import Tokenizer

CORPUS = [line for line in data.read_text("calibration_emma.txt").split("\n")[100:160] if line.strip()]


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.encode(text)]


def test_the_corpus_has_the_same_pieces_and_any_text_has_some(tiny_checkpoint: Checkpoint) -> None:
    whole = tiny_checkpoint.tokenizer
    found = pruned(whole, CORPUS, [5])
    small = found.tokenizer
    assert 256 < len(found.kept) < whole.size and small.size == len(found.kept)
    assert (
        found.kept[: found.seen] == tuple(sorted(found.kept[: found.seen])) and 5 in found.kept[: found.seen]
    )
    new_ids = found.new_ids
    for text in CORPUS:
        assert [new_ids[token] for token in whole.encode(text)] == small.encode(text)
        assert max(small.encode(text)) < found.seen
    for text in ("你好 🙂 zyzzyva", "def f(x):\n\treturn x ** 2", "\x00\x7f", CORPUS[0].upper()):
        ids = small.encode(text)
        assert small.decode(ids, skip_special_tokens=False) == text
        assert len(ids) >= len(whole.encode(text))
    assert kept_ids(small, whole, len(found.kept)) == found.kept


def test_a_merge_on_the_way_is_kept(tiny_checkpoint: Checkpoint) -> None:
    """Without the tokens between, the words of the corpus would fall into pieces."""
    whole = tiny_checkpoint.tokenizer
    word = next(
        text for text in (" something", " there", " would", " thought") if len(whole.encode(text)) == 1
    )
    found = pruned(whole, [word], [])
    assert len(found.tokenizer.encode(word)) == 1
    model = json.loads(found.tokenizer.files["tokenizer.json"])["model"]
    assert 0 < len(model["merges"]) < 12
    assert all("".join(pair) in model["vocab"] for pair in model["merges"])


def test_special_tokens_get_their_new_ids_in_every_file(tiny_checkpoint: Checkpoint) -> None:
    whole = tiny_checkpoint.tokenizer
    found = pruned(whole, CORPUS[:3], [])
    for text in whole.added_tokens:
        old, new = whole.token_id(text), found.tokenizer.token_id(text)
        assert old is not None and new is not None and found.kept[new] == old
    config = json.loads(found.tokenizer.files["tokenizer_config.json"])
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        assert found.tokenizer.token_id(token["content"]) == int(number)
    assert found.tokenizer.chat_template == whole.chat_template


def test_a_word_that_is_a_token_needs_no_merge(tiny_checkpoint: Checkpoint) -> None:
    """`ignore_merges`, as Llama 3 has it: whole words are looked up first."""
    contents = json.loads(tiny_checkpoint.tokenizer.files["tokenizer.json"])
    contents["model"]["ignore_merges"] = True
    files = {**tiny_checkpoint.tokenizer.files, "tokenizer.json": json.dumps(contents).encode()}
    files.pop("chat_template.jinja", None)
    whole = Tokenizer(files)
    found = pruned(whole, [" there there"], [])
    ordinary = pruned(tiny_checkpoint.tokenizer, [" there there"], [])
    assert len(found.kept) <= len(ordinary.kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["model"].update(type="WordLevel", unk_token="x"), "not byte-level BPE"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "not byte-level BPE"),
        (lambda d: d["model"]["vocab"].pop("~"), "no token for 1 of 256 bytes"),
    ],
)
def test_other_tokenizers_are_refused(tiny_checkpoint: Checkpoint, change: object, words: str) -> None:
    contents = json.loads(tiny_checkpoint.tokenizer.files["tokenizer.json"])
    change(contents)  # type: ignore[operator]

    class Changed(Tokenizer):
        def __init__(self) -> None:
            self.files = {"tokenizer.json": json.dumps(contents).encode()}

    with pytest.raises(UsageError, match=words):
        pruned(Changed(), ["a"], [])


def test_the_tokenizer_of_another_model(tiny_checkpoint: Checkpoint) -> None:
    whole = tiny_checkpoint.tokenizer
    found = pruned(whole, CORPUS[:3], [])
    with pytest.raises(TokenizerError, match="does not have"):
        kept_ids(whole, found.tokenizer, whole.size)
