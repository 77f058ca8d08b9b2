"""Text of llama.cpp's own tokenizer and loop equals that of `edgellama run -t gguf`, and files of others are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.bench import candidates
from edgellama.commands.export import export
from edgellama.runtimes.llama_cpp import LlamaContext, LlamaModel
from tests.helpers.altered_gguf import edit_keys
from tests.helpers.tiny_models import TINY

PROMPTS = (
    "The boy went to the river and said",
    "Grüße, naïve café — “quotes” 你好，世界 🙂👩‍👩‍👧",
    "def f(x):\n\treturn {k: v ** 2 for k, v in x.items()}  # 12345\r\n",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "   spaces and <|endoftext|> in the middle, it's 1234567 o'clock\n\n\n",
)
TOKENS = 24


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("text") / "tiny.edgellama"
    return export(tiny_checkpoint, output, recipe="int4-fast", targets=["gguf"], context=128, validate=False)


def own_text(path: Path, prompt: str, count: int) -> str:
    """Greedy text by llama.cpp's tokenizer, its loop as its examples write it, and its detokenizer."""
    model = LlamaModel(path)
    context, ends = LlamaContext(model, 128, 1), set(model.ends())
    fed, position = model.tokenize(prompt, add_special=True), 0
    generated: list[int] = []
    while len(generated) < count:
        logits = context.decode(fed, position, all_logits=False)[0]
        position += len(fed)
        token = int(logits.argmax())
        generated.append(token)
        if token in ends:
            break
        fed = [token]
    text = model.detokenize(generated)
    context.close()
    model.close()
    return text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_the_same(prompt: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle.path), "-t", "gguf", "-p", prompt, "-n", str(TOKENS)]) == 0
    printed = capsys.readouterr().out.removesuffix("\n").removesuffix(" [stopped at --max-tokens]")
    own = own_text(bundle.artifact("gguf"), prompt, TOKENS)
    # A character of which a byte is missing at the end is shown in different ways.
    assert printed.rstrip("\ufffd") == own.rstrip("\ufffd") and len(own) > 10


@pytest.mark.slow
def test_a_file_of_others_is_measured(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain file of all floats with none of edgellama's keys, from the writer of the gguf package."""
    foreign = tmp_path / "other.gguf"
    foreign.write_bytes(bundle.artifact("gguf").read_bytes())
    edit_keys(lambda keys: [keys.pop(key) for key in list(keys) if key.startswith("edgellama.")])(foreign)
    command = ["validate", str(foreign), "--tokens", "256", "--json", str(tmp_path / "report.json")]
    assert main([*command, "--reference", str(TINY), "--max-kl", "1"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [check["name"] for check in report["checks"]] == ["consistency.tokenizer", "quality.kl"]
    assert 0.001 < report["quality"]["kl_mean"] < 0.2 and report["parity"] == {} == report["structure"]
    assert "quality only" in capsys.readouterr().err
    assert main([*command, "--reference", str(TINY), "--max-kl", "1e-6"]) == 1
    assert main(command) == 2 and "no checkpoint to compare it with" in capsys.readouterr().err
    assert main([*command, "--reference", str(TINY), "--layers"]) == 2
    assert "nothing for --layers" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_takes_files_of_others(bundle: Bundle, tmp_path: Path) -> None:
    foreign = tmp_path / "other.gguf"
    foreign.write_bytes(bundle.artifact("gguf").read_bytes())
    options = ["--prompt-tokens", "8", "--decode-tokens", "4", "--repeat", "2", "--threads", "1"]
    output = tmp_path / "bench.json"
    assert main(["bench", str(foreign), *options, "--json", str(output)]) == 0
    (row,) = json.loads(output.read_text())["candidates"]
    assert (row["name"], row["runtime"]) == ("other.gguf", "llama.cpp-cpu-repacked")
    assert row["artifact_bytes"] == foreign.stat().st_size and row["runs"][0]["bytes_per_token"] > 400_000
    own, other = candidates([bundle], None, [foreign])
    assert own.bytes_per_token(0) == other.bytes_per_token(0)
    assert (own.context_length, other.context_length) == (128, 512)
