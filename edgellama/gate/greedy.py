"""Greedy continuations of the artifact and of the full-precision model, and how long they stay equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.gate import metrics
from edgellama.runtimes.base import Runtime
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Window

GREEDY_PROMPT_TOKENS, GREEDY_TOKENS = 32, 24


def greedy(
    artifact: Runtime, full: StreamedLlama, samples: Sequence[Window], tokenizer: Tokenizer
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy continuations of both models from the beginnings of the samples.

    Returns figures for the section `quality`, and a row of texts for each sample. The agreement is the mean
    length of the common prefix, as a share of the continuation. Returns nothing if the context leaves no room
    for a continuation.
    """
    count = min(GREEDY_TOKENS, artifact.context_length - GREEDY_PROMPT_TOKENS)
    if count < 1:
        return {}, []
    rows: list[dict[str, Any]] = []
    prompts = [window.tokens[:GREEDY_PROMPT_TOKENS] for window in samples]
    continuations = full.continue_greedily(prompts, count)
    for window, prompt, reference_ids in zip(samples, prompts, continuations, strict=True):
        artifact_ids = _continue(artifact, prompt, count)
        equal = metrics.common_prefix(reference_ids, artifact_ids)
        shared, *texts = (
            tokenizer.decode(ids) for ids in (reference_ids[:equal], reference_ids, artifact_ids)
        )
        rows.append(
            {
                "domain": window.domain,
                "prompt": tokenizer.decode(prompt),
                "reference": texts[0],
                "artifact": texts[1],
                "tokens": count,
                "equal_tokens": equal,
                "equal_characters": min(metrics.common_prefix(shared, text) for text in texts),
            }
        )
    share = sum(row["equal_tokens"] / count for row in rows) / len(rows)
    return {"greedy_prefix_agreement": share, "greedy_tokens": count}, rows


def _continue(runtime: Runtime, prompt: Sequence[int], count: int) -> list[int]:
    runtime.reset()
    tokens: list[int] = []
    logits = runtime.forward(prompt)
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = runtime.forward(tokens[-1:])
    return tokens
