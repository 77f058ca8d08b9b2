"""Tokenizer inside an artifact, for formats that hold one: its entries, its ids and its stop tokens.

The entries in the file must be those that follow from the bundle's tokenizer. That says what edgellama meant. So
the runtime's own tokenizer also encodes texts on which tokenizers disagree, and its ids must be the bundle's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgellama.bundle import Bundle
from edgellama.errors import TokenizerError
from edgellama.export.gguf.tokenizer import END_TEXTS
from edgellama.export.lower import tokenizer_section
from edgellama.gate.differences import claim
from edgellama.gate.golden_sequences import CONVERSATIONS
from edgellama.gate.subject import Section
from edgellama.model.llama import Llama
from edgellama.report import Check
from edgellama.runtimes.base import OwnTokenizer, Runtime
from edgellama.targets import Target
from edgellama.targets.gguf.interface import key_problems
from edgellama.text.chat import ChatTemplate
from edgellama.text.probes import PROBES
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import Text

CHARACTERS = 20_000  # of each evaluation text


def check_entries(bundle: Bundle, target: Target, model: Llama, tokenizer: Tokenizer) -> Check:
    """Check that the artifact's entries about the tokenizer are those of `tokenizer`."""
    actual: Mapping[str, Any] = target.tokenizer_entries(bundle.artifact(target.name))
    try:
        problems = key_problems(actual, tokenizer_section(target, tokenizer, model.config))
    except TokenizerError as error:
        problems = [error.message]
    return claim("structure.embedded_tokenizer", problems)


def examine_own_tokenizer(bundle: Bundle, runtime: Runtime, texts: Sequence[Text]) -> Section:
    """The checks of the runtime's own tokenizer. None for a runtime that has none."""
    own = runtime.own_tokenizer()
    if own is None:
        return Section()
    return Section((check_ids(bundle.tokenizer, own, texts), _check_stops(bundle, own)))


def check_ids(tokenizer: Tokenizer, own: OwnTokenizer, texts: Sequence[Text]) -> Check:
    """Check that both tokenizers give the same ids, with the tokens that encoding adds and without them."""
    problems, count = [], 0
    for text in _probes(tokenizer, texts):
        for add in (False, True):
            count += 1
            expected = tokenizer.encode(text, add_special_tokens=add)
            actual = own.tokenize(text, add_special=add)
            if actual != expected:
                at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), -1)
                where = f"at token {at}" if at >= 0 else f"{len(actual)} tokens for {len(expected)}"
                kind = "with added tokens" if add else "alone"
                problems.append(f"{text[:24]!r} {kind} differs {where}")
    detail = "" if problems else f"{count} encodings are equal"
    return claim("consistency.tokenizer", problems, detail=detail)


def _probes(tokenizer: Tokenizer, texts: Sequence[Text]) -> Iterator[str]:
    """Texts on which tokenizers disagree, evaluation texts, and every added token between words."""
    yield from PROBES
    yield from (text.content[:CHARACTERS] for text in texts)
    yield " and ".join(tokenizer.added_tokens[:256])
    if tokenizer.chat_template is None:
        return
    template = ChatTemplate.of(tokenizer)
    for messages in CONVERSATIONS.values():
        try:
            yield template.render(messages)
        except TokenizerError:
            continue  # a template without system messages


def _check_stops(bundle: Bundle, own: OwnTokenizer) -> Check:
    """Check that the runtime ends at every stop token, and at no others but those that it always takes for an end."""
    wanted, actual = set(bundle.config.eos_token_ids), set(own.ends())
    texts = {i: bundle.tokenizer.decode([i], skip_special_tokens=False) for i in actual | wanted}
    missing = [f"{texts[i]!r} ({i}) does not stop it" for i in sorted(wanted - actual)]
    extra = {i: texts[i] for i in sorted(actual - wanted)}
    problems = missing + [f"{text!r} ({i}) stops it" for i, text in extra.items() if text not in END_TEXTS]
    always = ", ".join(f"{text!r} ({i})" for i, text in extra.items())
    return claim(
        "consistency.stop_tokens",
        problems,
        detail="" if problems or not extra else f"it also stops at {always}, as with any file that has them",
    )
