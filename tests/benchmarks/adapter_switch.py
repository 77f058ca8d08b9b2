"""Time from a switch of adapters to the first token, against the first token without a switch.

    python -m tests.benchmarks.adapter_switch BUNDLE [-t TARGET]... [--prompt-tokens N] [--repeat N]

The artifact is loaded once. Each turn takes: the first token of the adapter in use, the switch to the next one with its
first token, and the first token again. `switch` is the difference of the second and the mean of the others. Medians and
ranges, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import edgellama
from edgellama.runtimes.base import Runtime


def first_token(runtime: Runtime, tokens: list[int]) -> float:
    """Seconds of a prompt from position 0."""
    runtime.reset()
    start = time.perf_counter()
    runtime.forward(tokens)
    return time.perf_counter() - start


def switched(runtime: Runtime, name: str | None, tokens: list[int]) -> float:
    """Seconds of a switch and the prompt after it."""
    start = time.perf_counter()
    runtime.use(name).forward(tokens)
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("bundle", type=Path)
    p.add_argument("-t", "--target", action="append")
    p.add_argument("--prompt-tokens", type=int, default=1)
    p.add_argument("--repeat", type=int, default=20)
    args = p.parse_args()
    bundle = edgellama.Bundle.open(args.bundle)
    tokens = (bundle.tokenizer.encode("The quick brown fox jumps over the lazy dog. ") * 100)[
        : args.prompt_tokens
    ]
    for target in args.target or bundle.targets:
        with edgellama.load(bundle, target) as runtime:
            names = [None, *runtime.adapters]
            first_use = {name: switched(runtime, name, tokens) for name in names}
            costs, plain = [], []
            for turn in range(args.repeat):
                before = first_token(runtime, tokens)
                total = switched(runtime, names[(turn + 1) % len(names)], tokens)
                after = first_token(runtime, tokens)
                costs.append(1e3 * (total - (before + after) / 2))
                plain.append(1e3 * (before + after) / 2)
            shown = ", ".join(f"{name or 'base'} {1e3 * seconds:.1f}" for name, seconds in first_use.items())
            print(
                f"{target}: switch {statistics.median(costs):.2f} ms [{min(costs):.2f}, {max(costs):.2f}], first token "
                f"{statistics.median(plain):.1f} ms; first use with its token, ms: {shown}"
            )


if __name__ == "__main__":
    main()
