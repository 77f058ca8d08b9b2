"""Token ids of a text that a classifier reads: the prompt around the text, without padding at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from edgellama.errors import ContextLengthError, UsageError
from edgellama.model.guard import Message
from edgellama.model.labels import TEXT, Classifier
from edgellama.text.control_tokens import Part, encode_parts
from edgellama.text.tokenizer import Tokenizer

LEAST_PREFIX = 16  # tokens; fewer cost less than another call
# Texts of which no two begin alike.
_PROBES = ("a", "Hello, world!", "9", "(x", "\u2026", "if x:\n", "\u4f60", "- ")
LISTED = "{labels}"  # place in a prompt of the labels with their descriptions, a line each


def checked_prompt(prompt: str, labels: dict[str, str]) -> str:
    """The prompt with its labels written out.

    labels: descriptions by label. Raises UsageError unless TEXT occurs once.
    """
    if prompt.count(TEXT) != 1:
        raise UsageError(
            f"a prompt holds {TEXT} once, in place of the text to classify, and {prompt!r:.80} holds it "
            f"{prompt.count(TEXT)} times",
            remedy=f"Write {TEXT} where the text goes; {LISTED} is replaced by the labels and their descriptions.",
        )
    lines = "\n".join(f"- {name}: {text}" if text else f"- {name}" for name, text in labels.items())
    before, after = (part.replace(LISTED, lines) for part in prompt.split(TEXT))
    written = f"{before}{TEXT}{after}"
    if written.count(TEXT) != 1 or LISTED in written:
        raise UsageError(
            f"a label or its description holds {TEXT} or {LISTED}, which stand for other text in a prompt",
            remedy="Write the description without them.",
        )
    return written


def prompt_parts(classifier: Classifier, text: str | Sequence[Message]) -> list[Part]:
    """The prompt around a text, or around a conversation for a guard, which judges the last message of it.

    Raises UsageError for a conversation without a guard, and for one of other roles.
    """
    if classifier.guard is not None:
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return classifier.guard.conversation.parts(messages)
    if not isinstance(text, str):
        raise UsageError(
            "this classifier reads one text, and got a conversation",
            remedy="Give a text, or export a guard with --task guard.",
        )
    before, after = classifier.prompt.split(TEXT)
    return [(before, False), (text, True), (after, False)]


def prompt_ids(
    classifier: Classifier,
    tokenizer: Tokenizer,
    text: str | Sequence[Message],
    context_length: int,
    *,
    any_text: bool = False,
) -> list[int]:
    """Token ids that a classifier reads for a text. The logits after the last of them are those of its labels.

    A control token in the text is text: taken for a token, it could end the prompt's turn and forge another one.
    any_text: take tokens too that a pruned vocabulary refuses, to compare logits.

    Raises UsageError for a text that gives no token or one that a pruned vocabulary refuses, ContextLengthError for one
    that does not fit.
    """
    ids = encode_parts(tokenizer, prompt_parts(classifier, text))
    while len(ids) > 1 and ids[-1] == classifier.padding:
        ids.pop()
    if not ids:
        raise UsageError("the text to classify holds no tokens", remedy="Give a text that is not empty.")
    vocabulary = classifier.vocabulary
    if vocabulary is not None and vocabulary.unknown == "refuse" and not any_text:
        unknown = [token for token in ids if token >= vocabulary.seen]
        if unknown:
            raise UsageError(
                f"the text holds {tokenizer.decode(unknown[:1], skip_special_tokens=False)!r}, which the corpus of the "
                f"pruned vocabulary never has as a piece ({len(unknown)} of {len(ids)} tokens)",
                remedy="Export with more texts in --prune-vocabulary, or with --unknown bytes.",
            )
    if len(ids) > context_length:
        shown = text if isinstance(text, str) else text[-1]["content"]
        raise ContextLengthError(
            f"the text {shown[:40]!r}… has {len(ids)} tokens with its prompt, and the context has {context_length}",
            remedy="Shorten the text, or export with a larger --context.",
        )
    return ids


def with_prefix(classifier: Classifier, tokenizer: Tokenizer) -> Classifier:
    """The classifier with the tokens that its prompts begin with, if they are LEAST_PREFIX or more.

    A text may join the end of the fixed part in one token, so several texts decide. A prompt that begins otherwise all
    the same is fed whole.
    """
    common: list[int] | None = None
    for probe in _PROBES:
        ids = encode_parts(tokenizer, prompt_parts(classifier, probe))
        shorter = zip(ids if common is None else common, ids, strict=False)
        common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], shorter)]
    fixed = tuple(common or ())
    return replace(classifier, prefix=fixed if len(fixed) >= LEAST_PREFIX else ())
