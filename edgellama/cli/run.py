"""Verb `run`: text generation in the terminal, for a prompt or a chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from edgellama.cli.arguments import count
from edgellama.errors import UsageError

if TYPE_CHECKING:
    from edgellama.runtimes.base import Runtime
    from edgellama.runtimes.generate import Speed
    from edgellama.runtimes.sampler import Sampler
    from edgellama.text.chat import ChatTemplate
    from edgellama.text.tokenizer import Tokenizer


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", type=Path)
    p.add_argument("-t", "--target", metavar="TARGET", help="default: the bundle's first")
    p.add_argument("--use", metavar="NAME", help="adapter of the bundle (default: the base without one)")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("-p", "--prompt", metavar="PROMPT", help="continue this text")
    mode.add_argument("--chat", action="store_true", help="chat; reads turns from standard input")
    p.add_argument(
        "--date",
        metavar="YYYY-MM-DD",
        help="date for a chat template that writes one (default: the bundle's or the template's, else today)",
    )
    p.add_argument("--system", metavar="TEXT", help="system message of the chat")
    p.add_argument(
        "--special",
        action="store_true",
        help="control tokens that are typed into a chat are tokens, and not text",
    )
    p.add_argument(
        "-n",
        "--max-tokens",
        metavar="TOKENS",
        type=count,
        default=256,
        help="largest number of tokens of an answer (default: %(default)s)",
    )
    p.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default: %(default)s)"
    )
    p.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="nucleus sampling (default: %(default)s)"
    )
    p.add_argument(
        "--seed", metavar="S", type=int, default=0, help="seed of the sampler (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """Generates text. Returns 0. Raises UsageError for options that contradict each other."""
    from edgellama.bundle import Bundle
    from edgellama.bundle.record import iso_date
    from edgellama.runtimes.classify import refuse_classifier
    from edgellama.runtimes.generate import Speed, chat_template, stream
    from edgellama.runtimes.load import load
    from edgellama.runtimes.sampler import Sampler

    bundle = Bundle.open(args.bundle)
    refuse_classifier(bundle)
    sampler = Sampler(args.temperature, args.top_p, args.seed)
    stop_ids = bundle.config.eos_token_ids
    if not args.chat and args.prompt is None:
        raise UsageError("nothing to run", remedy="Give a prompt with -p, or --chat.")
    if args.system is not None and not args.chat:
        raise UsageError("--system belongs to a chat", remedy="Add --chat, or put the text into the prompt.")
    if args.special and not args.chat:
        raise UsageError(
            "--special belongs to a chat", remedy="Add --chat. A prompt's tokens are always tokens."
        )
    if args.date is not None and not args.chat:
        raise UsageError("--date belongs to a chat", remedy="Add --chat.")
    date = bundle.chat_date if args.date is None else datetime.fromisoformat(iso_date(args.date))
    template = chat_template(bundle.tokenizer, date) if args.chat else None
    with load(bundle, args.target) as runtime:
        runtime.use(args.use)
        if template is not None:
            return _chat(runtime, bundle.tokenizer, template, args, sampler, stop_ids)
        tokens = bundle.tokenizer.encode(args.prompt)
        if not tokens:
            raise UsageError("the prompt holds no tokens", remedy="Give a prompt that is not empty.")
        speed = Speed()
        for piece in stream(runtime, bundle.tokenizer, tokens, sampler, args.max_tokens, stop_ids, speed):
            print(piece, end="", flush=True)
        print(flush=True)
        print_speed(speed)
    return 0


def _chat(
    runtime: Runtime,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    args: argparse.Namespace,
    sampler: Sampler,
    stop_ids: Sequence[int],
) -> int:
    """Answers each line of standard input. Ctrl-C ends an answer, or the chat if it waits for input."""
    from edgellama.runtimes.generate import Speed, stream
    from edgellama.text.conversation import Conversation

    conversation = Conversation(tokenizer, template, control=args.special)
    told = False
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    first_turn = len(messages)
    cached: list[int] = []
    for line in turns(sys.stdin):
        messages.append({"role": "user", "content": line})
        prompt = conversation.prompt(messages, runtime.context_length, args.max_tokens)
        if prompt is None:
            length = len(conversation.encode([*messages[:first_turn], messages[-1]]))
            print(
                f"edgellama: this turn has {length} tokens, and the context has {runtime.context_length}\n"
                "  Write a shorter one, or export with a larger --context.",
                file=sys.stderr,
            )
            messages.pop()
            continue
        if prompt.dropped and not told:
            print("[the context is full: the oldest turns are left out from now on]", file=sys.stderr)
            told = True
        del messages[first_turn : first_turn + prompt.dropped]
        tokens, answer, speed = prompt.ids, "", Speed()
        ids: list[int] = []
        try:
            new = _continue_from(runtime, cached, tokens)
            for piece in stream(runtime, tokenizer, new, sampler, args.max_tokens, stop_ids, speed, ids):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" [interrupted]", end="")
        print(flush=True)
        print_speed(speed)
        cached = [*tokens, *ids][: runtime.position]
        messages.append({"role": "assistant", "content": _without_note(answer)})
    return 0


def turns(source: TextIO) -> Iterator[str]:
    """Yields the lines that are not blank. Prints a prompt before each if `source` is a terminal."""
    while True:
        if source.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = source.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _continue_from(runtime: Runtime, cached: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
    """The part of `tokens` that the KV cache does not hold. Resets the cache if it holds other tokens."""
    if cached and list(tokens[: len(cached)]) == list(cached) and len(tokens) > len(cached):
        return tokens[len(cached) :]
    runtime.reset()
    return tokens


def _without_note(answer: str) -> str:
    from edgellama.runtimes.generate import FLAGS

    for note in FLAGS.values():
        if note:
            answer = answer.removesuffix(f" {note}")
    return answer


def print_speed(speed: Speed) -> None:
    """Prints the rates of prefill and decode to standard error."""
    print(
        f"[{speed.prompt_tokens} prompt tokens at {speed.prefill_rate:.0f} tok/s, "
        f"{speed.generated_tokens} generated at {speed.decode_rate:.0f} tok/s]",
        file=sys.stderr,
    )
