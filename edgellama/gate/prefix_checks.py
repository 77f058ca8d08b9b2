"""Checks of a prompt's fixed beginning, named `labels.prefix*`.

The beginning is fed once and stays in the KV cache, or comes out of the bundle. Either way each prompt has to give the
logits that it gives in one call. Keys and values of the bundle are computed again, because a beginning of another policy
may change the answers by less than rounding does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.prefix import read_prefix
from edgellama.errors import BundleError
from edgellama.gate.differences import claim, differences
from edgellama.gate.labelled import artifact_logits
from edgellama.gate.metrics import compare
from edgellama.gate.noise import Noise, geometric_mean, worst
from edgellama.host.progress import Progress
from edgellama.report import Check, below
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.prefix import Prefix, computed
from edgellama.targets import Target
from edgellama.text.label_prompt import with_prefix

# Largest relative deviation of a token's keys or values in a layer. Another token deviates by 1, another processor by
# hundredths.
DEVIATION = 0.1


def check_prefix(
    bundle: Bundle,
    target: Target,
    artifact: Runtime,
    prompts: Sequence[Sequence[int]],
    noise: Noise,
    progress: Progress,
) -> list[Check]:
    """Checks that a prompt behind its fixed beginning gives the logits of the whole prompt.

    Empty for a bundle without a beginning. prompts: token ids. noise: noise floor of parity.
    """
    classifier = bundle.classifier
    if classifier is None or not classifier.prefix:
        return []
    own = with_prefix(classifier, bundle.tokenizer).prefix
    problems = differences(classifier.prefix, own, "classifier.prefix")
    prefix, values = Prefix(classifier.prefix), list[Check]()
    try:
        if (file := bundle.prefix_file(target.name)) is not None:
            sha256 = bundle.artifact_sha256(target.name)
            shipped = read_prefix(file, classifier.prefix, sha256)
            prefix = Prefix(classifier.prefix, file, sha256)
            values = [_check_values(shipped, computed(artifact, classifier.prefix))]
    except BundleError as error:
        problems.append(error.message)
    whole = artifact_logits(artifact, prompts, progress)
    artifact.reset()
    try:
        behind = artifact_logits(artifact, prompts, progress, prefix)
    except BundleError as error:
        return [claim("labels.prefix", [*problems, error.message])]
    positions, allowed = compare(whole, behind, None), noise.limits(target.parity_kl)
    detail = f"{len(classifier.prefix)} tokens, {'restored' if prefix.file else 'computed once'}"
    return [
        claim("labels.prefix", problems, detail=detail),
        *values,
        below(
            "labels.prefix_parity",
            geometric_mean(positions.kl),
            allowed.run,
            detail=f"{detail}, against whole prompts",
        ),
        below("labels.prefix_parity_worst", worst(positions.kl), allowed.position, detail=detail),
    ]


def _check_values(shipped: Mapping[str, Any], own: Mapping[str, Any]) -> Check:
    """Check that shipped keys and values are those that the artifact computes, for each token and layer."""
    deviations = [
        np.linalg.norm(shipped[name] - own[name], axis=(1, 3)) / np.linalg.norm(own[name], axis=(1, 3))
        for name in own
        if name in shipped and shipped[name].shape == own[name].shape
    ]
    whole = len(deviations) == len(own) == len(shipped) and bool(own)
    largest = float(np.max(deviations)) if whole else float("inf")
    detail = (
        "largest deviation of a token in a layer" if whole else "other names or shapes than the artifact's"
    )
    return below("labels.prefix_values", largest, DEVIATION, detail=detail)
