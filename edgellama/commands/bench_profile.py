"""Verb `bench --profile`: where the time of a decoded token goes, by part of the model.

ExecuTorch's tracer times every call and every operator inside a delegate. The artifact is loaded twice, with the
tracer and without, and both decode in turns: the difference is what the tracer costs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from edgellama.commands.bench import PROMPT_TOKENS, Artifact, Candidate, Spread, fitting_lengths, machine
from edgellama.errors import UsageError
from edgellama.host.executorch_versions import installed_executorch
from edgellama.host.progress import Progress
from edgellama.runtimes.base import Runtime
from edgellama.targets.xnnpack.profile import PARTS, seconds_by_part

if TYPE_CHECKING:
    from edgellama.runtimes.xnnpack_profile import TracedPte

SCHEMA = "edgellama.profile/1"
TARGET = "xnnpack"
DECODE_TOKENS = 16
REPEAT = 5
OUTSIDE = "outside"  # of the method: the tracer's own work, ExecuTorch's bindings, and Python


@dataclass(frozen=True)
class Turn:
    """Seconds of a decoded token: without the tracer, with it, and of each part in the traced run."""

    plain: float
    traced: float
    parts: Mapping[str, float]


def profile(
    compared: Sequence[Candidate],
    *,
    prompt_tokens: Sequence[int] = PROMPT_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
    repeat: int = REPEAT,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time of a decoded token by part of the model, as JSON data (schema `edgellama.profile/1`).

    Args:
        compared: the artifacts. Those of other targets than `xnnpack` are left out.
        prompt_tokens: lengths of the prompts. Decoding starts at that depth of the cache.
        decode_tokens: tokens decoded after each prompt, one a call.
        repeat: turns that count, after one that does not.
        threads: None for the runtime's own number. A number replaces ExecuTorch's thread pool, which methods that this
            process has loaded before still use. They must not run again.
        progress: reporter of the bar.

    Times are seconds. Shares are those of the turn whose traced decoding took the median time, as this process sees
    it. They add up to 1, and those without OUTSIDE to `covered`.

    Raises UsageError if no artifact is for `xnnpack`, MissingDependencyError if ExecuTorch has no tracer.
    """
    chosen = [c for c in compared if isinstance(c, Artifact) and c.target == TARGET]
    if not chosen:
        raise UsageError(
            f"only {TARGET} artifacts can be profiled: no other runtime tells the time of its operators",
            remedy=f"Export the model with -t {TARGET}, or measure it without --profile.",
        )
    progress = progress or Progress()
    lengths = fitting_lengths(chosen, prompt_tokens, decode_tokens)
    rows: list[dict[str, Any]] = []
    pairs = _Pairs(threads)
    with progress.bar("profile", len(chosen) * len(lengths) * (repeat + 1), "runs") as bar:
        for candidate in chosen:
            with pairs.load(candidate) as pair:
                for length in lengths:
                    turns = []
                    for _ in range(repeat + 1):
                        turns.append(pair.turn(length, decode_tokens))
                        bar.update(1)
                    row = {"name": candidate.name, "threads": pair.threads, "prompt_tokens": length}
                    rows.append(row | _summary(turns[1:]))
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "executorch": installed_executorch(),
        "decode_tokens": decode_tokens,
        "repeat": repeat,
        "rows": rows,
    }


class _Pairs:
    """Loads artifacts. The first load alone sets the number of threads, so that no method loses its pool."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads

    def load(self, candidate: Artifact) -> _Pair:
        from edgellama.runtimes.xnnpack import PteRuntime
        from edgellama.runtimes.xnnpack_profile import TracedPte

        path = candidate.bundle.artifact(candidate.target)
        traced = TracedPte(path, threads=self.threads)
        self.threads = None
        return _Pair(traced, PteRuntime(path))


@dataclass(frozen=True)
class _Pair:
    """An artifact loaded with and without the tracer."""

    traced: TracedPte
    plain: Runtime

    @property
    def threads(self) -> int:
        return self.plain.threads

    def turn(self, length: int, decode_tokens: int) -> Turn:
        """Decodes after a prompt of `length` tokens, without the tracer and with it."""
        plain = _decode(self.plain, length, decode_tokens)
        traced = _decode(self.traced, length, decode_tokens)
        runs = [seconds_by_part(run) for run in self.traced.take_profile()[-decode_tokens:]]
        parts = {part: sum(run[part] for run in runs) / decode_tokens for part in PARTS}
        return Turn(plain, traced, parts | {OUTSIDE: max(0.0, traced - sum(parts.values()))})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()
        self.traced.close()


def _decode(runtime: Runtime, length: int, decode_tokens: int) -> float:
    """Seconds of a decoded token."""
    runtime.reset()
    logits = runtime.forward([(7919 * i + 11) % runtime.vocab_size for i in range(length)])
    start = time.perf_counter()
    for _ in range(decode_tokens):
        logits = runtime.forward([int(logits.argmax())])
    return (time.perf_counter() - start) / decode_tokens


def _summary(turns: Sequence[Turn]) -> dict[str, Any]:
    typical = sorted(turns, key=lambda turn: turn.traced)[len(turns) // 2]
    parts: list[dict[str, Any]] = [
        {
            "part": part,
            "seconds": asdict(Spread.of([turn.parts[part] for turn in turns])),
            "share": typical.parts[part] / sum(typical.parts.values()),
        }
        for part in (*PARTS, OUTSIDE)
    ]
    return {
        "decode_s": asdict(Spread.of([turn.plain for turn in turns])),
        "traced_decode_s": asdict(Spread.of([turn.traced for turn in turns])),
        "parts": parts,
        "covered": 1 - parts[-1]["share"],
    }
