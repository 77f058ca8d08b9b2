"""Vectors of guards for tests.make_vectors: conversations, whole answers with their calls, and sections of manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.errors import BundleError, ContextLengthError, UsageError
from edgellama.model.guard import UNSAFE, Category, Conversation, Guard
from edgellama.model.labels import Classifier, Label
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.classify import TextClassifier
from edgellama.runtimes.guard import CALLS
from edgellama.text.label_prompt import prompt_ids
from tests.classify_vectors import calibration, reopened, section, write_classifier
from tests.make_vectors import TYPED, device_logits, tokenizer_of

CONVERSATION = Conversation(
    before=(
        "<|im_start|>Judge User.\nS1: Theft.\n\nUser: ",
        "<|im_start|>Judge Agent.\nS1: Theft.\n\nUser: ",
    ),
    after=("\nUser is:<|im_end|>\n", "\nAgent is:<|im_end|>\n\n"),
    to_assistant="\nAgent: ",
    to_user="\nUser: ",
    trim=True,
)
# The code S1 begins two others, and their tokens begin alike. `safe` has a token of the answers.
GUARD = Guard(
    CONVERSATION,
    (
        Category("S1", "Theft.", (57, 331, 19), (14, 331, 19)),
        Category("S2", "Fraud.", (57, 331, 20), (14, 331, 20)),
        Category("S10", "Hate.", (57, 331, 19, 18), (14, 331, 19, 18)),
        Category("S11", "Other.", (57, 331, 19, 19), (14, 331, 19, 19)),
    ),
    (302,),
    (2, 0),
    custom=True,
)
JUDGE = Classifier(
    "tokens",
    (Label("safe", ("safe",), (331,)), Label(UNSAFE, ("unsafe",), (401,))),
    f"{CONVERSATION.before[0]}{{text}}{CONVERSATION.after[0]}",
    guard=GUARD,
)
# A guard of one category, whose answers have one choice.
SMALL = replace(JUDGE, guard=replace(GUARD, categories=GUARD.categories[:1], rest=(), end=(2,)))
LENGTH = 256  # tokens of the context
CUT = (4999, 8499, 47999)  # seeds of answers that six calls do not end
SEEDS = (*range(0, 5000, 100), *CUT)


def guard_vectors(directory: Path) -> dict[str, Any]:
    """Content of guard.json. directory: an empty one, for a bundle whose manifest is altered."""
    return {
        "tokenizer": "smollm2",
        "classifiers": {"several": JUDGE.to_dict(), "one": SMALL.to_dict()},
        "conversations": conversations(),
        "answers": answers(),
        "sections": sections(write_classifier(directory)),
    }


def talk(*contents: str, first: int = 0) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[(first + n) % 2], "content": c} for n, c in enumerate(contents)]


def conversations() -> list[dict[str, Any]]:
    """Token ids of conversations, null with the reason for those that are refused. A text is a user's message."""
    asked: list[tuple[str | list[dict[str, str]], bool, int]] = [
        *((text, True, LENGTH) for text in TYPED),
        *((talk(text), False, LENGTH) for text in TYPED),
        *(
            (talk(f" {text}\u3000\n", "  No. \x1c"), trim, LENGTH)
            for text, trim in product(TYPED, (True, False))
        ),
        (talk("One <|im_end|>", "<|im_start|>", "three \u00a0"), True, LENGTH),
        (talk(*"abcdefg"), True, LENGTH),
        (talk("a", first=1), True, LENGTH),
        (talk("a", "b")[::-1], True, LENGTH),
        ([*talk("a"), *talk("b")], True, LENGTH),
        ([], True, LENGTH),
        (talk("word " * LENGTH), True, LENGTH),
        *((talk("a", "b"), True, length) for length in (40, 60, 70, 80)),
    ]
    cases = []
    for messages, trim, length in asked:
        judge = replace(JUDGE, guard=replace(GUARD, conversation=replace(CONVERSATION, trim=trim)))
        found: dict[str, Any] = {"ids": None, "refused": None}
        try:
            found["ids"] = prompt_ids(judge, tokenizer_of("smollm2"), messages, length)
        except ContextLengthError:
            found["refused"] = "context"
        except UsageError:
            found["refused"] = "roles"
        cases.append({"messages": messages, "trim": trim, "context_length": length, **found})
    assert {case["refused"] for case in cases} == {None, "context", "roles"}
    return cases


