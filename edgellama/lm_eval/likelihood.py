"""What lm-evaluation-harness asks of a model, as arithmetic on tokens: likelihoods, windows, and text up to a stop.

Kept apart from the harness, so that it can be tested without it, and used without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgellama.errors import UsageError
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.generate import generate
from edgellama.text.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, text: str, *, add_bos: bool | None = None) -> list[int]:
    """Token ids of `text`, with the beginning token before them where the tokenizer puts one, and never an end token.

    add_bos: None as the tokenizer does, but not twice where the text starts with it already (a rendered chat).
    """
    bos = tokenizer.bos_token
    usual = tokenizer.encode("")[:1]
    wants = bool(usual) and bos is not None and usual[0] == tokenizer.token_id(bos)
    if add_bos is None:
        add_bos = wants and not text.startswith(bos or "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [*usual, *ids] if add_bos and wants else ids


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(context, continuation) as ids whose join is the encoding of the joined text.

    As the harness has it: spaces at the end of the context belong to the continuation, because tokens begin with
    their space; the continuation is what the whole has beyond the context's own length.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    ids = encode(tokenizer, context)
    return ids, encode(tokenizer, context + continuation)[len(ids) :]


def log_likelihood(
    runtime: Runtime, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """(sum of log-probabilities of `continuation` after `context` in nats, whether it is what greedy decoding says).

    What does not fit is cut from the left of the context: the last token needs no place, since nothing follows it.
    Raises UsageError for no context and for a continuation that does not fit even so.
    """
    if not context:
        raise UsageError("a likelihood needs a token to begin with", remedy="Give the bos token as context.")
    if not continuation:
        return 0.0, True
    if len(continuation) > runtime.context_length:
        raise UsageError(
            f"a continuation of {len(continuation)} tokens does not fit the context of {runtime.context_length}",
            remedy="Export with a larger --context.",
        )
    fed = [*context, *continuation][-(runtime.context_length + 1) : -1]
    runtime.reset()
    logits = runtime.forward(fed[: len(fed) - len(continuation) + 1])
    total, greedy = 0.0, True
    for number, token in enumerate(continuation):
        total += log_probability(logits, token)
        greedy = greedy and int(logits.argmax()) == token
        if number + 1 < len(continuation):
            logits = runtime.forward([token])
    return total, greedy


def log_probability(logits: Logits, token: int) -> float:
    """log softmax(logits)[token], nats, summed in float64; logits float32 [vocab_size]."""
    x = logits.astype(np.float64)
    top = x.max()
    return float(x[token] - top - np.log(np.exp(x - top).sum()))


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that score each of `tokens` once, in windows of `length`.

    The first window predicts from `prefix`; every other one from as many of the tokens before it as fit, at least one.
    """
    first = list(tokens[:length])
    if first:
        yield [prefix], first
    for start in range(length, len(tokens), length):
        continuation = list(tokens[start : start + length])
        end = start + len(continuation)
        yield list(tokens[end - length - 1 : start]), continuation


def text_until(
    runtime: Runtime,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    sample: Callable[[Logits], int],
    until: Sequence[str],
    max_tokens: int,
    stop_ids: Sequence[int],
) -> str:
    """What the model writes after `prompt`, up to the first of `until`, which is left out.

    The prompt loses its beginning where it and `max_tokens` do not fit together. Raises UsageError when not even one
    token of it would be left.
    """
    room = runtime.context_length - max_tokens
    if room < 1:
        raise UsageError(
            f"{max_tokens} tokens are to be generated, and the context has {runtime.context_length}",
            remedy="Ask for fewer (--gen_kwargs max_gen_toks=N), or export with a larger --context.",
        )
    runtime.reset()
    stream, text = tokenizer.stream(), ""
    stops = [stop for stop in until if stop]
    for token in generate(runtime, prompt[-room:], sample=sample, max_tokens=max_tokens, stop_ids=stop_ids):
        if token.finish != "stop":
            text += stream.push(token.id)
        if token.finish:
            text += stream.flush()
        found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if found:
            return text[: min(found)]
    return text
