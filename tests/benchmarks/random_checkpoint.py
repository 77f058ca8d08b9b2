"""Checkpoint of Llama 3.2's shape with random bfloat16 weights, and the cost of its export.

    python tests/benchmarks/random_checkpoint.py 1B WORK_DIRECTORY

Speed and memory of an export do not depend on the values of the weights. Prints the result of
`edgellama export --json` without its manifest: seconds, processor seconds and peak memory of every stage.
Needs 2.5 GB of disk for 1B, 6.5 for 3B, and as much for the bundle. The gate is left out, since random
weights predict nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgellama.model.config import LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/tiny_llama/model"
SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "guard-1B": {  # of the pruned Llama Guard 3 1B
        "hidden_size": 2048,
        "intermediate_size": 6400,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "head_dim": None,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def make(shape: str, directory: Path, layers: int | None = None) -> None:
    """Writes the checkpoint with a shard for each layer, so that memory never holds all of it."""
    data: dict[str, Any] = {**COMMON, **SHAPES[shape]}
    data["num_hidden_layers"] = layers or data["num_hidden_layers"]
    data["head_dim"] = {"1B": 64, "guard-1B": 64, "3B": 128}[shape]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(data))
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"<unused {i}>": i for i in range(len(vocabulary), 128256)}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(TINY / "tokenizer_config.json", directory)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, size in LlamaConfig.from_hf(data).tensor_shapes().items():
        parts = name.split(".")
        shards.setdefault(parts[2] if "layers" in parts else "rest", []).append((name, size))
    index = {}
    for shard, tensors in shards.items():
        file = f"model-{shard}.safetensors"
        weights = {}
        for name, size in tensors:
            values = torch.randn(size, generator=generator).mul_(0.02)
            weights[name] = (values + 1 if name.endswith("norm.weight") else values).bfloat16()
            index[name] = file
        save_file(weights, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    args = parser.parse_args()
    checkpoint = args.work / f"random-{args.shape}"
    if not checkpoint.exists():
        make(args.shape, checkpoint, args.layers)
    result = args.work / "export.json"
    start = time.perf_counter()
    command = [sys.executable, "-m", "edgellama", "export", str(checkpoint)]
    command += [
        "-o",
        str(args.work / "random.edgellama"),
        "-r",
        "int4-fast",
        "--no-validate",
        "--force",
        "--json",
        str(result),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    wall = time.perf_counter() - start
    data = json.loads(result.read_text())
    bytes_written = data["manifest"]["artifacts"][0]["bytes"]
    print(
        json.dumps(
            {"wall_s": round(wall, 1), "artifact_bytes": bytes_written, "stages": data["stages"]}, indent=1
        )
    )


if __name__ == "__main__":
    main()
