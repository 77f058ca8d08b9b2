"""Labels of a classifier: rows of its output layer, and the way from their logits to probabilities.

No torch is imported, so that a bundle's manifest is read fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellama.errors import UsageError
from edgellama.model.guard import UNSAFE, Guard

TEXT = "{text}"  # place of the text in a prompt
SCORE, TOKENS = "score", "tokens"  # kinds of output layers
SINGLE_LABEL = "single_label_classification"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Label:
    """One label.

    Attributes:
        label: its name.
        texts: answers of the model that mean it; empty for a trained head.
        tokens: id of the first token of each text. Each has a row in the output layer.
        description: for people, and for a prompt that lists the labels.
    """

    label: str
    texts: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    description: str = ""


@dataclass(frozen=True)
class Threshold:
    """Least probability of a label that counts as that label.

    Attributes:
        label: the label, for example `unsafe`.
        probability: the least one.
        stated_fpr: share of texts of other labels that may reach it.
        measured_fpr: the share on the texts that it was chosen on.
    """

    label: str
    probability: float
    stated_fpr: float
    measured_fpr: float


@dataclass(frozen=True)
class Calibrated:
    """Calibration of the answers of one artifact.

    Attributes:
        artifact_sha256: hash of the artifact that gave the answers.
        data_sha256: hash of the labelled texts.
        texts: number of texts.
        temperature: the scores are divided by it.
        nll_before, nll_after: mean negative log-likelihood of the labels, nats a text.
        threshold: None if none was asked for.
    """

    artifact_sha256: str
    data_sha256: str
    texts: int
    temperature: float
    nll_before: float
    nll_after: float
    threshold: Threshold | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibrated:
        threshold = data.get("threshold")
        return cls(**{**data, "threshold": None if threshold is None else Threshold(**threshold)})


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary with the tokens of a corpus alone.

    Attributes:
        rows: number of its tokens.
        seen: number of those that the corpus, the prompt and the answers have. Their ids are the first ones.
        unknown: rule for a text with other tokens: `bytes` accepts it in smaller pieces, `refuse` does not.
        corpus_sha256: hash of the corpus.
    """

    rows: int
    seen: int
    unknown: str
    corpus_sha256: str


@dataclass(frozen=True)
class Classifier:
    """A classifier: the meaning of the rows of its output layer, and the tokens that it reads.

    Attributes:
        head: `score` for a trained head, `tokens` for the rows of tokens that a model of the next token answers.
        labels: in the order of the rows. A label with several texts has several rows.
        prompt: a text with TEXT once, in place of the text to classify.
        padding: id of the padding token. The logits after the last other token count. None without padding.
        problem_type: as in config.json.
        prefix: token ids that the prompts of nearly all texts begin with; empty if they are few.
        vocabulary: of a pruned embedding; None for the checkpoint's own.
        guard: policy and further answers of a safety model, whose tokens have rows after those of the labels.

    Raises UsageError for fewer than two labels, equal names, rows without a token, or a prompt without its place.

    >>> classifier = Classifier("tokens", (Label("yes", (" yes", " Yes"), (7, 9)), Label("no", (" no",), (8,))), "{text}?")
    >>> classifier.rows
    3
    >>> classifier.scores(np.log([0.3, 0.2, 0.5])).round(4).tolist() == np.log([0.5, 0.5]).round(4).tolist()
    True
    """

    head: str
    labels: tuple[Label, ...]
    prompt: str
    padding: int | None = None
    problem_type: str = SINGLE_LABEL
    guard: Guard | None = None
    prefix: tuple[int, ...] = ()
    vocabulary: Vocabulary | None = None

    def __post_init__(self) -> None:
        tokens = [len(label.tokens) for label in self.labels]
        expected = [len(label.texts) for label in self.labels]
        problem = (
            f"the prompt {self.prompt!r:.80} does not hold {TEXT} once"
            if self.prompt.count(TEXT) != 1
            else f"there are {len(self.labels)} labels, of different names"
            if len(self.labels) < 2 or len({*self.names}) < len(self.labels)
            else "a label has no row of its own"
            if self.head == TOKENS and (tokens != expected or 0 in tokens)
            else f"a guard has no token for the label {UNSAFE}"
            if self.guard is not None and (self.head != TOKENS or UNSAFE not in self.names)
            else None
        )
        if problem is not None:
            raise UsageError(f"not a classifier: {problem}", remedy="Give two labels at least, and a prompt.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(label.label for label in self.labels)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token id of each row; empty for a trained head."""
        of_labels = tuple(token for label in self.labels for token in label.tokens)
        further = () if self.guard is None else self.guard.tokens
        return (*of_labels, *(token for token in further if token not in of_labels))

    @property
    def unsafe_token(self) -> int:
        """Token id that begins the answer `unsafe` of a guard."""
        return next(label.tokens[0] for label in self.labels if label.label == UNSAFE)

    @property
    def rows(self) -> int:
        """Rows of the output layer."""
        return len(self.tokens) if self.head == TOKENS else len(self.labels)

    def scores(self, logits: npt.ArrayLike) -> Floats:
        """Score of each label: logits [..., rows] -> float64 [..., labels].

        The score of a label with several rows is the logarithm of the sum of their exponentials. Rows of a guard's
        further answers do not count.
        """
        values = np.asarray(logits, np.float64)
        if self.head == SCORE:
            return values
        starts = np.cumsum([0, *(len(label.tokens) for label in self.labels)])
        joined: Floats = np.logaddexp.reduceat(values[..., : starts[-1]], starts[:-1], axis=-1)
        return joined

    def to_dict(self) -> dict[str, Any]:
        """The classifier as JSON data, in the form that a manifest holds."""
        labels = [
            {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(x).items()} for x in self.labels
        ]
        guard = {} if self.guard is None else {"guard": self.guard.to_dict()}
        prefix = {"prefix": list(self.prefix)} if self.prefix else {}
        vocabulary = {} if self.vocabulary is None else {"vocabulary": asdict(self.vocabulary)}
        optional = ("guard", "prefix", "vocabulary")
        plain = {key: value for key, value in asdict(self).items() if key not in optional}
        return {**plain, "labels": labels, "pooling": "last", **guard, **prefix, **vocabulary}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Classifier:
        """Inverse of `to_dict`. Other keys are ignored."""
        labels = tuple(
            Label(x["label"], tuple(x["texts"]), tuple(x["tokens"]), x["description"]) for x in data["labels"]
        )
        guard = Guard.from_dict(data["guard"]) if "guard" in data else None
        return cls(
            data["head"],
            labels,
            data["prompt"],
            data["padding"],
            data["problem_type"],
            guard,
            tuple(data.get("prefix", ())),
            Vocabulary(**data["vocabulary"]) if "vocabulary" in data else None,
        )


def log_probabilities(scores: Floats, temperature: float = 1.0) -> Floats:
    """Log-probabilities of labels: scores float64 [..., labels] -> the same shape."""
    scaled = scores / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    logs: Floats = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return logs
