"""Verb `bench`: how fast artifacts run here, in turns, with the spread of every number and the limit of the machine.

Each artifact runs in a process of its own, so that load time and memory are its own; the processes take turns, so
that what disturbs the machine disturbs all alike, and the ratio of two artifacts is taken turn by turn.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgellama.bundle import Bundle
from edgellama.commands.bench_worker import Measured, Worker
from edgellama.errors import InputError, UsageError
from edgellama.files import is_number, read_named_json
from edgellama.host.progress import Progress
from edgellama.targets import find_target

PROMPT_TOKENS = (32, 128, 512)
DECODE_TOKENS = 64
REPEAT = 7
BANDWIDTH_BYTES = 1 << 28
# Student's t for a 95 % interval, by the number of repeats.
_T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Spread:
    """Median and range of the repeats."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Candidate:
    """What is measured: one artifact of one bundle. name: as the result calls it."""

    name: str
    bundle: Bundle
    target: str


def candidates(bundles: Sequence[Bundle], targets: Sequence[str] | None) -> list[Candidate]:
    """Every target of every bundle, or those named. Raises UsageError for one that no bundle has."""
    for name in targets or ():
        find_target(name)
    found = [
        Candidate(target if len(bundles) == 1 else f"{bundle.path.name}:{target}", bundle, target)
        for bundle in bundles
        for target in bundle.targets
        if targets is None or target in targets
    ]
    if not found or len({c.name for c in found}) < len(found):
        raise UsageError(
            "no artifact to measure" if not found else "two bundles have the same name",
            remedy="Give a target that a bundle has (`edgellama inspect` lists them), and bundles of different names.",
        )
    return found


def bench(
    what: Sequence[Candidate],
    *,
    prompt_tokens: Sequence[int] = PROMPT_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
    repeat: int = REPEAT,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed, memory and bytes of each candidate, as JSON data (schema `edgellama.bench/1`).

    prompt_tokens: lengths of the prompts, each prefilled in one call; decoding starts at that depth of the cache, one
    token a call. repeat: turns, after one that is thrown away. threads: None for the runtime's own number.

    Times are seconds, speeds tokens a second, bandwidths bytes a second.
    """
    progress = progress or Progress()
    if repeat < 2:
        raise UsageError("one repeat has no spread", remedy="Give --repeat 2 or more.")
    lengths = _lengths(what, prompt_tokens, decode_tokens)
    with ExitStack() as stack:
        workers = []
        for candidate in what:
            with progress.stage(f"load {candidate.name}"):
                workers.append(stack.enter_context(Worker(candidate.bundle.path, candidate.target, threads)))
        bandwidth = measured_bandwidth(threads or workers[0].threads)
        turns: dict[tuple[str, int], list[Measured]] = {}
        with progress.bar("bench", len(lengths) * (repeat + 1) * len(what), "runs") as bar:
            for length in lengths:
                for turn in range(repeat + 1):
                    for candidate, worker in zip(what, workers, strict=True):
                        measured = worker.measure(length, decode_tokens)
                        if turn:
                            turns.setdefault((candidate.name, length), []).append(measured)
                        bar.update(1)
        rows = [
            {
                "name": candidate.name,
                "runtime": worker.runtime,
                "threads": worker.threads,
                "artifact_bytes": candidate.bundle.artifact_entry(candidate.target)["bytes"],
                "load_s": worker.load_seconds,
                "peak_resident_bytes": worker.peak_bytes(),
                "runs": [
                    _row(length, turns[candidate.name, length], candidate, bandwidth.median)
                    for length in lengths
                ],
            }
            for candidate, worker in zip(what, workers, strict=True)
        ]
    return {
        "schema": BENCH_SCHEMA,
        "machine": machine(),
        "bandwidth": asdict(bandwidth),
        "decode_tokens": decode_tokens,
        "repeat": repeat,
        "candidates": rows,
        "ratios": list(_ratios(what, lengths, turns)),
    }


def _lengths(what: Sequence[Candidate], asked: Sequence[int], decode_tokens: int) -> list[int]:
    context = min(candidate.bundle.context_length for candidate in what)
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

    None where the manifest does not say what the artifact stores.
    """
    artifact = next(a for a in bundle.manifest["artifacts"] if a["target"] == target)
    linears = [row["bytes"] for row in artifact["quantization"] if row["modules"] == "linear"]
    if not linears or "memory" not in artifact:
        return None
    return int(sum(linears) + artifact["memory"]["kv_cache"] * depth / bundle.context_length)


def _row(length: int, turns: list[Measured], candidate: Candidate, bandwidth: float) -> dict[str, Any]:
    decode = Spread.of([t.decode_tokens / t.decode_seconds for t in turns])
    depth = length + turns[0].decode_tokens // 2
    size = bytes_per_token(candidate.bundle, candidate.target, depth)
    return {
        "prompt_tokens": length,
        "time_to_first_token_s": asdict(Spread.of([t.prefill_seconds for t in turns])),
        "prefill_tok_s": asdict(Spread.of([length / t.prefill_seconds for t in turns])),
        "decode_tok_s": asdict(decode),
        "bytes_per_token": size,
        "bandwidth_share": size * decode.median / bandwidth if size else None,
    }


def _ratios(
    what: Sequence[Candidate], lengths: Sequence[int], turns: dict[tuple[str, int], list[Measured]]
) -> Iterator[dict[str, Any]]:
    """Each candidate's speed over the first one's, turn by turn."""
    for candidate in what[1:]:
        for length in lengths:
            pairs = list(zip(turns[candidate.name, length], turns[what[0].name, length], strict=True))
            yield {
                "name": candidate.name,
                "over": what[0].name,
                "prompt_tokens": length,
                "prefill": ratio([b.prefill_seconds / a.prefill_seconds for a, b in pairs]),
                "decode": ratio([b.decode_seconds / a.decode_seconds for a, b in pairs]),
            }


def ratio(values: Sequence[float]) -> dict[str, Any]:
    """Geometric mean of paired ratios, and its 95 % interval by Student's t on their logarithms."""
    logs = [math.log(value) for value in values]
    mean = statistics.fmean(logs)
    half = _T95.get(len(logs), 2.2) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(mean), "ci95": [math.exp(mean - half), math.exp(mean + half)]}


