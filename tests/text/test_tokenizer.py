"""Tokenizer against transformers and ExecuTorch's own, its stream against decode, and its refusals."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers

from edgellama.errors import TokenizerError
from edgellama.model.config import LlamaConfig
from edgellama.text.tokenizer import Tokenizer, missing_merges
from edgellama.text.tokenizer_json import PRE_TOKENIZERS, AddedToken, byte_level_bpe_json, sentencepiece_json
from tests.helpers.paths import DATA, TINY

CORPUS = (
    "",
    " ",
    "\n",
    "Hello, world!",
    "It's 12345 o'clock; we'll see 3.14159 and 1,000,000.",
    "  two leading and two trailing  ",
    "a" * 50,
    "tabs\tand\r\nline\n\n\nends\n",
    *(" " * n + "x" for n in range(1, 20)),
    "def f(x: int) -> dict:\n    return {'a': [1, 2.5e-3]}  # done\n\n\n",
    "naïve café “quotes” … ½ × Ångström ﬁ",
    "e\u0301 a\u0308\u0323 combining, \u200bzero width\u200d, \u00a0no-break\u3000wide",
    "你好，世界。日本語のテキスト 한국어 ไทย हिन्दी עברית العربية ٣٤ Ⅳ",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji 🙂🙂 𝔘𝔫𝔦",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>",
    "<s>[INST] hello </s> <unk> <|eot_id|><|endoftext|><tool>",
    "▁ underline ▁▁ <0x0A> Ġ ĠĊ",
    "null\x00and\x1bescape\x7f",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def training_text() -> str:
    return (DATA / "evaluation_persuasion.txt").read_text()[:30000] + " 你好🙂é\n" * 40


def byte_level(*, pre_tokenizer: str, ignore_merges: bool = False, add_bos: str | None = None) -> bytes:
    """tokenizer.json of a small byte-level BPE, rebuilt by edgellama."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([training_text()], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    added = [AddedToken(vocab[token], token) for token in SPECIAL]
    # Not special, so decoding shows it. Its characters stand for no bytes of the vocabulary.
    added.append(AddedToken(len(vocab), "<tööl →>", special=False))
    return byte_level_bpe_json(
        vocab,
        [tuple(merge) for merge in model["merges"]],
        pre_tokenizer=pre_tokenizer,
        added_tokens=added,
        add_bos=add_bos,
        ignore_merges=ignore_merges,
    )


def sentencepiece_model(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text().split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_based(*, add_space_prefix: bool) -> bytes:
    """tokenizer.json of a small SentencePiece BPE, rebuilt by edgellama."""
    model = sentencepiece_model(add_dummy_prefix=add_space_prefix)
    kinds = {0: 2, 1: 3, 2: 3} | {i: 6 for i in range(3, 259)}  # unknown, control, bytes
    count = model.get_piece_size()
    pieces = [(model.id_to_piece(i), model.get_score(i), kinds.get(i, 1)) for i in range(count)]
    return sentencepiece_json(
        pieces,
        add_space_prefix=add_space_prefix,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        add_bos=True,
        add_eos=False,
    )


KINDS: dict[str, Callable[[], bytes]] = {
    "gpt-2": lambda: byte_level(pre_tokenizer="gpt-2"),
    "smollm": lambda: byte_level(pre_tokenizer="smollm"),
    "llama-bpe": lambda: byte_level(pre_tokenizer="llama-bpe", ignore_merges=True, add_bos="<|endoftext|>"),
    "sentencepiece": lambda: sentencepiece_based(add_space_prefix=True),
    "sentencepiece without prefix": lambda: sentencepiece_based(add_space_prefix=False),
    "tiny_llama": lambda: (TINY / "tokenizer.json").read_bytes(),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def source(kind: str) -> bytes:
    """tokenizer.json of that kind, made once."""
    return KINDS[kind]()


def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer({"tokenizer.json": source(kind)})


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    pools = (
        "abc XYZ'st12345.,-",
        " \n\t\r\u00a0\u3000",
        "éüñ你好🙂👩\u200d\u0301",
        "".join(chr(c) for c in range(0x20, 0x2FF)),
    )
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(40))) for _ in range(count)]


