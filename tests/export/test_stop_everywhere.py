"""A ChatML fine-tune whose config keeps its base model's end: every client of the bundle stops at the turn's end."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.formats.pte import read_pte
from tests.helpers.odd_checkpoints import CHATML, EOS, IM_END, llama3_bpe, write_checkpoint

END, TURN = llama3_bpe().token_to_id(EOS), llama3_bpe().token_to_id(IM_END)


def ends_at_once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """For every input, <|im_end|> is the most likely next token."""
    weights = {name: torch.zeros_like(w) if w.dim() == 2 else w for name, w in weights.items()}
    weights["model.embed_tokens.weight"][:] = 1.0
    weights["lm_head.weight"][TURN] = 1.0
    return weights


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = write_checkpoint(
        tmp_path_factory.mktemp("chatml") / "model",
        tokenizer_config={"eos_token": IM_END, "chat_template": CHATML},
        change=ends_at_once,
    )
    output = directory.parent / "chatml.edgellama"
    return export(
        directory, output, targets=["xnnpack", "onnx"], recipe="int4-fast", context=64, validate=False
    )


def test_the_list_is_the_same_in_every_file(bundle: Bundle) -> None:
    assert list(bundle.config.eos_token_ids) == [END, TURN]
    assert read_pte(bundle.artifact("xnnpack")).methods["get_eos_ids"] == [END, TURN]
    genai = json.loads((bundle.path / "onnx" / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [END, TURN]


def test_run_chat_stops_at_the_turn_s_end(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "edgellama", "run", str(bundle.path), "--chat", "-n", "12"]
    run = subprocess.run(command, input="Hello\n", capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "" and "1 generated" in run.stderr


def test_executorch_s_runner_stops_at_the_turn_s_end(bundle: Bundle) -> None:
    runner = import_module("executorch.extension.llm.runner")
    text = runner.TextLLMRunner(
        str(bundle.artifact("xnnpack")), str(bundle.path / "tokenizer" / "tokenizer.json")
    )
    pieces: list[str] = []
    config = runner.GenerationConfig(max_new_tokens=12, temperature=0.0, echo=False)
    text.generate("Hello", config, pieces.append)
    # The runner does not look at the token that follows the prompt; the next one stops it.
    assert pieces == [IM_END, IM_END]


def test_onnxruntime_genai_stops_at_the_turn_s_end(bundle: Bundle) -> None:
    og = import_module("onnxruntime_genai")
    model = og.Model(str(bundle.path / "onnx"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=40)
    generator = og.Generator(model, parameters)
    generator.append_tokens(bundle.tokenizer.encode("Hello"))
    generator.generate_next_token()
    assert generator.get_next_tokens().tolist() == [TURN]
    assert generator.is_done()


def test_the_gate_knows_the_options_of_the_export(tmp_path: Path) -> None:
    """`validate` accepts the checkpoint of a bundle with --stop-token and --date, which the files do not hold."""
    template = "Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML.replace(IM_END, "")
    directory = write_checkpoint(
        tmp_path / "model",
        config={"eos_token_id": None},
        tokenizer_config={"eos_token": None, "chat_template": template},
    )
    bundle = export(
        directory,
        tmp_path / "dated.edgellama",
        targets=["onnx"],
        recipe="fp32",
        context=64,
        stop_tokens=[IM_END],
        date="2026-11-26",
        validation_tokens=512,
    )
    assert bundle.manifest["chat"]["date"] == "2026-11-26" and bundle.config.eos_token_ids == (TURN,)
    assert bundle.manifest["chat"]["format"]["no_system"] == "Today is 26 November 2026.\n"
    assert validate(bundle, reference=directory, target="onnx", tokens=512).verdict == "pass"
