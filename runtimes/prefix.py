"""Prefill behind a fixed beginning of the prompt, which is computed once and stays in the KV cache.

The beginning is fed in one call, or restored from the bundle where the cache is an input. Then each text continues
from its end, so the result never depends on the text before. Tokens that begin otherwise are fed whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellama.bundle.prefix import read_prefix
from edgellama.runtimes.base import Logits, Runtime


@dataclass(frozen=True)
class Prefix:
    """Fixed beginning of a prompt.

    Attributes:
        tokens: its token ids; empty for none.
        file: keys and values of these tokens, for the artifact of `artifact_sha256`; None to compute them.
    """

    tokens: tuple[int, ...] = ()
    file: Path | None = None
    artifact_sha256: str = ""


def prefill(runtime: Runtime, tokens: Sequence[int], prefix: Prefix) -> Logits:
    """Logits after `tokens` from position 0: float32 [output_size]. The KV cache holds them afterwards.

    Raises BundleError for a file of other tokens or of another artifact.
    """
    count = len(prefix.tokens)
    if not runtime.can_rewind or not 0 < count < len(tokens) or tuple(tokens[:count]) != prefix.tokens:
        runtime.reset()
        return runtime.forward(tokens)
    if runtime.cached[:count] == prefix.tokens:
        runtime.rewind(count)
    elif prefix.file is not None and runtime.cache_is_input:
        arrays = read_prefix(prefix.file, prefix.tokens, prefix.artifact_sha256)
        runtime.restore(prefix.tokens, arrays)
    else:
        runtime.reset()
        runtime.forward(prefix.tokens)
    return runtime.forward(tokens[count:])


def computed(
    runtime: Runtime, tokens: Sequence[int]
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Keys and values of a beginning, for the bundle: float32 by name."""
    runtime.reset()
    runtime.forward(tokens)
    return runtime.cache(len(tokens))
