"""Token arithmetic for lm-evaluation-harness: likelihoods, windows, and text up to a stop string.

Separate from the harness, so that it can be tested and used without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgellama.errors import UsageError
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.generate import generate
from edgellama.text.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, text: str, *, add_bos: bool | None = None) -> list[int]:
    """Returns the token ids of `text`: with a beginning token if the tokenizer adds one, never an end token.

    add_bos: None follows the tokenizer, but adds no second beginning token to a text that starts with one (a
    rendered chat).
    """
    bos = tokenizer.bos_token
    first_ids = tokenizer.encode("")[:1]
    tokenizer_adds_bos = bool(first_ids) and bos is not None and first_ids[0] == tokenizer.token_id(bos)
    if add_bos is None:
        add_bos = tokenizer_adds_bos and not text.startswith(bos or "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [*first_ids, *ids] if add_bos and tokenizer_adds_bos else ids


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns (context, continuation) as ids. Joined, they are the encoding of the joined text.

    As in the harness, spaces at the end of the context belong to the continuation, because tokens begin with
    their space. The continuation is the joined encoding without the first tokens, as many as the context
    alone has.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    ids = encode(tokenizer, context)
    return ids, encode(tokenizer, context + continuation)[len(ids) :]


def log_likelihood(
    runtime: Runtime, context: Sequence[int], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Returns (log-probability of `continuation` after `context` in nats, whether greedy decoding gives it).

    The log-probability is the sum over tokens. A context that does not fit is cut from the left. The last
    token needs no place, because nothing follows it. Raises UsageError for an empty context, and for a
    continuation that does not fit by itself.
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
    fed_tokens = [*context, *continuation][-(runtime.context_length + 1) : -1]
    runtime.reset()
    logits = runtime.forward(fed_tokens[: len(fed_tokens) - len(continuation) + 1])
    total, greedy = 0.0, True
    for number, token in enumerate(continuation):
        total += log_probability(logits, token)
        greedy = greedy and int(logits.argmax()) == token
        if number + 1 < len(continuation):
            logits = runtime.forward([token])
    return total, greedy


def log_probability(logits: Logits, token: int) -> float:
    """Returns log softmax(logits)[token] in nats, summed in float64. logits: float32 [vocab_size]."""
    x = logits.astype(np.float64)
    top = x.max()
    return float(x[token] - top - np.log(np.exp(x - top).sum()))


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (context, continuation) pairs that score each of `tokens` once, in windows of `length`.

    The first context is `prefix`. Each later context is as many of the preceding tokens as fit, at least one.
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
    """Returns the text that the model generates after `prompt`, up to the first stop string.

    The beginning of the prompt is cut if prompt and `max_tokens` do not fit together. Raises UsageError if no
    token of the prompt would remain.

    Args:
        runtime: the model; its KV cache is reset first.
        tokenizer: decodes the generated ids.
        prompt: token ids.
        sample: returns the next token id for logits.
        until: stop strings, which are left out of the text.
        max_tokens: largest number of generated tokens.
        stop_ids: token ids that end the generation.
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
        stop_positions = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if stop_positions:
            return text[: min(stop_positions)]
    return text
