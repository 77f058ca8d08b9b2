"""Classifiers of checkpoints: parity with transformers, rows of answers, and labels that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.labels import as_classifier, read_labels
from edgellama.checkpoints.recorded_labels import as_recorded
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.errors import CheckpointError, ContextLengthError, InputError, TextError, UsageError
from edgellama.gate.labelled import last_logits
from edgellama.model.labels import Label
from edgellama.text.label_prompt import prompt_ids
from edgellama.text.labelled import read_labelled
from tests.helpers.tiny_classifier import LABELS, write_classifier

ANSWERS = (Label("novel", (" novel", " story")), Label("program", (" def",)))
PROMPT = "{text}\nKind:"


@pytest.fixture(scope="module")
def score(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_classifier(tiny_checkpoint, tmp_path_factory.mktemp("score") / "model"))


@pytest.mark.slow
def test_a_trained_head_gives_the_logits_of_transformers(score: Checkpoint) -> None:
    """Texts of several lengths in one padded batch; one of them ends with the padding token itself."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        str(score.path), dtype=torch.float32, attn_implementation="eager"
    )
    assert score.classifier is not None and score.classifier.names == LABELS
    padding = score.classifier.padding
    assert padding == model.config.pad_token_id == 0
    spelled = score.tokenizer.decode([padding], skip_special_tokens=False)
    texts = [
        "Once upon a time there was",
        "x",
        "for i in range(3):\n    print(i)",
        f"the end{spelled}{spelled}",
    ]
    ids = [score.tokenizer.encode(text) for text in texts]
    assert ids[-1][-2:] == [padding] * 2
    longest = max(map(len, ids))
    batch = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in ids])
    with torch.no_grad():
        theirs = model(batch, attention_mask=(batch != padding).long(), use_cache=False).logits
    read = [prompt_ids(score.classifier, score.tokenizer, text, 64) for text in texts]
    assert len(read[-1]) > len(ids[-1]), "padding that somebody types is text"
    padded = replace(score.classifier, prompt=f"{{text}}{spelled}{spelled}")
    read[-1] = prompt_ids(padded, score.tokenizer, "the end", 64)
    assert read[-1] == ids[-1][:-2], "padding of the prompt is not read"
    ours = last_logits(StreamedLlama(score), read)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - ours[0]).abs().max() > 0.1


def test_answers_are_rows_of_the_whole_output_layer(tiny_checkpoint: Checkpoint) -> None:
    classified = as_classifier(tiny_checkpoint, ANSWERS, PROMPT)
    classifier = classified.classifier
    assert classifier is not None and classified.config.output_size == classifier.rows == 3
    assert classified.config.vocab_size == tiny_checkpoint.config.vocab_size
    ids = prompt_ids(classifier, classified.tokenizer, "It was a dark night", 64)
    for label in ANSWERS:
        for text, token in zip(label.texts, classifier.labels[ANSWERS.index(label)].tokens, strict=True):
            whole = tiny_checkpoint.tokenizer.encode(f"It was a dark night\nKind:{text}")
            assert whole[: len(ids) + 1] == [*ids, token]
    whole_logits = StreamedLlama(tiny_checkpoint).logits(ids)
    own = StreamedLlama(classified).logits(ids)
    assert torch.allclose(own, whole_logits[:, list(classifier.tokens)], atol=1e-6)
    assert as_recorded(tiny_checkpoint, classifier, tiny_checkpoint.tokenizer).classifier == classifier
    assert as_recorded(classified, classifier, classified.tokenizer).config == classified.config
    assert classified.as_opened and classified.sha256() == tiny_checkpoint.sha256()
    assert classified.config_sha256() != tiny_checkpoint.config_sha256()


def test_a_prompt_lists_its_labels(tiny_checkpoint: Checkpoint) -> None:
    labels = (Label("novel", (" novel",), description="a story"), Label("program", (" def",)))
    found = as_classifier(tiny_checkpoint, labels, "Kinds:\n{labels}\n{text}\nKind:").classifier
    assert found is not None and found.prompt == "Kinds:\n- novel: a story\n- program\n{text}\nKind:"


@pytest.mark.parametrize(
    ("labels", "prompt", "words"),
    [
        (ANSWERS, "no place", "holds it 0 times"),
        (ANSWERS, None, "are to be given"),
        (None, PROMPT, "are to be given"),
        (ANSWERS[:1], PROMPT, "two at least"),
        ((ANSWERS[0], Label("other", (" novelty",))), PROMPT, "begin with the same token"),
        ((Label("a", ("n",)), Label("b", (" def",))), "{text} defi", "joins the end of the prompt"),
    ],
)
def test_labels_that_are_refused(
    tiny_checkpoint: Checkpoint, labels: Any, prompt: str | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        as_classifier(tiny_checkpoint, labels, prompt)


def test_a_trained_head_has_its_own_labels(score: Checkpoint) -> None:
    with pytest.raises(UsageError, match="has a trained head"):
        as_classifier(score, ANSWERS, PROMPT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem_type": "multi_label_classification"}, "one label of several"),
        ({"id2label": {"0": "alone"}}, "one label of several"),
        ({"id2label": {"0": "a", "1": "b", "2": "b"}}, "one name for each row"),
        ({"id2label": {"0": "a", "1": "b"}}, "shape"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForSequenceClassification"),
        ({"pad_token_id": "end"}, "pad_token_id"),
    ],
)
def test_heads_that_are_refused(
    score: Checkpoint, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    for file in score.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((score.path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert words in str(caught.value)


def test_files_of_labels(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    file.write_text(
        '[{"label": "a", "text": [" x", " y"], "description": "d"}, {"label": "b", "text": " z"}]'
    )
    assert read_labels(file) == (Label("a", (" x", " y"), (), "d"), Label("b", (" z",)))
    for content in (
        "{}",
        "[1]",
        '[{"label": "a"}]',
        '[{"label": "a", "text": []}]',
        '[{"label": "", "text": "x"}]',
        '[{"label": "\\ud800", "text": "x"}]',
        "[",
    ):
        file.write_text(content)
        with pytest.raises(InputError):
            read_labels(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a", "label": "x"}\n', "2 are the least"),
        ('{"text": "a", "label": "x"}\nnonsense', "line 2"),
        ('{"text": "a", "label": 1}\n{"text": "a", "label": "x"}', "no label"),
        ('{"label": "x"}\n{"text": "a", "label": "x"}', "no object with a text"),
        ('{"text": "a", "label": "x"}\n{"text": "\\ud800", "label": "x"}', "line 2 is not JSON.*surrogates"),
        ('{"text": "a", "label": "x", "score": NaN}\n{"text": "a", "label": "x"}', "NaN is not a finite"),
    ],
)
def test_labelled_texts_that_are_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(TextError, match=words):
        read_labelled(file)


def test_a_text_beyond_the_context_is_refused(score: Checkpoint) -> None:
    assert score.classifier is not None
    with pytest.raises(ContextLengthError, match="with its prompt"):
        prompt_ids(score.classifier, score.tokenizer, "word " * 100, 32)