class Drawn(Runtime):
    """Answers call number n with logits drawn from `start + n`, as VectorModel of the apps' tests does."""

    name, vocab_size = "drawn", 512

    def __init__(self, rows: int, context_length: int, start: int) -> None:
        self._output_size, self.context_length, self.start = rows, context_length, start
        self.calls: list[tuple[int, list[int]]] = []

    def _forward(self, tokens: Sequence[int], position: int) -> Logits:
        self.calls.append((position, list(tokens)))
        return device_logits(self.start + len(self.calls) - 1, 0.0, self.output_size)


def answers() -> list[dict[str, Any]]:
    """Whole answers about one text, with the calls that the model gets."""
    tokenizer, text = tokenizer_of("smollm2"), "Where is my parcel?"
    prompt = len(prompt_ids(JUDGE, tokenizer, text, LENGTH))
    flag = calibration(0.5, (UNSAFE, 0.0))
    cases = []
    for name, classifier in (("several", JUDGE), ("one", SMALL)):
        for seed, calibrated in product(SEEDS if classifier is JUDGE else SEEDS[:4], (None, flag)):
            for length in (LENGTH,) if seed else range(prompt, prompt + 8):
                runtime = Drawn(classifier.rows, length, seed)
                judge = TextClassifier(classifier, tokenizer, calibrated, "0" * 64)
                answer = judge.classify(runtime, text).to_dict()
                answer["probabilities"] = list(answer["probabilities"].values())
                case = {"classifier": name, "text": text, "start": seed, "context_length": length}
                calls = [[position, *tokens] for position, tokens in runtime.calls[1:]]
                cases.append({**case, "flags": calibrated is not None, "answer": answer, "calls": calls})
    assert {0, 1, 2} <= {len(case["answer"]["categories"]) for case in cases}
    cut = [case for case in cases if case["start"] in CUT and case["flags"]]
    assert [(len(case["calls"]), len(case["answer"]["categories"])) for case in cut] == [
        (CALLS, 3),
        (CALLS, 3),
        (CALLS, 2),
    ]
    return cases


def sections(bundle: Bundle) -> list[dict[str, Any]]:
    """Sections with guards in a manifest: whether the bundle opens."""
    sound = section(JUDGE, None)
    guard, rows = sound["guard"], JUDGE.rows
    categories = guard["categories"]

    def changed(**changes: Any) -> dict[str, Any]:
        return {**sound, "guard": {**guard, **changes}}

    def conversation(**changes: Any) -> dict[str, Any]:
        return changed(conversation={**guard["conversation"], **changes})

    def category(**changes: Any) -> dict[str, Any]:
        return changed(categories=[{**categories[0], **changes}, *categories[1:]])

    cases: list[tuple[str, Any, int]] = [
        ("sound", sound, rows),
        ("one category", section(SMALL, None), SMALL.rows),
        ("rows of the labels alone", sound, 2),
        ("rows of a token too many", sound, rows + 1),
        ("no categories", changed(categories=[]), rows),
        ("a blank code", category(code=" "), rows),
        ("a code without tokens", category(first=[]), rows),
        ("a code without further tokens", category(further=[]), rows),
        ("a negative token", category(first=[-1]), rows),
        ("no end", changed(end=[]), rows),
        ("a rest that is no list", changed(rest=302), rows),
        (
            "no conversation",
            {**sound, "guard": {k: v for k, v in guard.items() if k != "conversation"}},
            rows,
        ),
        ("no text for the agent", conversation(before={"user": "a"}), rows),
        ("a trim as text", conversation(trim="yes"), rows),
        ("no text between messages", conversation(to_user=None), rows),
        (
            "no label unsafe",
            {**sound, "labels": [{**x, "label": f"{x['label']}?"} for x in sound["labels"]]},
            rows,
        ),
    ]
    found = []
    for name, data, label_rows in cases:
        try:
            reopened(bundle, data, label_rows)
            opens = True
        except BundleError:
            opens = False
        found.append({"name": name, "classifier": data, "label_rows": label_rows, "opens": opens})
    assert [case["name"] for case in found if case["opens"]] == ["sound", "one category"]
    return found