@each_kind
def test_encode_and_decode_as_transformers_do(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(source(kind))
    file = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    ours = tokenizer_of(kind)
    for text in (*CORPUS, *random_texts(300)):
        for special in (False, True):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(
                ids, skip_special_tokens=special
            ), text


@each_kind
def test_phone_runner_splits_alike(kind: str, tmp_path: Path) -> None:
    """ExecuTorch's C++ tokenizer reads the same tokenizer.json."""
    ours = tokenizer_of(kind)
    for name, data in ours.files.items():
        (tmp_path / name).write_bytes(data)
    theirs = import_module("pytorch_tokenizers").CppHFTokenizer()
    theirs.load(str(tmp_path))
    for text in CORPUS:
        assert theirs.encode(text) == ours.encode(text, add_special_tokens=False), text


@each_kind
def test_stream_equals_decode(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    rng = random.Random(1)
    sequences = [tokenizer.encode(text) for text in (*CORPUS, *random_texts(100))]
    sequences += [[rng.randrange(tokenizer.size + 2) for _ in range(rng.randrange(30))] for _ in range(600)]
    # Bytes only: characters cut short, continued wrongly, and never begun.
    singles = [i for i in range(tokenizer.size) if "\ufffd" in tokenizer.decode([i])]
    sequences += [[rng.choice(singles) for _ in range(rng.randrange(9))] for _ in range(600)]
    for ids in sequences:
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids), ids


@each_kind
def test_stream_holds_back_only_uncertain_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("It is a truth universally acknowledged, that  a single man, in possession")
    stream, text = tokenizer.stream(), ""
    for count, token in enumerate(ids, start=1):
        text += stream.push(token)
        assert text == tokenizer.decode(ids[:count])


@each_kind
def test_stream_never_shows_half_an_emoji(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("👩‍👩‍👧‍👦 ok 🏳️‍🌈 ok")
    assert any("\ufffd" in tokenizer.decode(ids[:n]) for n in range(len(ids))), (
        "no emoji is split: a weak test"
    )
    stream = tokenizer.stream()
    assert not any("\ufffd" in stream.push(token) for token in ids)


def test_a_special_token_written_in_text_is_that_token() -> None:
    tokenizer = tokenizer_of("smollm")
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.token_id("<|im_end|>") in ids
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"
    assert tokenizer.token_id("<|no such|>") is None


def test_truncation_and_padding_of_the_file_are_not_obeyed() -> None:
    data = json.loads(source("smollm"))
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    text = "a longer text than three tokens"
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(data).encode()})
    assert tokenizer.encode(text) == tokenizer_of("smollm").encode(text)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', source("smollm")[:-200]],
    ids=["empty", "open", "list", "no model", "not UTF-8", "no vocab", "truncated"],
)
def test_a_damaged_tokenizer_json_is_refused(data: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer({"tokenizer.json": data})


def test_files_without_tokenizer_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer({"vocab.json": b"{}"})
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer_of("smollm").encode("a\ud800b")


def test_tokenizer_files_of_a_bundle_read_back_the_same(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        {"tokenizer.json": source("smollm")},
        chat_template="{{ bos_token }}{% for m in messages %}ü{% endfor %}\n",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    for name, data in tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    reread = Tokenizer.from_directory(tmp_path)
    assert reread.files == tokenizer.files
    for attribute in ("chat_template", "bos_token", "eos_token", "size"):
        assert getattr(reread, attribute) == getattr(tokenizer, attribute)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert theirs.encode(CORPUS[4]) == reread.encode(CORPUS[4])


def test_generation_config_ships_and_other_files_do_not(tmp_path: Path) -> None:
    for name in ("generation_config.json", "config.json", "README.md"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes(source("smollm"))
    shipped = Tokenizer.from_directory(tmp_path).files
    assert set(shipped) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


TEMPLATES: dict[str, tuple[dict[str, Any], str | None]] = {
    "none": ({}, None),
    "jinja file": ({"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "B"}}, "A"),
    "json file": (
        {"chat_template.json": {"chat_template": "A"}, "tokenizer_config.json": {"chat_template": "B"}},
        "A",
    ),
    "config": ({"tokenizer_config.json": {"chat_template": "B"}}, "B"),
    "list": (
        {
            "tokenizer_config.json": {
                "chat_template": [
                    {"name": "tool_use", "template": "T"},
                    {"name": "default", "template": "D"},
                ]
            }
        },
        "D",
    ),
}


def write(path: Path, files: dict[str, Any]) -> None:
    """Writes a valid tokenizer.json and `files`, text or JSON data, into a directory."""
    (path / "tokenizer.json").write_bytes(source("smollm"))
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_template_is_found(case: str, tmp_path: Path) -> None:
    files, expected = TEMPLATES[case]
    write(tmp_path, files)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.chat_template == expected
    assert tokenizer.files.get("chat_template.jinja") == (None if expected is None else expected.encode())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": "{"}, "not JSON"),
        ({"tokenizer_config.json": "[1]"}, "expected a JSON object"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template must be a string"),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "R"}]}},
            "'default'.*'rag'",
        ),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": [], "template": "R"}, {"name": {}}]}},
            "called 'default', found \\[\\]",
        ),
        ({"tokenizer_config.json": {"chat_template": "\ud800"}}, "chat template holds an unpaired surrogate"),
        ({"tokenizer_config.json": {"eos_token": "\ud800"}}, "eos_token holds an unpaired surrogate"),
        ({"tokenizer_config.json": {"bos_token": 5}}, "bos_token must be a string"),
        ({"special_tokens_map.json": {"eos_token": {"content": 1}}}, "eos_token must be a string"),
    ],
)
def test_damaged_files_beside_tokenizer_json_are_refused(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_bos_and_eos_as_text_or_object_from_either_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "tokenizer_config.json": {
                "bos_token": {"content": "<|im_start|>", "special": True},
                "eos_token": None,
            },
            "special_tokens_map.json": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        },
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def config(**changes: Any) -> LlamaConfig:
    base = LlamaConfig(
        vocab_size=tokenizer_of("smollm").size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
    )
    return replace(base, **changes)


def test_a_vocabulary_padded_a_little_fits() -> None:
    tokenizer = tokenizer_of("smollm")
    for extra in (0, 1, 1024):
        tokenizer.check_fits(config(vocab_size=tokenizer.size + extra, bos_token_id=1, eos_token_ids=(0, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 700}, "only 700 embeddings"),
        ({"vocab_size": 720, "bos_token_id": 710}, "bos_token_id is 710"),
        ({"eos_token_ids": (2, -1)}, "eos_token_ids? is -1"),
        ({"eos_token_ids": (2, 701)}, "eos_token_ids? is 701"),
    ],
)
def test_a_vocabulary_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    assert tokenizer_of("smollm").size == 701
    with pytest.raises(TokenizerError, match=message):
        tokenizer_of("smollm").check_fits(config(**changes))


def test_a_bos_token_that_is_not_in_the_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerError, match="bos_token is '<s>'"):
        Tokenizer({"tokenizer.json": source("smollm")}, bos_token="<s>").check_fits(config())


@each_kind
def test_a_missing_merge_is_named(kind: str) -> None:
    assert missing_merges(source(kind)) == []
    data = json.loads(source(kind))
    merges = data["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    product = "".join(pairs[len(pairs) // 2])
    data["model"]["merges"] = [m for m, pair in zip(merges, pairs, strict=True) if "".join(pair) != product]
    assert missing_merges(json.dumps(data).encode()) == [product]


def test_builders_refuse_tokenizers_that_they_cannot_build() -> None:
    with pytest.raises(
        TokenizerError, match=r"'deepseek' is not known.*'gpt-2', 'llama-bpe', 'smollm', 'tekken'"
    ):
        byte_level_bpe_json({"a": 0}, [], pre_tokenizer="deepseek")
    with pytest.raises(TokenizerError, match="no tokenizer can be built"):
        byte_level_bpe_json({"a": 0}, [("a", "b")], pre_tokenizer="gpt-2")
    with pytest.raises(TokenizerError, match="'<s>' has id 7 in the model and would get 1"):
        byte_level_bpe_json({"a": 0}, [], pre_tokenizer="gpt-2", added_tokens=[AddedToken(7, "<s>")])
    with pytest.raises(TokenizerError, match="'<s>' is to be added"):
        byte_level_bpe_json({"a": 0}, [], pre_tokenizer="gpt-2", add_bos="<s>")
    with pytest.raises(TokenizerError, match="'a' more than once"):
        sentencepiece_json(
            [("a", 0.0, 1), ("a", -1.0, 1)],
            add_space_prefix=True,
            bos_id=None,
            eos_id=None,
            unk_id=None,
            add_bos=False,
            add_eos=False,
        )


def test_digits_are_split_as_each_pre_tokenizer_says() -> None:
    ids = {}
    for name in PRE_TOKENIZERS:
        built = byte_level_bpe_json(
            {"1": 0, "11": 1, "111": 2, "1111": 3},
            [("1", "1"), ("11", "1"), ("111", "1")],
            pre_tokenizer=name,
        )
        ids[name] = Tokenizer({"tokenizer.json": built}).encode("1111")
    alone = {name: [0, 0, 0, 0] for name in ("smollm", "deepseek-llm", "deepseek-coder", "tekken")}
    assert ids == {"gpt-2": [1, 1], "llama-bpe": [2, 0], **alone}


def test_the_package_needs_neither_transformers_nor_torch_here() -> None:
    code = (
        "import sys, edgellama.text.tokenizer, edgellama.text.chat, edgellama.text.tokenizer_model;"
        "print([m for m in ('torch', 'transformers', 'sentencepiece') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
