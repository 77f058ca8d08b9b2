"""Stop tokens: the union of what config, tokenizer and chat template name, each with its sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgellama.bundle.record import ExportRequest
from edgellama.checkpoints import open_checkpoint
from edgellama.commands.export_phases import decide
from edgellama.errors import CheckpointError
from edgellama.host.progress import Progress
from edgellama.text.stop_tokens import turn_end
from edgellama.text.tokenizer import Tokenizer
from tests.helpers.odd_checkpoints import BOS, CHATML, EOS, IM_END, IM_START, llama3_bpe, write_checkpoint

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The last answer has no end; the text between two turns has one.
END_BETWEEN_TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% else %} {{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endif %}{% endfor %}"
)
ASKS_FOR_THE_DATE = "Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML


def tokenizer(template: str, *extra: str, eos: str | None = None) -> Tokenizer:
    data = llama3_bpe(extra).to_str().encode()
    return Tokenizer({"tokenizer.json": data}, chat_template=template, bos_token=BOS, eos_token=eos)


@pytest.mark.parametrize(
    ("template", "extra", "expected"),
    [
        (CHATML, (IM_START, IM_END), IM_END),
        (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
        (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        (END_BETWEEN_TURNS, (IM_START, IM_END), IM_END),
        (ASKS_FOR_THE_DATE, (IM_START, IM_END), IM_END),
        ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", (), EOS),
        ("{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}", (), None),
        ("{{ raise_exception('no chat') }}", (), None),
    ],
    ids=["chatml", "llama3", "gemma", "between turns", "date", "eos_token", "plain words", "refuses"],
)
def test_the_turn_s_end_is_read_from_the_template(
    template: str, extra: tuple[str, ...], expected: str | None
) -> None:
    assert turn_end(tokenizer(template, *extra, eos=EOS)) == expected


def stops(directory: Path) -> dict[str, tuple[str, ...]]:
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.eos_token_ids == tuple(stop.id for stop in checkpoint.stop_tokens)
    return {stop.text: stop.sources for stop in checkpoint.stop_tokens}


CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TEMPLATE = "the tokenizer's eos_token", "the chat template"
END, TURN = llama3_bpe().token_to_id(EOS), llama3_bpe().token_to_id(IM_END)


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "files", "expected"),
    [
        ({}, {}, {}, {EOS: (CONFIG, TOKENIZER)}),
        (
            {},
            {"eos_token": IM_END, "chat_template": CHATML},
            {},
            {EOS: (CONFIG,), IM_END: (TOKENIZER, TEMPLATE)},
        ),
        ({}, {"chat_template": CHATML}, {}, {EOS: (CONFIG, TOKENIZER), IM_END: (TEMPLATE,)}),
        ({"eos_token_id": None}, {}, {}, {EOS: (TOKENIZER,)}),
        ({"eos_token_id": None}, {"eos_token": None, "chat_template": CHATML}, {}, {IM_END: (TEMPLATE,)}),
        (
            {},
            {"eos_token": {"content": IM_END}},
            {GENERATION: {"eos_token_id": [END, TURN]}},
            {EOS: (CONFIG, GENERATION), IM_END: (GENERATION, TOKENIZER)},
        ),
        (
            {},
            {},
            {GENERATION: {"stop_strings": [IM_END, "\nUser:"]}},
            {EOS: (CONFIG, TOKENIZER), IM_END: (GENERATION,)},
        ),
        ({"eos_token_id": None}, {"eos_token": None}, {}, {}),
    ],
)
def test_the_union_of_all_sources(
    tmp_path: Path,
    config: dict[str, Any],
    tokenizer_config: dict[str, Any],
    files: dict[str, Any],
    expected: dict[str, tuple[str, ...]],
) -> None:
    directory = write_checkpoint(
        tmp_path / "model", config=config, tokenizer_config=tokenizer_config, files=files
    )
    assert stops(directory) == expected
    notes = [note for note in open_checkpoint(directory).notes if note.startswith("stop token")]
    assert len(notes) == sum(len(sources) == 1 for sources in expected.values())


def test_a_turn_s_end_that_is_no_token_is_noted(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path / "model", tokenizer=llama3_bpe(()), tokenizer_config={"chat_template": CHATML}
    )
    assert stops(directory) == {EOS: (CONFIG, TOKENIZER)}
    assert any("'<|im_end|>', which is no token" in note for note in open_checkpoint(directory).notes)


def request(**changes: Any) -> ExportRequest:
    return ExportRequest.of(recipe="int4-fast", targets=["xnnpack"], validation_tokens=None, **changes)


def test_a_chat_model_without_a_stop_token_is_refused_unless_told(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path / "model",
        config={"eos_token_id": None},
        tokenizer_config={
            "eos_token": None,
            "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        },
    )
    assert "no stop token: nothing but its length ends a generated text" in open_checkpoint(directory).notes
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="--stop-token TEXT"):
        decide(directory, request(), None, out, Progress())
    accepted = decide(directory, request(stop_tokens=[]), None, out, Progress())
    assert accepted.plan.config.eos_token_ids == ()
    named = decide(directory, request(stop_tokens=[IM_END]), None, out, Progress())
    assert named.plan.config.eos_token_ids == (TURN,)
    assert named.files is not None and named.plan.checkpoint.stop_tokens[0].sources == ("--stop-token",)
    assert named.plan.checkpoint.config_sha256() == open_checkpoint(directory).config_sha256()
    with pytest.raises(CheckpointError, match="'<end>' is no token"):
        decide(directory, request(stop_tokens=["<end>"]), None, out, Progress())


def test_a_sound_chat_model_needs_no_note(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path / "model",
        config={"eos_token_id": TURN},
        tokenizer_config={"eos_token": IM_END, "chat_template": CHATML},
    )
    assert open_checkpoint(directory).notes == ()
