"""Classification: a text, the bundle's prompt around it, one call of the artifact, and the probabilities of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellama.bundle import Bundle
from edgellama.errors import BundleError, UsageError
from edgellama.model.guard import UNSAFE, Message
from edgellama.model.labels import Calibrated, Classifier, log_probabilities
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.guard import answered_categories, check_finite
from edgellama.runtimes.prefix import Prefix, prefill
from edgellama.text.label_prompt import prompt_ids
from edgellama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Classification:
    """The answer about one text.

    Attributes:
        label: the most probable label, the first of equal ones.
        probabilities: by label, in the order of the bundle.
        flagged: whether the label of the bundle's threshold reaches it; None without a threshold.
        tokens: number of tokens that were read.
        categories: codes of the violated categories, of a guard; None for another classifier.
    """

    label: str
    probabilities: dict[str, float]
    flagged: bool | None
    tokens: int
    categories: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON data, without categories unless a guard gave it."""
        return {key: value for key, value in asdict(self).items() if key != "categories" or value is not None}


@dataclass(frozen=True)
class TextClassifier:
    """Prompt, labels and calibration of one artifact of a bundle.

    artifact_sha256: hash of the artifact. prefix_file: keys and values of the prompt's beginning; None to compute them.
    """

    classifier: Classifier
    tokenizer: Tokenizer
    calibrated: Calibrated | None
    artifact_sha256: str
    prefix_file: Path | None = None

    @classmethod
    def of(cls, bundle: Bundle, target: str) -> TextClassifier | None:
        """The classifier of a bundle; None for a bundle that generates text."""
        if bundle.classifier is None:
            return None
        sha256 = bundle.artifact_sha256(target)
        calibration, file = bundle.calibrated(target), bundle.prefix_file(target)
        return cls(bundle.classifier, bundle.tokenizer, calibration, sha256, file)

    @property
    def prefix(self) -> Prefix:
        """Fixed beginning of its prompts."""
        return Prefix(self.classifier.prefix, self.prefix_file, self.artifact_sha256)

    def classify(self, runtime: Runtime, text: str | Sequence[Message]) -> Classification:
        """The answer of `runtime` about a text, or a guard's about the last message of a conversation.

        Its KV cache holds the prompt afterwards. A guard's categories are read if the label is `unsafe`, or if the
        threshold flags it.

        Raises UsageError for an empty text, ContextLengthError for one that does not fit, and BundleError for a
        calibration of another artifact or logits that are not finite.
        """
        self.check()
        tokens = prompt_ids(self.classifier, self.tokenizer, text, runtime.context_length)
        answer = self.answer(prefill(runtime, tokens, self.prefix), len(tokens))
        if self.classifier.guard is None:
            return answer
        categories = answered_categories(runtime, self.classifier) if self._unsafe(answer) else ()
        return replace(answer, categories=categories)

    def check(self) -> None:
        """Raises BundleError for a calibration of another artifact, or a threshold of an unknown label."""
        if self.calibrated is not None and self.calibrated.artifact_sha256 != self.artifact_sha256:
            raise BundleError(
                "temperature and threshold in the manifest were computed on another artifact",
                remedy="Export the bundle again, with --tune.",
            )
        threshold = None if self.calibrated is None else self.calibrated.threshold
        if threshold is not None and threshold.label not in self.classifier.names:
            raise BundleError(
                f"the threshold in the manifest is of {threshold.label!r:.60}, which is no label",
                remedy="Export the bundle again.",
            )

    def _unsafe(self, answer: Classification) -> bool:
        """True for the label `unsafe`, and for another one if the threshold flags `unsafe`."""
        threshold = None if self.calibrated is None else self.calibrated.threshold
        flagged = answer.flagged and threshold is not None and threshold.label == UNSAFE
        return answer.label == UNSAFE or bool(flagged)

    def answer(self, logits: npt.ArrayLike, tokens: int) -> Classification:
        """The answer that logits [rows] give.

        tokens: number of tokens that were read. Raises BundleError for logits that are not finite.
        """
        temperature = 1.0 if self.calibrated is None else self.calibrated.temperature
        threshold = None if self.calibrated is None else self.calibrated.threshold
        check_finite(logits)
        with np.errstate(over="ignore", invalid="ignore"):
            scores = self.classifier.scores(logits)
            shares = np.exp(log_probabilities(scores, temperature))
        check_finite(shares)
        probabilities = dict(zip(self.classifier.names, shares.tolist(), strict=True))
        flagged = None if threshold is None else probabilities[threshold.label] >= threshold.probability
        return Classification(self.classifier.names[int(scores.argmax())], probabilities, flagged, tokens)


def refuse_classifier(bundle: Bundle) -> None:
    """Raises UsageError for a bundle that classifies texts, where text is to be generated or scored."""
    if bundle.classifier is not None:
        raise UsageError(
            f"{bundle.path} classifies texts ({', '.join(bundle.classifier.names[:6])}), and predicts no next token",
            remedy="Use `edgellama classify`, or export the checkpoint without --task classify.",
        )
