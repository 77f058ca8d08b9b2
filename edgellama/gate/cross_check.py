"""Cross-check: the checkpoint, read and run by transformers, against edgellama's own reader and model.

Both references of the gate are read by the same code, so a fault of a reader shows in neither. transformers
reads the same files with its own readers. Three things are compared: the logits of 64 tokens, the rotary
angles up to the end of the context, and the token ids of probe texts.

transformers is optional. It cannot read everything that edgellama reads. The report says if the cross-check
was done, or the reason why not.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.errors import MissingDependencyError
from edgellama.files import digest, to_json
from edgellama.gate.limits import CROSS_CHECK_ANGLE, CROSS_CHECK_KL
from edgellama.gate.structure import PROBES
from edgellama.gate.subject import Section
from edgellama.gate.transformers_reading import Foreign, is_layered, quiet, read_foreign
from edgellama.host.cache import cache_directory
from edgellama.host.memory import available_memory
from edgellama.host.versions import tools
from edgellama.model.llama import rope_tables
from edgellama.report import Check, check

LENGTH = 64  # tokens that are compared
_LAYERED_BYTES = 1 << 30  # of memory, where one layer is read at a time
REMEDY = "pip install 'edgellama[cross-check]'"


def check_installed() -> None:
    """Raises MissingDependencyError if transformers is not installed."""
    if installed_version() is None:
        raise MissingDependencyError(
            "a cross-check needs the package 'transformers', which is not installed", remedy=REMEDY
        )


def installed_version() -> str | None:
    """Version of transformers; None if it is not installed."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def examine_cross_check(checkpoint: Checkpoint, full: StreamedLlama, context_length: int) -> Section:
    """Compares a checkpoint with transformers' reading of the same files.

    full: the full-precision model, as edgellama read it.
    context_length: of the bundle. The rotary angles are compared up to there.
    """
    check_installed()
    reason = _not_possible(checkpoint)
    if reason is not None:
        return _not_done(reason)
    tokens = checkpoint.tokenizer.encode(" ".join(PROBES))[: min(LENGTH, context_length)]
    positions = torch.arange(min(checkpoint.config.max_position_embeddings, context_length))
    try:
        with quiet():
            foreign = read_foreign(checkpoint, tokens, positions)
    except Exception as error:  # noqa: BLE001 (its libraries have errors of every class)
        return _not_done(f"transformers cannot read it: {type(error).__name__}: {error}"[:300])
    checks, figures = compare(checkpoint, full, tokens, foreign)
    remember(checkpoint, passed=all(c.verdict == "pass" for c in checks))
    fields = {"done": True, "reason": None, "transformers": installed_version(), **figures}
    return Section(tuple(checks), {"cross_check": fields})


def first_cross_check(checkpoint: Checkpoint, full: StreamedLlama, context_length: int) -> Section:
    """The cross-check of an export: done once for each checkpoint, if transformers is installed.

    What was done is remembered in the cache. Without a cache it is left to `validate --cross-check`.
    """
    if installed_version() is None:
        return _not_done("transformers is not installed")
    entry = _entry(checkpoint)
    if entry is None:
        return _not_done("the cache is off, and it remembers which checkpoints were cross-checked")
    if entry.is_file():
        return _not_done("an earlier export of this checkpoint did it")
    return examine_cross_check(checkpoint, full, context_length)


def _not_done(reason: str) -> Section:
    return Section(
        fields={"cross_check": {"done": False, "reason": reason, "transformers": installed_version()}}
    )


@torch.no_grad()
def compare(
    checkpoint: Checkpoint, full: StreamedLlama, tokens: list[int], foreign: Foreign
) -> tuple[list[Check], dict[str, float]]:
    """(checks, figures) of a checkpoint against transformers' reading of it."""
    own = full.logits(tokens).double()
    other = foreign.logits.double()
    if own.shape == other.shape:
        logs, other_logs = own.log_softmax(-1), other.log_softmax(-1)
        kl = float((other_logs.exp() * (other_logs - logs)).sum(-1).max())
        largest = float((logs - other_logs).abs().max())
    else:
        kl = largest = float("inf")
    half = checkpoint.config.head_dim // 2
    count = len(foreign.cosines)
    cos, sin = (table[:, 0] for table in rope_tables(checkpoint.config, count))
    angles = max(
        float((cos - foreign.cosines[:, :half]).abs().max()),
        float((sin - foreign.sines[:, :half]).abs().max()),
    )
    checks = [
        check(
            "cross_check.logits",
            kl <= CROSS_CHECK_KL,
            value=kl,
            limit=CROSS_CHECK_KL,
            detail=f"largest KL to transformers {installed_version()} on {len(tokens)} tokens",
        ),
        check(
            "cross_check.rope",
            angles <= CROSS_CHECK_ANGLE,
            value=angles,
            limit=CROSS_CHECK_ANGLE,
            detail=f"largest difference of the rotary tables up to position {count - 1}",
        ),
    ]
    if foreign.ids is not None:
        checks.append(_tokenizer_check(checkpoint, foreign.ids))
    return checks, {"kl": kl, "max_abs": largest, "rope_max_abs": angles}


def _tokenizer_check(checkpoint: Checkpoint, probe_ids: list[list[int]]) -> Check:
    differing = [
        probe
        for probe, ids in zip(PROBES, probe_ids, strict=True)
        if checkpoint.tokenizer.encode(probe) != ids
    ]
    return check(
        "cross_check.tokenizer",
        not differing,
        value=len(differing),
        limit=0,
        detail=f"other ids than transformers for {differing[0][:40]!r}" if differing else "",
    )


def _not_possible(checkpoint: Checkpoint) -> str | None:
    """Reason why transformers cannot judge a checkpoint; None if it can."""
    config = checkpoint.config
    if not checkpoint.as_opened:
        return "the checkpoint exists only in memory"
    if checkpoint.adapters:
        return "transformers reads the base without its adapters"
    if checkpoint.format == "meta":
        return "no independent reader: transformers does not read Meta's files"
    if checkpoint.format == "gguf" and (config.attention_bias or config.mlp_bias):
        return "transformers does not read biases from GGUF files"
    if checkpoint.format == "gguf" and config.rope_scaling is not None:
        return "transformers does not read the scaling of RoPE from GGUF files"
    needed = _LAYERED_BYTES if is_layered(checkpoint) else 6 * config.parameters
    free = available_memory()
    if free is not None and needed > free:
        return f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None


def remember(checkpoint: Checkpoint, *, passed: bool) -> None:
    """Notes in the cache that a checkpoint passed its cross-check. One that failed is checked every time."""
    entry = _entry(checkpoint)
    if entry is None or not passed:
        return
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(to_json({"transformers": installed_version()}), encoding="utf-8")


def _entry(checkpoint: Checkpoint) -> Path | None:
    """Cache file of a checkpoint under the versions in use; None if the cache is off."""
    root = cache_directory()
    if root is None:
        return None
    key = {
        "checkpoint": checkpoint.sha256(),
        "config": checkpoint.config_sha256(),
        "tokenizer": digest(json.loads(checkpoint.tokenizer.files["tokenizer.json"])),
        "tools": tools(("transformers",)),
    }
    return root / "cross-check" / f"{digest(key)}.json"
