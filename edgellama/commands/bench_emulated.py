"""Verb `bench --emulate`: instructions of artifacts on emulated Arm processors.

An instruction says little about time: one product instruction of a new processor does the work of two of an old
one, and memory bounds decoding. The count repeats on every machine, so that two forms of a model or two versions of
a runtime can be compared where no phone is at hand.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from edgellama.commands.bench import Artifact, Candidate, Spread
from edgellama.emulator.counter import counter
from edgellama.emulator.installed import find_emulator
from edgellama.emulator.processors import Processor, find_processor
from edgellama.errors import UsageError
from edgellama.gate.emulated_kernels import client_entries
from edgellama.host.progress import Progress
from edgellama.runtimes.emulated import KINDS, EmulatedRuntime, not_emulated
from edgellama.targets import find_target

SCHEMA = "edgellama.instructions/1"
PROMPT_TOKENS = (32,)
DECODE_TOKENS = 4
WARM_UP = 2  # tokens decoded first, because a runtime packs weights in its first calls


def count_instructions(
    compared: Sequence[Candidate],
    specifications: Sequence[str],
    *,
    prompt_tokens: Sequence[int] = PROMPT_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Instructions of each candidate on each processor, in one thread (schema `edgellama.instructions/1`).

    Args:
        compared: the artifacts. Those of targets without an Arm runtime are left out.
        specifications: processors, as on the command line.
        prompt_tokens: lengths of the prompts, each prefilled in one call.
        decode_tokens: tokens decoded after each prompt, one a call.
        progress: reporter of the bar.

    Raises UsageError if no artifact can be emulated or a prompt exceeds a context, MissingDependencyError without
    an emulator that counts.
    """
    processors = list(dict.fromkeys(map(find_processor, specifications)))
    emulator = find_emulator()
    counter(emulator)
    chosen = [c for c in compared if isinstance(c, Artifact) and c.target in KINDS]
    if not chosen:
        raise not_emulated(c.target for c in compared if isinstance(c, Artifact))
    context = min(candidate.context_length for candidate in chosen)
    if max(prompt_tokens) + decode_tokens > context:
        raise UsageError(
            f"a prompt of {max(prompt_tokens)} tokens and {decode_tokens} more do not fit into a context of {context}",
            remedy="Give a smaller --prompt-tokens or --decode-tokens.",
        )
    jobs = [(candidate, processor) for candidate in chosen for processor in processors]

    def run(job: tuple[Artifact, Processor]) -> list[dict[str, Any]]:
        candidate, processor = job
        path = candidate.bundle.artifact(candidate.target)
        entries = client_entries(path) if candidate.target == "onnx" else ()
        with EmulatedRuntime(
            emulator, processor, find_target(candidate.target), path, entries=entries, counting=True
        ) as runtime:
            return [
                {"name": candidate.name, "processor": processor.name}
                | count_calls(runtime, length, decode_tokens)
                for length in prompt_tokens
            ]

    cores = len(os.sched_getaffinity(0))
    with (progress or Progress()).bar("count", len(jobs), "runs") as bar, ThreadPoolExecutor(cores) as pool:
        rows = []
        for found in pool.map(run, jobs):
            rows += found
            bar.update(1)
    return {"schema": SCHEMA, "qemu": emulator.qemu, "decode_tokens": decode_tokens, "rows": rows}


def count_calls(runtime: EmulatedRuntime, length: int, decode_tokens: int) -> dict[str, Any]:
    """Instructions of a prefill, and of each decoded token after it. The same calls ran before, uncounted."""
    prompt = [(37 * i + 11) % runtime.vocab_size for i in range(length)]
    for count in (min(WARM_UP, decode_tokens), decode_tokens):
        runtime.reset()
        runtime.forward(prompt)
        for token in range(count):
            runtime.forward([token + 1])
    prefill, *steps = runtime.instructions()[-(decode_tokens + 1) :]
    return {
        "prompt_tokens": length,
        "prefill_instructions": prefill,
        "decode_instructions": asdict(Spread.of(steps)),
    }
