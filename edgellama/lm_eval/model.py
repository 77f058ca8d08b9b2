"""Model `edgellama` for lm-evaluation-harness: one artifact of a bundle.

Usage: `python -m edgellama.lm_eval --model edgellama --model_args bundle=…`.

The harness (lm_eval 0.4.13) finds models in its own table, not through entry points. The model must therefore
be registered before the harness's command line runs. Importing this module registers the model `edgellama`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from edgellama.bundle import Bundle
from edgellama.errors import UsageError
from edgellama.files import digest
from edgellama.lm_eval import likelihood
from edgellama.runtimes.classify import refuse_classifier
from edgellama.runtimes.load import load
from edgellama.runtimes.sampler import Sampler
from edgellama.text.chat import ChatTemplate

_log = logging.getLogger(__name__)
MAX_TOKENS = 256  # limit of generated tokens for a task that sets none


@register_model("edgellama")
class EdgellamaLM(TemplateLM):  # type: ignore[misc]
    """One artifact of a bundle in its runtime. Requests are computed one after another.

    Args:
        bundle: directory of the bundle (all arguments are given in --model_args).
        target: target of the artifact; None for the bundle's first.
        max_gen_toks: limit of generated tokens for a task that sets none.
        batch_size: given by the harness. An artifact computes one sequence at a time, whatever it is.
        max_batch_size: given by the harness, not used.
        device: given by the harness, not used.
    """

    def __init__(
        self,
        bundle: str,
        target: str | None = None,
        max_gen_toks: int = MAX_TOKENS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size not in (None, 1, "1", "auto"):
            _log.warning(
                "batch_size is %s, and an artifact computes one sequence at a time: 1 is used", batch_size
            )
        self.bundle = Bundle.open(Path(bundle))
        refuse_classifier(self.bundle)
        self.runtime = load(self.bundle, target)
        self.max_length, self.max_gen_toks = self.runtime.context_length, int(max_gen_toks)
        self._tokenizer = self.bundle.tokenizer

    @property
    def eot_token_id(self) -> int:
        """First end token, else the beginning token. Raises UsageError if the model has neither."""
        config = self.bundle.config
        ids = (*config.eos_token_ids, *([] if config.bos_token_id is None else [config.bos_token_id]))
        if not ids:
            raise UsageError(
                f"{self.bundle.path}: the model has neither a beginning nor an end token",
                remedy="Give the task a context; an empty one needs such a token.",
            )
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Token for an empty context: the beginning token, else the end token."""
        bos = self.bundle.config.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return likelihood.encode(self._tokenizer, string, add_bos=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return likelihood.encode_pair(self._tokenizer, context, continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        answers = []
        for key, context, continuation in _shown(requests, "loglikelihood", disable_tqdm):
            answer = likelihood.log_likelihood(self.runtime, context, continuation)
            answers.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each request's text in nats, summed over its windows."""
        answers = []
        for request in _shown(requests, "loglikelihood_rolling", disable_tqdm):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = likelihood.rolling_windows(tokens, self.prefix_token_id, self.max_length)
            answer = sum(likelihood.log_likelihood(self.runtime, *window)[0] for window in windows)
            answers.append(answer)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the generated text of each request."""
        answers = []
        for request in _shown(requests, "generate_until", disable_tqdm):
            context, options = request.args[0], dict(request.args[1])
            until = options.get("until") or []
            answer = likelihood.text_until(
                self.runtime,
                self._tokenizer,
                self.tok_encode(context) or [self.prefix_token_id],
                sample=_sampler(options),
                until=[until] if isinstance(until, str) else list(until),
                max_tokens=int(options.get("max_gen_toks", self.max_gen_toks)),
                stop_ids=self.bundle.config.eos_token_ids,
            )
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Text of a conversation. Without a generation prompt, its last message stays open to be continued.

        The harness asks for that where a task begins the answer (`gen_prefix`). A template closes every turn, so
        the text behind the last message is cut off, as transformers' `continue_final_message` does.
        """
        text = self._template().render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt or not chat_history:
            return text
        last = chat_history[-1]["content"]
        before, found, _ = text.rpartition(last if last in text else last.strip())
        if not found:
            raise UsageError(
                "the chat template does not repeat the last message, so the harness's answer cannot be continued",
                remedy="Leave --apply_chat_template out, or use a task without gen_prefix.",
            )
        return before + last

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template().source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Name that separates the tokenizer's entries in the harness's caches, by the hash of its files."""
        files = self.bundle.manifest["files"]
        hashes = {n: entry["sha256"] for n, entry in files.items() if n.startswith("tokenizer/")}
        return f"{self.bundle.manifest['name']}-{digest(hashes)[:12]}"

    def _template(self) -> ChatTemplate:
        if self._tokenizer.chat_template is None:
            raise UsageError(
                f"{self.bundle.path} has no chat template", remedy="Leave --apply_chat_template out."
            )
        return ChatTemplate.of(self._tokenizer, self.bundle.chat_date)


def _sampler(options: dict[str, Any]) -> Sampler:
    """Returns the sampler of a task's options `do_sample`, `temperature`, `top_p` and `seed`.

    Greedy unless the task samples. The option names are the harness's.
    """
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    elif options.get("do_sample") and "temperature" not in options:
        temperature = 1.0
    return Sampler(temperature, float(options.get("top_p") or 1.0), int(options.get("seed") or 0))


def _shown(requests: list[Any], what: str, quiet: bool) -> Iterable[Any]:
    progress: Iterable[Any] = tqdm(requests, desc=what, disable=quiet)
    return progress
