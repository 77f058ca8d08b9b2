"""Instructions of edgellama's .pte and of ExecuTorch's own export on emulated Arm processors.

    python tests/benchmarks/export_speed.py CHECKPOINT WORK_DIRECTORY --layers 2
    python -m tests.benchmarks.arm_instructions WORK_DIRECTORY

The first command leaves both files of the same weights in the directory. Instructions are work and no time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgellama.commands.bench_emulated import count_calls
from edgellama.emulator.installed import find_emulator
from edgellama.emulator.processors import PROCESSORS
from edgellama.runtimes.emulated import EmulatedRuntime
from edgellama.targets import find_target

FILES = {"edgellama": "ours.edgellama/xnnpack/model.pte", "export_llm": "theirs.pte"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--processor", action="append", help="default: cortex-a76 and neoverse-v1")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    args = parser.parse_args()
    emulator = find_emulator()
    for name in args.processor or ("cortex-a76", "neoverse-v1"):
        for maker, file in FILES.items():
            path = args.work / file
            with EmulatedRuntime(
                emulator, PROCESSORS[name], find_target("xnnpack"), path, counting=True
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
