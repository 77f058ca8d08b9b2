"""Checks of a guard's answer after its first token, named `guard.*`.

The answer is forced: `unsafe` and two categories, fed one token a call as an app does. The logits that each choice is
made from are compared with those of the quantized torch model on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgellama.gate.metrics import compare
from edgellama.gate.noise import Noise, geometric_mean, worst
from edgellama.gate.subject import Subject
from edgellama.model.guard import Guard
from edgellama.model.labels import Classifier
from edgellama.report import Check, below
from edgellama.runtimes.base import Runtime

PROMPTS = 6


def forced_answer(classifier: Classifier, number: int) -> list[int]:
    """Tokens of an unsafe answer with two categories of the policy, or with the only one. number: of the first."""
    guard = classifier.guard
    assert guard is not None
    one, other = (guard.categories[n % len(guard.categories)] for n in (number, number + 1))
    further = () if one is other else other.further
    return [classifier.unsafe_token, *guard.rest, *one.first, *further]


def check_guard_answers(
    subject: Subject, guard: Guard, prompts: Sequence[Sequence[int]], noise: Noise
) -> list[Check]:
    """Checks of the logits within answers.

    prompts: token ids of prompts; those that leave room for an answer are taken. noise: noise floor of parity.
    """
    classifier, context = subject.bundle.classifier, subject.artifact.context_length
    assert classifier is not None
    answers = [forced_answer(classifier, number) for number in range(len(guard.categories))]
    longest = max(map(len, answers))
    fitting = [list(p) for p in prompts if len(p) + longest <= context][:PROMPTS]
    if not fitting:
        return [
            Check("guard.parity", "fail", 0, 1, f"no prompt leaves room for {longest} tokens in {context}")
        ]
    pairs = [(prompt, answers[number % len(answers)]) for number, prompt in enumerate(fitting)]
    wanted = [([*prompt, *answer], slice(len(prompt), None)) for prompt, answer in pairs]
    expected = torch.cat(subject.expected.logits_of(wanted))
    artifact = torch.cat([_fed_singly(subject.artifact, prompt, answer) for prompt, answer in pairs])
    kl, allowed = compare(expected, artifact, None).kl, noise.limits(subject.target.parity_kl)
    detail = f"{len(kl)} positions of {len(pairs)} forced answers, a token a call"
    return [
        below("guard.parity", geometric_mean(kl), allowed.run, detail=f"geometric mean of {detail}"),
        below("guard.parity_worst", worst(kl), allowed.position, detail=detail),
    ]


def _fed_singly(artifact: Runtime, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits after each token of the answer: float32 [len(answer), rows]."""
    artifact.reset()
    artifact.forward(prompt)
    return torch.from_numpy(np.stack([artifact.forward([token]).copy() for token in answer]))
