"""A checkpoint as the classifier that a bundle records, to judge the bundle's own labels."""

from __future__ import annotations

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.guard import as_guard, recorded_categories
from edgellama.checkpoints.labels import as_classifier
from edgellama.model.labels import Classifier


def as_recorded(checkpoint: Checkpoint, recorded: Classifier) -> Checkpoint:
    """The checkpoint as the classifier that a bundle records, with labels and ids of the checkpoint itself."""
    if checkpoint.classifier is not None and checkpoint.classifier.guard is not None:
        return checkpoint  # of the export that made the bundle
    if recorded.guard is not None:
        return as_guard(checkpoint, recorded_categories(recorded.guard))
    if checkpoint.classifier is not None:
        return as_classifier(checkpoint, None, recorded.prompt)
    return as_classifier(checkpoint, recorded.labels, recorded.prompt)