def machine() -> dict[str, Any]:
    """The processor's name as Linux says it, and how many cores this process may use."""
    name, cpuinfo = sys.platform, Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    affinity = getattr(os, "sched_getaffinity", None)
    return {"processor": name, "cores": len(affinity(0)) if affinity else os.cpu_count()}


BENCH_SCHEMA = "edgellama.bench/1"


def read_bench(path: Path) -> dict[str, Any]:
    """The result of `edgellama bench --json`. Raises InputError."""
    found = read_named_json(path, "benchmark", remedy=_BENCH)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != BENCH_SCHEMA:
        raise InputError(f"{path}: schema is {schema!r:.60}, expected {BENCH_SCHEMA!r}", remedy=_BENCH)
    if not _is_bench(found):
        raise InputError(f"{path}: a benchmark with parts missing or of another kind", remedy=_BENCH)
    return dict(found)


def _is_bench(found: Mapping[str, Any]) -> bool:
    """Whether all is there that a page and a difference are made of."""
    try:
        spreads = [run[key] for row in found["candidates"] for run in row["runs"] for key in _SPREADS]
        ratios = [row[key] for row in found["ratios"] for key in ("prefill", "decode")]
        figures = [
            *(spread[key] for spread in (found["bandwidth"], *spreads) for key in ("median", "low", "high")),
            *(figure for ratio in ratios for figure in (ratio["mean"], *ratio["ci95"])),
            *(row[key] for row in found["candidates"] for key in ("load_s", "peak_resident_bytes")),
            *(run["prompt_tokens"] for row in found["candidates"] for run in row["runs"]),
            *(row["artifact_bytes"] for row in found["candidates"]),
        ]
        names = [
            found["machine"]["processor"],
            *(row[key] for row in found["candidates"] for key in ("name", "runtime")),
            *(row[key] for row in found["ratios"] for key in ("name", "over")),
        ]
        shares = [run["bandwidth_share"] for row in found["candidates"] for run in row["runs"]]
        return (
            bool(spreads)
            and all(isinstance(name, str) for name in names)
            and all(is_number(figure) and figure > 0 for figure in figures)
            and all(share is None or is_number(share) for share in shares)
            and all(len(ratio["ci95"]) == 2 for ratio in ratios)
            and {"cores"} <= found["machine"].keys()
            and {"repeat", "decode_tokens"} <= found.keys()
            and all("threads" in row for row in found["candidates"])
            and all("prompt_tokens" in row for row in found["ratios"])
        )
    except (KeyError, TypeError, AttributeError):
        return False


_SPREADS = ("time_to_first_token_s", "prefill_tok_s", "decode_tok_s")


_BENCH = "Give a file that `edgellama bench --json FILE` wrote."
