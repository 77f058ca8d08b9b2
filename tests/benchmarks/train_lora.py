"""Training of a LoRA on one text, in plain torch on the CPU, saved in PEFT's layout.

    python -m tests.benchmarks.train_lora tests/tiny_llama/model lora --steps 200
    python -m tests.benchmarks.train_lora SMOLLM2.gguf lora --steps 40 --batch 2

The text is edgellama's own calibration text unless --text names another. The base is any checkpoint that edgellama
opens.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from edgellama import data
from edgellama.checkpoints import open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.export.quantization.distilled_model import stateless
from edgellama.model.adapted import Pair, Pairs, adapted
from edgellama.model.llama import Llama

TEXT = "calibration_python_tutorial.rst"
MODULES = ("q_proj", "v_proj")


def new_pairs(
    model: Llama, modules: tuple[str, ...], rank: int, generator: torch.Generator
) -> dict[str, Pair]:
    """Pairs as PEFT begins them: `down` Kaiming-uniform, `up` zero."""
    pairs = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in modules:
            rows, columns = module.get_parameter("weight").shape
            bound = 1 / math.sqrt(columns)
            down = (torch.rand(rank, columns, generator=generator) * 2 - 1) * bound
            pairs[name] = Pair(down.requires_grad_(), torch.zeros(rows, rank).requires_grad_())
    return pairs


def loss_of(model: Llama, pairs: Pairs, scale: float, window: Tensor) -> Tensor:
    """Mean loss in nats of the next tokens of a window int64 [T + 1]."""
    scaled = {name: Pair(pair.down, scale * pair.up) for name, pair in pairs.items()}
    with adapted(model, scaled):
        logits = model(window[None, :-1])[0]
    return F.cross_entropy(logits, window[1:])


def train(
    model: Llama, pairs: Pairs, windows: list[Tensor], scale: float, *, steps: int, batch: int, rate: float
) -> None:
    """Adam with a linear warm-up of a tenth of the steps and cosine decay."""
    parameters = [side for pair in pairs.values() for side in (pair.down, pair.up)]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        optimizer.param_groups[0]["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        chosen = [windows[(step * batch + i) % len(windows)] for i in range(batch)]
        losses = [loss_of(model, pairs, scale, window) / batch for window in chosen]
        for loss in losses:
            loss.backward()
        optimizer.step()
        if step % 10 == 0 or step + 1 == steps:
            print(f"step {step + 1}: loss {sum(float(loss.detach()) for loss in losses):.4f}", flush=True)


def save(path: Path, pairs: Pairs, *, base: str, rank: int, alpha: float, rslora: bool) -> None:
    """Writes the adapter in PEFT's layout."""
    path.mkdir(parents=True)
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.down.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.up.detach().contiguous()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("output", type=Path)
    p.add_argument("--text", type=Path, help=f"UTF-8 (default: {TEXT} of edgellama)")
    p.add_argument("--modules", default=",".join(MODULES))
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--alpha", type=float, default=16.0)
    p.add_argument("--rslora", action="store_true")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--window", type=int, default=96, help="tokens")
    p.add_argument("--rate", type=float, default=2e-3)
    args = p.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)
    text = data.read_text(TEXT) if args.text is None else args.text.read_text(encoding="utf-8")
    ids = torch.tensor(checkpoint.tokenizer.encode(text))
    order = torch.randperm(len(ids) // (args.window + 1), generator=torch.Generator().manual_seed(0))
    windows = [ids[i * (args.window + 1) : (i + 1) * (args.window + 1)] for i in order.tolist()]
    held_out, training = windows[: max(1, len(windows) // 10)][:16], windows[max(1, len(windows) // 10) :]
    model = load_llama(checkpoint, args.window)
    pairs = new_pairs(model, tuple(args.modules.split(",")), args.rank, torch.Generator().manual_seed(0))
    scale = args.alpha / (math.sqrt(args.rank) if args.rslora else args.rank)

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(torch.stack([loss_of(model, pairs, scale, w) for w in held_out]).mean())

    with stateless(model):
        before = held_out_loss()
        train(model, pairs, training, scale, steps=args.steps, batch=args.batch, rate=args.rate)
        after = held_out_loss()
    print(f"held-out loss {before:.4f} -> {after:.4f} on {len(held_out)} windows")
    save(args.output, pairs, base=checkpoint.path.name, rank=args.rank, alpha=args.alpha, rslora=args.rslora)


if __name__ == "__main__":
    main()
