"""Instructions of edgellama's .pte and ONNX and of ExecuTorch's own export on emulated Arm processors.

    python tests/benchmarks/export_speed.py CHECKPOINT WORK_DIRECTORY --layers 2
    python -m tests.benchmarks.arm_instructions WORK_DIRECTORY CHECKPOINT

The first command leaves both .pte files of the same weights in the directory. The second one exports as many layers
for ONNX Runtime, and a .pte whose lm_head has int4 weights, as that of `export_llm` has. Instructions are work and
no time.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from edgellama.bundle import Bundle
from edgellama.checkpoints import open_checkpoint
from edgellama.commands.bench_emulated import count_calls
from edgellama.commands.export import export
from edgellama.emulator.installed import find_emulator
from edgellama.emulator.processors import PROCESSORS
from edgellama.gate.emulated_kernels import client_entries
from edgellama.recipe import RECIPES
from edgellama.runtimes.emulated import EmulatedRuntime
from edgellama.targets import find_target

# Name in the output -> target and file.
FILES = {
    "edgellama .pte": ("xnnpack", "ours.edgellama/xnnpack/model.pte"),
    "export_llm .pte": ("xnnpack", "theirs.pte"),
    "edgellama .pte, int4 lm_head": ("xnnpack", "head.edgellama/xnnpack/model.pte"),
    "edgellama ONNX": ("onnx", "onnx.edgellama/onnx"),
}


def export_others(work: Path, checkpoint: Path) -> None:
    """Exports the layers that the other files have, for ONNX Runtime and with an int4 lm_head."""
    ours = Bundle.open(work / "ours.edgellama")
    layers = open_checkpoint(checkpoint).first_layers(ours.config.num_hidden_layers)
    recipe = RECIPES["int4-fast"]
    schemes = {rule.modules: rule.scheme for rule in recipe.rules}
    rules = tuple(
        replace(rule, scheme=schemes["model.layers.*"]) if rule.modules == "lm_head" else rule
        for rule in recipe.rules
    )
    int4_head = replace(recipe, name="int4-head", rules=rules)
    for name, target, chosen in (("onnx", "onnx", recipe), ("head", "xnnpack", int4_head)):
        if (work / f"{name}.edgellama").exists():
            continue
        export(
            layers,
            work / f"{name}.edgellama",
            targets=[target],
            recipe=chosen,
            context=ours.context_length,
            validate=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--processor", action="append", help="default: cortex-a76 and neoverse-v1")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    args = parser.parse_args()
    emulator = find_emulator()
    export_others(args.work, args.checkpoint)
    for name in args.processor or ("cortex-a76", "neoverse-v1"):
        for maker, (target, file) in FILES.items():
            path = args.work / file
            entries = client_entries(path) if target == "onnx" else ()
            with EmulatedRuntime(
                emulator, PROCESSORS[name], find_target(target), path, entries=entries, counting=True
            ) as runtime:
                row = count_calls(runtime, args.prompt_tokens, 4)
            prefill, decode = row["prefill_instructions"] / 1e6, row["decode_instructions"]
            print(
                f"{name}, {maker}: prefill of {args.prompt_tokens} {prefill:.1f} M, "
                f"token {decode['median'] / 1e6:.2f} M [{decode['low'] / 1e6:.2f}, {decode['high'] / 1e6:.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
