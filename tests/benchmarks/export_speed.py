"""Cost of edgellama's export against ExecuTorch's own `export_llm` on the same weights, and the ratio.

    pip install omegaconf hydra-core torchtune
    python tests/benchmarks/export_speed.py CHECKPOINT WORK_DIRECTORY [--layers N] [--context N]

They run one after the other. Both make a .pte for XNNPACK: int4 linears in groups of 32, an int8 embedding, a
KV cache, and elementwise operators in delegates. `export_llm` gets qmode 8da4w and xnnpack.extended_ops. With
--layers both get the model's first N layers: all 30 of SmolLM2-135M take `export_llm` half an hour.
`--slope M N` runs edgellama alone on M and on N layers and prints the cost of a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint, open_checkpoint

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
OURS = """
import json, sys
from edgellama.commands.export import export
from edgellama.checkpoints import open_checkpoint
from edgellama.host.progress import Progress
path, layers, context, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
progress = Progress()
checkpoint = open_checkpoint(path).first_layers(layers)
export(checkpoint, output, recipe="int4-fast", context=context, validate=False, force=True, progress=progress)
print(json.dumps(progress.stages))
"""
LOWERING = ("delegates", "trace", "lower", "write")


def write_meta(checkpoint: Checkpoint, directory: Path) -> tuple[Path, Path]:
    """Writes weights and params for `export_llm`: Meta's names, q and k with interleaved pairs for RoPE."""
    config = checkpoint.config
    state: dict[str, Tensor] = {}
    for name in config.tensor_shapes():
        tensor, stem = checkpoint.read(name).clone(), name.removesuffix(".weight")
        parts = stem.split(".")
        if "layers" in parts:
            inner = ".".join(parts[3:])
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = tensor.shape[0] // config.head_dim
                tensor = tensor.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
            state[f"layers.{parts[2]}.{NAMES[inner]}.weight"] = tensor
        else:
            outer = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}[stem]
            state[f"{outer}.weight"] = tensor
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    params = {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }
    weights, settings = directory / "weights.pth", directory / "params.json"
    torch.save(state, weights)
    settings.write_text(json.dumps(params))
    return weights, settings


def timed(command: list[str], **options: Any) -> tuple[dict[str, float], str]:
    """Returns (wall and processor seconds, standard output). Exits if the command fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.perf_counter() - start, "processor_s": processor}, done.stdout


def run_edgellama(path: Path, layers: int, context: int, work: Path) -> dict[str, Any]:
    """Cost of edgellama's export, with the peak of resident bytes."""
    command = [sys.executable, "-c", OURS, str(path), str(layers), str(context), str(work / "ours.edgellama")]
    cost, output = timed(command)
    stages = {stage["name"]: stage for stage in json.loads(output.splitlines()[-1])}
    lowering = sum(stages[name]["processor_seconds"] for name in LOWERING)
    peak = max(stage["peak_resident_bytes"] for stage in stages.values())
    return {**cost, "lowering_processor_s": lowering, "peak_resident_bytes": peak}


def run_export_llm(checkpoint: Checkpoint, context: int, work: Path) -> dict[str, Any]:
    """Cost of `export_llm`."""
    weights, params = write_meta(checkpoint, work)
    options = {
        "base.model_class": "llama3",
        "base.checkpoint": weights,
        "base.params": params,
        "model.use_kv_cache": True,
        "model.use_sdpa_with_kv_cache": True,
        "export.max_seq_length": context,
        "export.max_context_length": context,
        "export.output_name": "theirs.pte",
        "quantization.qmode": "8da4w",
        "quantization.group_size": 32,
        "quantization.embedding_quantize": '"8,0"',
        "backend.xnnpack.enabled": True,
        "backend.xnnpack.extended_ops": True,
    }
    command = [sys.executable, "-m", "executorch.extension.llm.export.export_llm"]
    cost, _ = timed(command + [f"{key}={value}" for key, value in options.items()], cwd=work, env=os.environ)
    return dict(cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--slope", type=int, nargs=2, metavar=("M", "N"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(args.checkpoint)
    if args.slope:
        few, many = args.slope
        costs = [run_edgellama(args.checkpoint, layers, args.context, args.work) for layers in (few, many)]
        slope = (costs[1]["lowering_processor_s"] - costs[0]["lowering_processor_s"]) / (many - few)
        print(json.dumps({"layers": [few, many], "ours": costs, "processor_s_per_layer": slope}, indent=1))
        return
    layers = args.layers or checkpoint.config.num_hidden_layers
    own_cost = run_edgellama(args.checkpoint, layers, args.context, args.work)
    export_llm_cost = run_export_llm(checkpoint.first_layers(layers), args.context, args.work)
    ratios = {key: export_llm_cost[key] / own_cost[key] for key in ("wall_s", "processor_s")}
    print(
        json.dumps(
            {"layers": layers, "edgellama": own_cost, "export_llm": export_llm_cost, "ratio": ratios},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
