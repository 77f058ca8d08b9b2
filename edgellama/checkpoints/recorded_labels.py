"""A checkpoint as the classifier that a bundle records, to judge the bundle's own labels."""

from __future__ import annotations

from dataclasses import replace

from edgellama.checkpoints.checkpoint import Checkpoint
from edgellama.checkpoints.guard import as_guard, recorded_categories
from edgellama.checkpoints.labels import as_classifier
from edgellama.checkpoints.pruned_vocabulary import with_kept
from edgellama.model.labels import TOKENS, Classifier
from edgellama.text.pruned_vocabulary import kept_ids, seen_of
from edgellama.text.tokenizer import Tokenizer


def as_recorded(checkpoint: Checkpoint, recorded: Classifier, tokenizer: Tokenizer) -> Checkpoint:
    """The checkpoint as the classifier that a bundle records, with labels and ids of the checkpoint itself.

    tokenizer: the bundle's, which names the rows of a pruned vocabulary.
    """
    given = checkpoint.classifier
    if given is not None and (
        given.guard is not None or given.vocabulary is not None or given.head == TOKENS
    ):
        return checkpoint  # of the export that made the bundle
    vocabulary = recorded.vocabulary
    if vocabulary is not None:
        kept = kept_ids(tokenizer, checkpoint.tokenizer, vocabulary.rows)
        vocabulary = replace(vocabulary, seen=seen_of(kept))
        checkpoint = with_kept(checkpoint, kept, vocabulary.seen)
    if recorded.guard is not None:
        found = as_guard(checkpoint, recorded_categories(recorded.guard))
    elif checkpoint.classifier is not None:
        found = as_classifier(checkpoint, None, recorded.prompt)
    else:
        found = as_classifier(checkpoint, recorded.labels, recorded.prompt)
    if vocabulary is None or found.classifier is None:
        return found
    return found.with_options(classifier=replace(found.classifier, vocabulary=vocabulary))
