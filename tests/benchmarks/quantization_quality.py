"""KL of recipes against torchao's own scale choice at the same bytes: the numbers in docs/benchmarks.md.

    python tests/benchmarks/quantization_quality.py [--recipe NAME|FILE.json]... [--max-bytes N]...
        [--tokens N] [--work DIRECTORY] [--json FILE]
        [--llama-cpp ENVIRONMENT/bin/python]

SmolLM2-135M-Instruct comes as Q4_1, whose grid has our groups of 32. A permutation of its channels breaks
this grid up, so that it favours nobody, and keeps the function (residual stream, MLP, heads of values). All
numbers are against the permuted model. Each candidate becomes a .pte, which ExecuTorch runs on the evaluation
texts. `hqq` is torchao's `hqq_scale_only`, ExecuTorch's default for Llama. It has the same int8 head and
embedding, and thus the same bytes.

With --max-bytes, recipe `auto` chooses schemes for that many bytes of the model, each table counted once.

With --llama-cpp (an environment with llama-cpp-python, see against_llama_cpp.py), llama.cpp quantizes the
same permuted model. It uses an importance matrix for types that take one, and runs on the same tokens. Its
files hold a tied table once, a .pte holds it twice. So `model` gives the stored bytes with each table once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp_models import (
    logits_of,
    quantize,
    write_gguf,
    write_importance,
)
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    MappingType,
    PerGroup,
    quantize_,
)

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.cli.demo import demo_checkpoint
from edgellama.export.plan import calibration
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.rotation import rotated_config
from edgellama.export.quantization.sensitivity import measure_frontier
from edgellama.export.quantization.tensors import round_modules
from edgellama.export.xnnpack.lower import lower_to_xnnpack
from edgellama.gate.metrics import Positions, clustered_mean, compare, summarize
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.model.quantized import Codes, apply_codes
from edgellama.recipe import RECIPES, Recipe, find_recipe
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.runtimes.xnnpack import PteRuntime
from edgellama.targets import find_target
from edgellama.targets.provenance import Provenance
from edgellama.targets.sizes import planned_bytes
from edgellama.text.windows import WINDOW, Window, default_texts, windows

CONTEXT = 512
BASELINE = "hqq"
LLAMA_CPP = ("ALL_F32", "Q4_0", "Q4_K_M")  # ALL_F32 proves that the model is the same
SAME = 1e-4  # largest KL of ALL_F32, whose cache holds float16


def permuted(checkpoint: Checkpoint, seed: int = 5) -> Checkpoint:
    """Checkpoint of the same function. Its channels are permuted, which breaks up groups of the source."""
    config, generator = checkpoint.config, torch.Generator().manual_seed(seed)

    def shuffle(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    residual = shuffle(config.hidden_size)
    layers = range(config.num_hidden_layers)
    inner = [shuffle(config.intermediate_size) for _ in layers]
    head = [shuffle(config.head_dim) for _ in layers]

    def in_heads(weight: Tensor, index: int) -> Tensor:
        heads: Tensor = weight.reshape(-1, config.head_dim, weight.shape[1])
        return heads[:, head[index]].flatten(0, 1)

    def read(name: str) -> Tensor:
        weight, (*path, module, _) = checkpoint.tensor(name), name.split(".")
        index = int(path[2]) if len(path) > 2 else 0
        if weight.dim() == 1:
            return weight[residual].contiguous()
        if module == "o_proj":
            weight = in_heads(weight.T, index).T[residual]
        elif module == "down_proj":
            weight = weight[residual][:, inner[index]]
        else:
            if module == "v_proj":
                weight = in_heads(weight, index)
            elif module in ("gate_proj", "up_proj"):
                weight = weight[inner[index]]
            weight = weight[:, residual]
        return weight.contiguous()

    return replace(checkpoint, read=read)


def hqq_llama(checkpoint: Checkpoint, recipe: Recipe) -> Llama:
    """Model with torchao's codes for the int4 groups of `recipe`. The rest is rounded as in the recipe."""
    model = load_llama(checkpoint, CONTEXT)
    schemes = recipe.assign(
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))
    )
    round_modules(model, {name: scheme for name, scheme in schemes.items() if scheme and scheme.bits == 8})
    for name, scheme in schemes.items():
        if scheme is None or scheme.bits == 8 or scheme.group_size is None:
            continue
        linear = model.get_submodule(name)
        quantize_(
            linear,
            Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                weight_granularity=PerGroup(scheme.group_size),
                weight_mapping_type=MappingType.SYMMETRIC,
                weight_scale_dtype=torch.bfloat16,
                intx_choose_qparams_algorithm="hqq_scale_only",
            ),
        )
        weight: Any = linear.weight
        scales = weight.scale.to(torch.bfloat16).float().reshape(len(weight.qdata), -1)
        apply_codes(model, name, Codes(weight.qdata, scales, scheme))
    return model


