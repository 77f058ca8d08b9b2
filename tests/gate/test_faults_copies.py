"""Planted faults in copies: tokenizer, chat template and client files, each found by the check that is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.gate.copies import check_tokenizer, check_tokenizer_files
from tests.helpers.altered_bundles import Alter, altered, edit_file, edit_json, edit_manifest, write
from tests.helpers.one_layer_bundle import Sound, assert_found, failures, sound_bundle

pytestmark = pytest.mark.slow

TOKENIZER = "tokenizer/tokenizer.json"
TEMPLATE = "tokenizer/chat_template.jinja"


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return sound_bundle(tiny_checkpoint, tmp_path_factory.mktemp("copies"), ("xnnpack", "onnx", "coreml"))


def lose_a_digit_rule(data: Any) -> None:
    data["pre_tokenizer"] = data["pre_tokenizer"]["pretokenizers"][-1]


def alter_a_part(key: str, value: Any) -> Callable[[Any], object]:
    return lambda data: data.update({key: value})


TRUNCATION = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
SPACES = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
RARE = {"type": "Replace", "pattern": {"String": "\u2603"}, "content": "*"}


def repeat_a_key(bundle: Path) -> None:
    """A parser that keeps the first of two equal keys sees other data than Python."""
    file = bundle / TOKENIZER
    file.write_text(file.read_text(encoding="utf-8").replace("{", '{"decoder": null,', 1), encoding="utf-8")


def without_generation_prompt(bundle: Path) -> None:
    file = bundle / TEMPLATE
    text = file.read_text(encoding="utf-8")
    assert "add_generation_prompt" in text
    file.write_text(text.replace("add_generation_prompt", "false"), encoding="utf-8")


def chat_format(**changes: Any) -> Alter:
    return edit_manifest(lambda data: data["chat"]["format"].update(changes))


FAULTS: list[tuple[str, Alter, str, str, str]] = [
    ("the decoder is lost", edit_file(TOKENIZER, alter_a_part("decoder", None)), "xnnpack", "structure.tokenizer", "decoder"),
    ("the decoder strips spaces", edit_file(TOKENIZER, lambda d: d.update(decoder={"type": "Sequence", "decoders": [d["decoder"], SPACES]})), "xnnpack", "structure.tokenizer", "decoder"),
    ("the normalizer replaces a rare character", edit_file(TOKENIZER, alter_a_part("normalizer", RARE)), "xnnpack", "structure.tokenizer", "normalizer"),
    ("the pre-tokenizer loses its rule for digits", edit_file(TOKENIZER, lose_a_digit_rule), "onnx", "structure.tokenizer", "pre_tokenizer"),
    ("truncation is saved", edit_file(TOKENIZER, alter_a_part("truncation", TRUNCATION)), "xnnpack", "structure.tokenizer", "truncation"),
    ("padding is saved", edit_file(TOKENIZER, alter_a_part("padding", PADDING)), "xnnpack", "structure.tokenizer", "padding"),
    ("an added token is normalized", edit_file(TOKENIZER, lambda d: d["added_tokens"][0].update(normalized=True)), "coreml", "structure.tokenizer", "added tokens"),
    ("a key is repeated", repeat_a_key, "xnnpack", "structure.tokenizer", "other bytes for the same content"),
    ("another class of tokenizer", edit_file("tokenizer/tokenizer_config.json", alter_a_part("tokenizer_class", "LlamaTokenizer")), "xnnpack", "structure.tokenizer_files", "tokenizer_class"),
    ("a template in tokenizer_config.json", edit_file("tokenizer/tokenizer_config.json", alter_a_part("chat_template", "{{ messages }}")), "xnnpack", "structure.tokenizer_files", "chat_template"),
    ("special tokens that override", write("tokenizer/special_tokens_map.json", '{"eos_token": "a"}'), "xnnpack", "structure.tokenizer_files", "special_tokens_map.json is not expected"),
    ("added tokens that override", write("tokenizer/added_tokens.json", "{}"), "coreml", "structure.tokenizer_files", "added_tokens.json is not expected"),
    ("another chat template", write(TEMPLATE, "{{ messages[0].content }}"), "xnnpack", "structure.chat", "chat_template.jinja differs"),
    ("the template opens no turn", without_generation_prompt, "onnx", "structure.chat", "chat_template.jinja differs"),
    ("the generation prompt is lost", chat_format(generation_prompt=""), "xnnpack", "structure.chat", "chat.format.generation_prompt is ''"),
    ("contents are trimmed", chat_format(trim=True), "coreml", "structure.chat", "chat.format.trim is True"),
    ("another suffix of the user", chat_format(user_suffix="\n"), "xnnpack", "structure.chat", "chat.format.user_suffix"),
    ("the flat format is withheld", edit_manifest(lambda d: d["chat"].update(format=None, reason="none")), "onnx", "structure.chat", "chat.format is None"),
    ("ONNX: another decoder beside the model", edit_file("onnx/tokenizer.json", alter_a_part("decoder", None)), "onnx", "structure.client_files", "onnx/tokenizer.json differs in decoder"),
    ("ONNX: another template beside the model", write("onnx/chat_template.jinja", "x"), "onnx", "structure.client_files", "onnx/chat_template.jinja differs"),
    ("ONNX: sampling is on", edit_file("onnx/genai_config.json", lambda d: d["search"].update(do_sample=True)), "onnx", "structure.client_files", "genai_config.json differs in search"),
    ("ONNX: another pad id", edit_file("onnx/genai_config.json", lambda d: d["model"].update(pad_token_id=7)), "onnx", "structure.client_files", "genai_config.json differs in model"),
    ("ONNX: a file that a client prefers", write("onnx/added_tokens.json", "{}"), "onnx", "structure.client_files", "added_tokens.json is not expected"),
    ("Core ML: a second weight file", write("coreml/model.mlpackage/Data/com.apple.CoreML/weights/0.bin", b"0"), "coreml", "structure.client_files", "weights/0.bin is not expected"),
    ("a tokenizer beside the .pte", write("xnnpack/tokenizer.json", "{}"), "xnnpack", "structure.layout", "xnnpack/tokenizer.json belongs to no part"),
    ("a second model at the top", write("model.pte", b"ET12"), "onnx", "structure.layout", "model.pte belongs to no part"),
]  # fmt: skip


# Checks that some of these faults fail as well: golden conversations follow the chat format, a file in a package
# adds to its bytes, and a file has to be at home in its folder.
ALSO = {
    "structure.chat": {"golden.sequences"},
    "structure.client_files": {"claims.artifact"},
    "structure.tokenizer_files": {"structure.layout"},
}


@pytest.mark.parametrize(
    ("alter", "target", "check", "detail"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_fault(alter: Alter, target: str, check: str, detail: str, sound: Sound, tmp_path: Path) -> None:
    bundle = altered(sound.bundle, tmp_path, alter)
    assert_found(bundle, sound, target, check, detail, ALSO.get(check, ()))


@pytest.mark.parametrize("target", ["xnnpack", "onnx", "coreml"])
def test_a_sound_bundle_has_no_fault(target: str, sound: Sound) -> None:
    assert failures(sound.bundle, sound.checkpoint, target) == {}
    assert failures(sound.bundle, None, target) == {}


@pytest.mark.parametrize(
    ("alter", "target", "check"),
    [
        (chat_format(generation_prompt=""), "xnnpack", "structure.chat"),
        (edit_file("onnx/tokenizer.json", alter_a_part("decoder", None)), "onnx", "structure.client_files"),
        (write("xnnpack/generation_config.json", "{}"), "xnnpack", "structure.layout"),
    ],
)
def test_a_fault_is_found_without_the_checkpoint(
    alter: Alter, target: str, check: str, sound: Sound, tmp_path: Path
) -> None:
    assert set(failures(altered(sound.bundle, tmp_path, alter), None, target)) == {check}


def test_a_manifest_of_another_artifact_is_found_without_the_checkpoint(sound: Sound, tmp_path: Path) -> None:
    """The artifacts' own hashes stay as they are."""
    bundle = altered(sound.bundle, tmp_path, lambda copy: None)
    edit_json(bundle.path / "manifest.json", lambda d: d["model"].update(eos_token_ids=[7]))
    for target in bundle.targets:
        assert "structure.metadata" in failures(Bundle.open(bundle.path), None, target)


def test_files_are_named_that_are_missing_or_too_many(tiny_checkpoint: Checkpoint) -> None:
    expected = tiny_checkpoint.tokenizer.files
    fewer = {name: content for name, content in expected.items() if name != "tokenizer_config.json"}
    assert check_tokenizer_files(fewer, expected).detail == "tokenizer_config.json is missing"
    assert check_tokenizer({}, expected).detail == "tokenizer.json is missing"
    assert check_tokenizer({"tokenizer.json": b"["}, expected).detail == "tokenizer.json differs"
    assert json.loads(expected["tokenizer.json"])["model"]
