"""Generation: a stream of tokens from a runtime. The last token has the reason for the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from edgellama.errors import ContextLengthError, UsageError
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.sampler import Sampler
from edgellama.text.chat import ChatTemplate
from edgellama.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Token:
    """One generated token. `finish` is set on the last token only.

    finish: `stop` for a stop id (not yielded as text), `length` at `max_tokens`, `context` for a full
    context.
    """

    id: int
    finish: Finish | None


@dataclass
class Speed:
    """Tokens and seconds of prefill and decode, filled while a stream is consumed."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second, without the first token, which belongs to prefill."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    runtime: Runtime,
    prompt: Sequence[int],
    *,
    sample: Callable[[Logits], int],
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    speed: Speed | None = None,
) -> Iterator[Token]:
    """Yields the tokens that continue `prompt` from the runtime's position.

    Afterwards the KV cache holds the prompt and all generated tokens but the last. Raises ContextLengthError
    if the prompt does not fit.

    Args:
        runtime: the model, with its KV cache at `position`.
        prompt: token ids to prefill.
        sample: returns the next token id for logits float32 [vocab_size].
        max_tokens: largest number of generated tokens.
        stop_ids: token ids that end the generation. The stop id is yielded too.
        speed: receives the tokens and seconds of prefill and decode.
    """
    speed = speed if speed is not None else Speed()
    if runtime.text_classifier is not None:
        raise UsageError(
            f"{runtime.name} runs a classifier, whose logits are those of labels and of no next token",
            remedy="Use classify(text).",
        )
    if runtime.position + len(prompt) > runtime.context_length:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens, and {runtime.context_length - runtime.position} of the context's "
            f"{runtime.context_length} are free",
            remedy="Shorten the prompt, or export with a larger --context.",
        )
    start = time.perf_counter()
    logits = runtime.forward(prompt)
    speed.prompt_tokens, speed.prefill_seconds = len(prompt), time.perf_counter() - start
    start = time.perf_counter()
    for count in range(1, max_tokens + 1):
        token = sample(logits)
        finish: Finish | None = None
        if token in stop_ids:
            finish = "stop"
        elif count == max_tokens:
            finish = "length"
        elif runtime.position == runtime.context_length:
            finish = "context"
        speed.generated_tokens, speed.decode_seconds = count, time.perf_counter() - start
        yield Token(token, finish)
        if finish:
            return
        logits = runtime.forward([token])


FLAGS = {"stop": "", "length": "[stopped at --max-tokens]", "context": "[the context is full]"}


def stream(
    runtime: Runtime,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    stop_ids: Sequence[int],
    speed: Speed,
    ids: list[int] | None = None,
) -> Iterator[str]:
    """Yields pieces of text as soon as no later token can change them.

    Adds a note in brackets unless a stop id ended the generation.

    Args:
        runtime: the model, with its KV cache at `position`.
        tokenizer: decodes the generated ids.
        prompt: token ids to prefill.
        sampler: draws each token.
        max_tokens: largest number of generated tokens.
        stop_ids: token ids that end the generation.
        speed: receives the tokens and seconds of prefill and decode.
        ids: receives the generated token ids, the stop id included.
    """
    decoder = tokenizer.stream()
    finish = None
    for token in generate(
        runtime, prompt, sample=sampler, max_tokens=max_tokens, stop_ids=stop_ids, speed=speed
    ):
        if ids is not None:
            ids.append(token.id)
        if token.finish != "stop":
            yield decoder.push(token.id)
        finish = token.finish
    yield decoder.flush()
    if finish and FLAGS[finish]:
        yield f" {FLAGS[finish]}"


def chat_template(tokenizer: Tokenizer, date: datetime | None = None) -> ChatTemplate:
    """Returns the tokenizer's chat template. Raises UsageError if the checkpoint has none.

    date: date that the template writes. Without one, a template that needs a date gets the present time.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            "this model has no chat template", remedy="Use -p PROMPT; a base model continues text."
        )
    template = ChatTemplate.of(tokenizer, date)
    return template.at(datetime.now()) if date is None and template.needs_date() else template
