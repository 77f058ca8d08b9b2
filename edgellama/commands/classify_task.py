"""Task of an export that makes a classifier: labels, prompt, labelled texts and limits, checked before the slow part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.errors import UsageError
from edgellama.files import digest
from edgellama.model.labels import Label
from edgellama.recipe import BUDGETED, GIVEN, Recipe
from edgellama.text.labelled import LabelledTexts, read_labelled

if TYPE_CHECKING:
    from edgellama.checkpoints import Checkpoint
    from edgellama.checkpoints.pruned_vocabulary import Corpus
    from edgellama.gate.labelled import LabelLimits

TARGETS = ("xnnpack", "onnx", "coreml", "coreml-pte")
# Reasons why another target cannot hold an output layer of labels.
_UNABLE = {
    "gguf": "llama.cpp reads an output layer as wide as the vocabulary, and its pooled heads were not tried for a Llama",
    "mlx": "mlx_lm reads an output layer as wide as the vocabulary",
}


@dataclass(frozen=True)
class ClassifyTask:
    """Options of `export --task classify`.

    Attributes:
        labels: answers of a model of the next token; None for a trained head.
        prompt: the text around the text to classify; None for none.
        data: labelled texts for the gate; None to leave its checks `data.*` out.
        tune: labelled texts for temperature and threshold, none of them in `data`; None for no calibration.
        positive: label of the threshold.
        fpr: share of false positives at the threshold.
        max_flips, max_fpr_increase: see `LabelLimits`.
        prefix: ship the keys and values of the prompt's fixed beginning, where the KV cache is an input.
        corpus: texts whose tokens alone stay in the embedding; None for all tokens.
        guard: the checkpoint is a Llama Guard, with labels and prompt of its own.
        categories: policy of a guard, names by code; None for that of its chat template.
    """

    labels: tuple[Label, ...] | None = None
    prompt: str | None = None
    data: LabelledTexts | None = field(default=None, repr=False)
    tune: LabelledTexts | None = field(default=None, repr=False)
    positive: str | None = None
    fpr: float | None = None
    max_flips: float | None = None
    max_fpr_increase: float | None = None
    guard: bool = False
    categories: Mapping[str, str] | None = None
    prefix: bool = False
    corpus: Corpus | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.guard and (self.labels is not None or self.prompt is not None):
            raise UsageError(
                "a guard's labels are safe and unsafe, and its chat template is its prompt",
                remedy="Leave out --labels and --prompt, or use --task classify.",
            )
        if self.categories is not None and not self.guard:
            raise UsageError("--categories is for a guard", remedy="Use --task guard.")
        if (self.positive is None) != (self.fpr is None) or (self.positive is not None and self.tune is None):
            raise UsageError(
                "a threshold needs a label, a stated false-positive rate and labelled texts to choose it on",
                remedy="Give --positive LABEL, --fpr X and --tune FILE together.",
            )
        if self.fpr is not None and not 0 < self.fpr < 1:
            raise UsageError(f"--fpr must lie in (0, 1), got {self.fpr!r}", remedy="Correct the rate.")
        if self.data is None and (self.max_flips is not None or self.max_fpr_increase is not None):
            raise UsageError("a limit on labelled texts was given without them", remedy="Add --data FILE.")
        if self.data is not None and self.tune is not None:
            seen = {row.text for row in self.tune.rows}
            common = next((row.text for row in self.data.rows if row.text in seen), None)
            if common is not None:
                raise UsageError(
                    f"{self.data.name} and {self.tune.name} both hold the text {common!r:.60}",
                    remedy="Judge the classifier on texts that its threshold was not chosen on.",
                )

    @classmethod
    def read(
        cls,
        *,
        labels: str | Path | None = None,
        prompt: str | None = None,
        data: str | Path | None = None,
        tune: str | Path | None = None,
        positive: str | None = None,
        fpr: float | None = None,
        max_flips: float | None = None,
        max_fpr_increase: float | None = None,
        guard: bool = False,
        categories: str | Path | None = None,
        prefix: bool = False,
        prune_vocabulary: str | Path | None = None,
        unknown: str | None = None,
    ) -> ClassifyTask:
        """The task with labels and labelled texts from files. Raises InputError for a file that cannot be used.

        prune_vocabulary: file of the corpus. unknown: its rule, `bytes` or `refuse`, which has no default.
        """
        from edgellama.checkpoints.guard import read_categories
        from edgellama.checkpoints.labels import read_labels
        from edgellama.checkpoints.pruned_vocabulary import UNKNOWN, read_corpus

        if (prune_vocabulary is None) != (unknown is None) or unknown not in (None, *UNKNOWN):
            raise UsageError(
                "a pruned vocabulary needs a rule for texts with other tokens",
                remedy="Give --prune-vocabulary FILE with --unknown bytes, which accepts them in smaller pieces, or "
                "--unknown refuse.",
            )
        return cls(
            None if labels is None else read_labels(Path(labels)),
            prompt,
            None if data is None else read_labelled(Path(data)),
            None if tune is None else read_labelled(Path(tune)),
            positive,
            fpr,
            max_flips,
            max_fpr_increase,
            guard,
            None if categories is None else read_categories(Path(categories)),
            prefix,
            None
            if prune_vocabulary is None or unknown is None
            else read_corpus(Path(prune_vocabulary), unknown),
        )

    @property
    def limits(self) -> LabelLimits:
        from edgellama.gate.labelled import LabelLimits

        return LabelLimits(self.max_flips, self.max_fpr_increase)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON data, with hashes of texts."""
        return {
            "labels": None if self.labels is None else digest([asdict(label) for label in self.labels]),
            "prompt": self.prompt,
            "data": None if self.data is None else self.data.sha256,
            "tune": None if self.tune is None else self.tune.sha256,
            "positive": self.positive,
            "fpr": self.fpr,
            "max_flips": self.max_flips,
            "max_fpr_increase": self.max_fpr_increase,
            **({"guard": True} if self.guard else {}),
            **({"prefix": True} if self.prefix else {}),
            **({} if self.corpus is None else {"corpus": self.corpus.sha256, "unknown": self.corpus.unknown}),
            **({} if self.categories is None else {"categories": digest(list(self.categories.items()))}),
        }


