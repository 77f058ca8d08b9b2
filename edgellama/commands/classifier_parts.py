"""Parts of a classifier's bundle that are computed on its artifacts: temperature, threshold, beginning of the prompt."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.prefix import DIRECTORY, write_prefix
from edgellama.commands.classify_task import ClassifyTask
from edgellama.errors import CheckFailed
from edgellama.gate.answer_calibration import calibrated
from edgellama.gate.labelled import artifact_logits, token_ids
from edgellama.host.progress import Progress
from edgellama.host.threads import one_thread
from edgellama.runtimes.load import load
from edgellama.runtimes.prefix import Prefix, computed


def calibrations(bundle: Bundle, task: ClassifyTask, progress: Progress) -> dict[str, Any]:
    """Temperature and threshold of each artifact of a staged bundle, by target; empty without texts for them."""
    texts, classifier = task.tune, bundle.classifier
    if texts is None or classifier is None:
        return {}
    sequences = token_ids(texts, classifier, bundle.tokenizer, bundle.context_length)
    truth, found = np.array(texts.truth(classifier.names)), {}
    for target in bundle.targets:
        with progress.stage(f"calibrate answers of {target}"), one_thread(), load(bundle, target) as artifact:
            prefix = Prefix(classifier.prefix)
            scores = classifier.scores(artifact_logits(artifact, sequences, progress, prefix).numpy())
        if not np.isfinite(scores).all():
            raise CheckFailed(
                f"the {target} artifact gives logits that are not finite, so its answers cannot be calibrated",
                remedy="Use a recipe with more bits, or another target.",
            )
        found[target] = asdict(
            calibrated(
                scores,
                truth,
                names=classifier.names,
                positive=task.positive,
                fpr=task.fpr,
                artifact_sha256=bundle.artifact_sha256(target),
                data_sha256=texts.sha256,
            )
        )
    return found


def prefix_files(bundle: Bundle, task: ClassifyTask, progress: Progress) -> dict[str, str]:
    """Writes the files of the prompt's beginning into a staged bundle. Returns their paths by target, empty for none."""
    classifier, found = bundle.classifier, {}
    if not task.prefix or classifier is None or not classifier.prefix:
        return {}
    for target in bundle.targets:
        with progress.stage(f"prefix of {target}"), one_thread(), load(bundle, target) as artifact:
            if artifact.cache_is_input:
                name = f"{DIRECTORY}/{target}.safetensors"
                arrays = computed(artifact, classifier.prefix)
                write_prefix(bundle.path / name, classifier.prefix, bundle.artifact_sha256(target), arrays)
                found[target] = name
    return found
