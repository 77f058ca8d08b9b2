"""Verb `bench`: speed of artifacts on this machine, with the spread of every number and the machine's bandwidth.

Each artifact runs in a process of its own, so that load time and memory are its own. The processes take turns, so that
a disturbance of the machine meets all of them. The ratio of two artifacts is taken turn by turn.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from edgellama.bundle import Bundle
from edgellama.bundle.schema import conforming
from edgellama.commands.bench_worker import Measured, Worker
from edgellama.errors import UsageError
from edgellama.files import read_named_json
from edgellama.formats.gguf import read_gguf
from edgellama.gate.metrics import student_t
from edgellama.host.progress import Progress
from edgellama.runtimes.gguf import DEFAULT_CONTEXT
from edgellama.targets import find_target

PROMPT_TOKENS = (32, 128, 512)
DECODE_TOKENS = 64
REPEAT = 7
BANDWIDTH_BYTES = 1 << 28
BENCH_SCHEMA = "edgellama.bench/1"
_REMEDY = "Give a file that `edgellama bench --json FILE` wrote."


@dataclass(frozen=True)
class Spread:
    """Median and range of the repeats."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


class Candidate(Protocol):
    """Something to measure. `location` and `target` tell a worker what to open."""

    @property
    def name(self) -> str:
        """Name in the result."""

    @property
    def location(self) -> Path: ...

    @property
    def target(self) -> str: ...

    @property
    def artifact_bytes(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def bytes_per_token(self, depth: int) -> int | None:
        """Bytes that decoding one token at this depth of the cache must read; None if they are not known."""


@dataclass(frozen=True)
class Artifact:
    """One artifact of one bundle."""

    name: str
    bundle: Bundle
    target: str

    @property
    def location(self) -> Path:
        return self.bundle.path

    @property
    def artifact_bytes(self) -> int:
        return int(self.bundle.artifact_entry(self.target)["bytes"])

    @property
    def context_length(self) -> int:
        return self.bundle.context_length

    def bytes_per_token(self, depth: int) -> int | None:
        return bytes_per_token(self.bundle, self.target, depth)


@dataclass(frozen=True)
class ForeignGguf:
    """A GGUF file without a bundle, whoever made it. `context_length` is the one that the runtime gives it."""

    location: Path
    target: str = "gguf"

    @property
    def name(self) -> str:
        return self.location.name

    @property
    def artifact_bytes(self) -> int:
        return self.location.stat().st_size

    @property
    def context_length(self) -> int:
        return min(int(read_gguf(self.location).metadata["llama.context_length"]), DEFAULT_CONTEXT)

    def bytes_per_token(self, depth: int) -> int | None:
        """Bytes of the tensors that are multiplied. The cache, which depends on the depth, is left out."""
        tensors = read_gguf(self.location).tensors
        looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
        return sum(t.nbytes for name, t in tensors.items() if len(t.shape) == 2 and name not in looked_up)


def candidates(
    bundles: Sequence[Bundle], targets: Sequence[str] | None, files: Sequence[Path] = ()
) -> list[Candidate]:
    """Every target of every bundle, or those named, and GGUF files. Raises UsageError for one that no bundle has."""
    for name in targets or ():
        find_target(name)
    chosen: list[Candidate] = [
        Artifact(target if len(bundles) == 1 else f"{bundle.path.name}:{target}", bundle, target)
        for bundle in bundles
        for target in bundle.targets
        if targets is None or target in targets
    ]
    chosen += [ForeignGguf(file) for file in files]
    if not chosen or len({c.name for c in chosen}) < len(chosen):
        raise UsageError(
            "no artifact to measure" if not chosen else "two bundles have the same name",
            remedy="Give a target that a bundle has (`edgellama inspect` lists them), and bundles of different names.",
        )
    return chosen


def bench(
    compared: Sequence[Candidate],
    *,
    prompt_tokens: Sequence[int] = PROMPT_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
    repeat: int = REPEAT,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed, memory and bytes of each candidate, as JSON data (schema `edgellama.bench/1`).

    Args:
        compared: the artifacts, the first of which the ratios are over.
        prompt_tokens: lengths of the prompts, each prefilled in one call. Decoding starts at that depth of the cache.
        decode_tokens: tokens decoded after each prompt, one a call.
        repeat: turns that count, after one that does not.
        threads: None for the runtime's own number.
        progress: reporter of the bar.

    Times are seconds, speeds tokens a second, bandwidths bytes a second.
    """
    progress = progress or Progress()
    if repeat < 2:
        raise UsageError("one repeat has no spread", remedy="Give --repeat 2 or more.")
    lengths = fitting_lengths(compared, prompt_tokens, decode_tokens)
    with ExitStack() as stack:
        workers = []
        for candidate in compared:
            with progress.stage(f"load {candidate.name}"):
                workers.append(stack.enter_context(Worker(candidate.location, candidate.target, threads)))
        bandwidth = measured_bandwidth(threads or workers[0].threads)
        turns: dict[tuple[str, int], list[Measured]] = {}
        with progress.bar("bench", len(lengths) * (repeat + 1) * len(compared), "runs") as bar:
            for length in lengths:
                for turn in range(repeat + 1):
                    for candidate, worker in zip(compared, workers, strict=True):
                        measured = worker.measure(length, decode_tokens)
                        if turn:
                            turns.setdefault((candidate.name, length), []).append(measured)
                        bar.update(1)
        rows = [
            {
                "name": candidate.name,
                "runtime": worker.runtime,
                "threads": worker.threads,
                "artifact_bytes": candidate.artifact_bytes,
                "load_s": worker.load_seconds,
                "peak_resident_bytes": worker.peak_bytes(),
                "runs": [
                    _row(length, turns[candidate.name, length], candidate, bandwidth.median)
                    for length in lengths
                ],
            }
            for candidate, worker in zip(compared, workers, strict=True)
        ]
    return {
        "schema": BENCH_SCHEMA,
        "machine": machine(),
        "bandwidth": asdict(bandwidth),
        "decode_tokens": decode_tokens,
        "repeat": repeat,
        "candidates": rows,
        "ratios": list(_ratios(compared, lengths, turns)),
    }


def fitting_lengths(compared: Sequence[Candidate], asked: Sequence[int], decode_tokens: int) -> list[int]:
    """Lengths of prompts that fit into every context. Raises UsageError if one that a user asked for does not."""
    context = min(candidate.context_length for candidate in compared)
    lengths = [n for n in dict.fromkeys(asked) if n + decode_tokens <= context]
    if not lengths or (asked is not PROMPT_TOKENS and len(lengths) < len(set(asked))):
        raise UsageError(
            f"a prompt of {max(asked)} tokens and {decode_tokens} more do not fit into a context of {context}",
            remedy="Give a smaller --prompt-tokens or --decode-tokens.",
        )
    return lengths


def measured_bandwidth(threads: int) -> Spread:
    """Bytes a second that so many threads read from memory: the sum of 256 MiB, seven times."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(BANDWIDTH_BYTES // 4)
        speeds = []
        for _ in range(8):
            start = time.perf_counter()
            data.sum()
            speeds.append(BANDWIDTH_BYTES / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    return Spread.of(speeds[1:])


def bytes_per_token(bundle: Bundle, target: str, depth: int) -> int | None:
    """Bytes that decoding one token at this depth of the cache must read: all linears, and keys and values so far.

    None where the manifest lists no stored tensors.
    """
    artifact = next(a for a in bundle.manifest["artifacts"] if a["target"] == target)
    linears = [row["bytes"] for row in artifact["quantization"] if row["modules"] == "linear"]
    if not linears or "memory" not in artifact:
        return None
    return int(sum(linears) + artifact["memory"]["kv_cache"] * depth / bundle.context_length)


def _row(length: int, turns: list[Measured], candidate: Candidate, bandwidth: float) -> dict[str, Any]:
    decode = Spread.of([t.decode_tokens / t.decode_seconds for t in turns])
    depth = length + turns[0].decode_tokens // 2
    size = candidate.bytes_per_token(depth)
    return {
        "prompt_tokens": length,
        "time_to_first_token_s": asdict(Spread.of([t.prefill_seconds for t in turns])),
        "prefill_tok_s": asdict(Spread.of([length / t.prefill_seconds for t in turns])),
        "decode_tok_s": asdict(decode),
        "bytes_per_token": size,
        "bandwidth_share": size * decode.median / bandwidth if size else None,
    }


def _ratios(
    compared: Sequence[Candidate], lengths: Sequence[int], turns: dict[tuple[str, int], list[Measured]]
) -> Iterator[dict[str, Any]]:
    """Each candidate's speed over the first one's, turn by turn."""
    for candidate in compared[1:]:
        for length in lengths:
            pairs = list(zip(turns[candidate.name, length], turns[compared[0].name, length], strict=True))
            yield {
                "name": candidate.name,
                "over": compared[0].name,
                "prompt_tokens": length,
                "prefill": ratio([b.prefill_seconds / a.prefill_seconds for a, b in pairs]),
                "decode": ratio([b.decode_seconds / a.decode_seconds for a, b in pairs]),
            }


def ratio(values: Sequence[float]) -> dict[str, Any]:
    """Geometric mean of paired ratios, and its 95 % interval by Student's t on their logarithms."""
    logs = [math.log(value) for value in values]
    mean = statistics.fmean(logs)
    half = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(mean), "ci95": [math.exp(mean - half), math.exp(mean + half)]}


def machine() -> dict[str, Any]:
    """The processor's name as Linux says it, and how many cores this process may use."""
    name, cpuinfo = sys.platform, Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    affinity = getattr(os, "sched_getaffinity", None)
    return {"processor": name, "cores": len(affinity(0)) if affinity else os.cpu_count()}


def read_bench(path: Path) -> dict[str, Any]:
    """The result of `edgellama bench --json`, proven against bench.schema.json. Raises InputError."""
    data = read_named_json(path, "benchmark", remedy=_REMEDY)
    return conforming(data, "bench", label="bench", where=str(path), remedy=_REMEDY)