@dataclass(frozen=True)
class Scored:
    """Windows and full-precision logits, float32 [T, vocab_size] each, computed once for all candidates."""

    windows: Sequence[Window]
    logits: Sequence[Tensor]

    def quality(self, run: Callable[[Sequence[int]], Tensor]) -> list[Positions]:
        """Compares the logits of `run`, [T, vocab_size], with those of the full-precision model."""
        pairs = zip(self.windows, self.logits, strict=True)
        return [compare(logits, run(window.tokens), window.targets) for window, logits in pairs]


def scored_windows(checkpoint: Checkpoint, tokens: int) -> Scored:
    """Windows of the evaluation texts with at least `tokens` tokens, and their full-precision logits."""
    scored = list(islice(windows(default_texts(), checkpoint.tokenizer, WINDOW), -(-tokens // WINDOW)))
    reference, logits = ReferenceRuntime(load_llama(checkpoint, CONTEXT)), []
    for window in scored:
        reference.reset()
        logits.append(reference.forward_all(window.tokens))
    return Scored(scored, logits)


def pte_quality(path: Path, scored: Scored) -> list[Positions]:
    """Comparison of the .pte at `path`, run by ExecuTorch."""
    runtime = PteRuntime(path)

    def run(tokens: Sequence[int]) -> Tensor:
        runtime.reset()
        return runtime.forward_all(tokens)

    return scored.quality(run)


def llama_cpp_quality(
    python: str, checkpoint: Checkpoint, work: Path, scored: Scored
) -> dict[str, tuple[Path, list[Positions]]]:
    """File and comparison of each of llama.cpp's own quantizations, run by llama.cpp, by type name."""
    source, importance = work / "ALL_F32.gguf", work / "importance.npz"
    if not source.exists():
        write_gguf(checkpoint, source)
    if not importance.exists():
        text = calibration(checkpoint, RECIPES["int4"], CONTEXT)
        assert text is not None
        write_importance(checkpoint, text, importance)
    results = {}
    for kind in LLAMA_CPP:
        path = work / f"{kind}.gguf"
        if not path.exists():
            quantize(python, source, path, kind, importance)
        with logits_of(python, path, CONTEXT, checkpoint.config.vocab_size) as logits:
            results[kind] = path, scored.quality(logits)
    difference = float(np.concatenate([p.kl for p in results[LLAMA_CPP[0]][1]]).mean())
    if difference > SAME:
        raise SystemExit(f"llama.cpp computes another model from {source}: KL {difference:.2e}")
    return results


def recipe_of(name: str) -> Recipe:
    """Recipe of a candidate. The baseline has the rules of int4-fast."""
    return find_recipe("int4-fast" if name == BASELINE else name)


def auto_recipe(checkpoint: Checkpoint, max_bytes: int, work: Path) -> Path:
    """Recipe file with the schemes that `auto` chooses for `max_bytes`."""
    file = work / f"auto-{max_bytes}.json"
    if not file.exists():
        # `max_bytes` does not count the graph.
        graph = find_target("coreml").storage.program_bytes(checkpoint.config.num_hidden_layers)
        chosen = chosen_by_auto(checkpoint, "coreml", max_bytes + graph)
        file.write_text(json.dumps(chosen.to_dict()), encoding="utf-8")
    return file


def chosen_by_auto(checkpoint: Checkpoint, target: str, max_bytes: int) -> Recipe:
    """Recipe with the schemes that `auto` chooses for an artifact of `max_bytes`."""
    recipe = RECIPES["auto"]
    text = calibration(checkpoint, recipe, CONTEXT)
    assert text is not None
    store = LayerStore.of(checkpoint, replace(recipe, algorithm="gptq"), text)
    frontier = measure_frontier(
        checkpoint, recipe, [find_target(target)], CONTEXT, text, store=store, progress=Progress(sys.stderr)
    )
    return frontier.choose(max_bytes, None)


def make(name: str, checkpoint: Checkpoint, path: Path) -> float:
    """Writes candidate `name` to `path`. Returns the seconds of quantization."""
    recipe = recipe_of(name)
    start = time.perf_counter()
    if name == BASELINE:
        model = hqq_llama(checkpoint, recipe)
    else:
        text = calibration(checkpoint, recipe, CONTEXT)
        store = LayerStore.of(checkpoint, recipe, text) if text else LayerStore()
        progress = Progress(sys.stderr)
        model, _ = quantized_llama(checkpoint, recipe, CONTEXT, progress, calibrated_on=text, store=store)
    seconds = time.perf_counter() - start
    provenance = Provenance("Apache-2.0", checkpoint.config.parameters, "0" * 64, "0" * 64, "0", recipe)
    lower_to_xnnpack(model, path, provenance, progress=Progress(sys.stderr))
    return seconds


def ratio(candidate: Sequence[Positions], baseline: Sequence[Positions]) -> tuple[float, tuple[float, float]]:
    """Ratio of the mean KLs on the same windows, with its 95 % interval (delta method, by window)."""
    top, bottom = (np.concatenate([p.kl for p in run]).mean() for run in (candidate, baseline))
    value = float(top / bottom)
    influence = [(a.kl - value * b.kl) / bottom for a, b in zip(candidate, baseline, strict=True)]
    estimate = clustered_mean(influence)
    low, high = estimate.low, estimate.high
    return value, (value + low, value + high)


def model_bytes(name: str, file: Path, checkpoint: Checkpoint) -> int:
    """Bytes of the model with a tied table stored once. A GGUF does so, and its whole file counts."""
    if file.suffix == ".gguf":
        return file.stat().st_size
    recipe = recipe_of(name)
    return planned_bytes(
        rotated_config(checkpoint.config, recipe.rotation), recipe, find_target("coreml").storage, CONTEXT
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", action="append", help="default: int4-best, int4, int4-fast")
    parser.add_argument("--max-bytes", type=int, action="append", default=[], help="adds `auto` at this size")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--work", type=Path, default=Path("quantization_quality"), help="kept between runs")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    checkpoint = permuted(open_checkpoint(demo_checkpoint()))
    autos = [str(auto_recipe(checkpoint, size, args.work)) for size in args.max_bytes]
    names = [*autos, *(args.recipe or ["int4-best", "int4", "int4-fast"]), BASELINE]
    files = {name: args.work / f"{Path(name).stem}.pte" for name in names}
    seconds = {n: make(n, checkpoint, file) for n, file in files.items() if not file.exists()}
    scored = scored_windows(checkpoint, args.tokens)
    runs = {name: (file, pte_quality(file, scored)) for name, file in files.items()}
    if args.llama_cpp:
        runs |= llama_cpp_quality(args.llama_cpp, checkpoint, args.work, scored)
    table = []
    for name, (file, run) in runs.items():
        summary = summarize(run)
        share, interval = ratio(run, runs[BASELINE][1])
        size, model = file.stat().st_size, model_bytes(name, file, checkpoint)
        table.append(
            {
                "name": name,
                "bytes": size,
                "model_bytes": model,
                "quantize_seconds": seconds.get(name),
                "kl_over_hqq": share,
                "kl_over_hqq_ci95": interval,
                **summary,
            }
        )
        low, high = summary["kl_mean_ci95"]
        print(
            f"{Path(name).stem:<10} {size / 1e6:6.1f} MB, model {model / 1e6:6.1f} MB  KL {summary['kl_mean']:.4f} "
            f"[{low:.4f}, {high:.4f}]  top-1 {summary['top1_agreement']:.1%}  "
            f"of hqq's KL {share:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
