"""Categories of a guard's answer, written greedily among the tokens that may follow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellama.errors import BundleError
from edgellama.model.labels import Classifier
from edgellama.runtimes.base import Runtime

CALLS = 6  # at most, after the prefill; a call chooses a token, and tokens without a choice are fed with it


def answered_categories(runtime: Runtime, classifier: Classifier) -> tuple[str, ...]:
    """Codes of the categories after the token `unsafe`, in the order of the answer.

    The KV cache holds the prompt. Tokens that are no choice, such as the line feed, are fed together with the next
    call. Codes that are complete after CALLS calls count, and so do those before the end of the context.
    Raises BundleError for logits that are not finite.
    """
    guard = classifier.guard
    assert guard is not None
    rows = {token: row for row, token in enumerate(classifier.tokens)}
    answer, pending, calls = guard.start(), [classifier.unsafe_token], 0
    while True:
        allowed = answer.allowed()
        if len(allowed) > 1:
            if calls == CALLS or runtime.position + len(pending) > runtime.context_length:
                break
            logits, pending, calls = runtime.forward(pending), [], calls + 1
            check_finite(logits)
            chosen = max(allowed, key=lambda token: float(logits[rows[token]]))
        else:
            chosen = allowed[0]
        following = answer.then(chosen)
        if following is None:
            break
        answer = following
        pending.append(chosen)
    return answer.codes


def check_finite(logits: npt.ArrayLike) -> None:
    """Raises BundleError for logits [rows] that are not finite."""
    if not np.isfinite(logits).all():
        raise BundleError(
            "the artifact gave logits that are no finite numbers, so there is no answer",
            remedy="Run `edgellama validate` on the bundle, and export it again.",
        )