def check_task(
    task: ClassifyTask, targets: Sequence[str], recipe: Recipe, *, swappable: Mapping[str, Path], gate: bool
) -> None:
    """Raises UsageError for a target or an option that does not go with a classifier."""
    for name in targets:
        if name not in TARGETS:
            raise UsageError(
                f"target {name!r} cannot hold a classifier: {_UNABLE.get(name, 'it was not tried')}",
                remedy=f"Use {', '.join(TARGETS)}.",
            )
    algorithm = BUDGETED.get(recipe.algorithm, recipe.algorithm)
    if algorithm == GIVEN or algorithm == "recover":
        reason = (
            "it takes the codes of a whole output layer"
            if algorithm == GIVEN
            else "it trains on text that the model writes, and a classifier writes none"
        )
        raise UsageError(
            f"recipe {recipe.name!r} does not go with --task classify: {reason}",
            remedy="Use int4, int4-fast, int8 or auto.",
        )
    if swappable:
        raise UsageError(
            "adapters that are switched at run time do not go with --task classify",
            remedy="Merge the adapter into the classifier: --adapter DIR.",
        )
    if not gate and task.data is not None:
        raise UsageError(
            "--data is for the gate, and validation was turned off", remedy="Leave out one of the two."
        )
    assert task.limits


def for_task(checkpoint: Checkpoint, task: ClassifyTask | None) -> Checkpoint:
    """The checkpoint as the task wants it. Raises UsageError for labels that do not fit, and for a forgotten task."""
    from edgellama.checkpoints.guard import as_guard
    from edgellama.checkpoints.labels import as_classifier
    from edgellama.checkpoints.pruned_vocabulary import with_corpus

    if task is None:
        if checkpoint.classifier is not None:
            raise UsageError(
                f"{checkpoint.path} is a classifier ({', '.join(checkpoint.classifier.names[:6])})",
                remedy="Add --task classify.",
            )
        return checkpoint

    def classified(plain: Checkpoint) -> Checkpoint:
        if task.guard:
            return as_guard(plain, task.categories)
        return as_classifier(plain, task.labels, task.prompt)

    found = classified(checkpoint)
    if task.corpus is not None:
        small, vocabulary = with_corpus(checkpoint, found, task.corpus)
        found = classified(small)
        assert found.classifier is not None
        found = found.with_options(classifier=replace(found.classifier, vocabulary=vocabulary))
    assert found.classifier is not None
    names = found.classifier.names
    for texts in (task.data, task.tune):
        if texts is not None:
            texts.check_labels(names)
    if task.positive is not None and task.positive not in names:
        raise UsageError(
            f"--positive {task.positive!r:.60} is no label of the classifier ({', '.join(names)})",
            remedy="Give one of its labels.",
        )
    return found


def check_lengths(checkpoint: Checkpoint, task: ClassifyTask, context_length: int) -> None:
    """Raises ContextLengthError, before the slow part, for a prompt or a labelled text that does not fit the context."""
    from edgellama.gate.labelled import token_ids
    from edgellama.text.label_prompt import prompt_ids

    assert checkpoint.classifier is not None
    prompt_ids(checkpoint.classifier, checkpoint.tokenizer, "a", context_length)
    for texts in (task.data, task.tune):
        if texts is not None:
            token_ids(texts, checkpoint.classifier, checkpoint.tokenizer, context_length)


def check_prefix_task(checkpoint: Checkpoint, task: ClassifyTask, targets: Sequence[str]) -> None:
    """Raises UsageError if there is no beginning to ship, or no target that takes one."""
    if not task.prefix:
        return
    classifier = checkpoint.classifier
    if classifier is None or not classifier.prefix:
        raise UsageError(
            "--prefix ships the fixed beginning of a prompt, and the prompt has none of 16 tokens or more",
            remedy="Leave out --prefix, or put the instructions before {text}.",
        )
    if "onnx" not in targets:
        raise UsageError(
            f"--prefix is for a target whose KV cache is an input, and {', '.join(targets)} holds it inside",
            remedy="Add -t onnx. Other targets compute the beginning once in a process.",
        )
