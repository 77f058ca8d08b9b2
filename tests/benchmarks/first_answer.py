"""Bytes and first-answer time of a classifier's pruned output layer against the same model with its whole one.

    python -m tests.benchmarks.first_answer SMOLLM2.gguf WORK                # zero-shot labels
    python -m tests.benchmarks.first_answer --guard WORK                     # random weights of the pruned Llama Guard 3 1B

Exports both with recipe int4-fast to xnnpack, without the gate. Then both answer the same prompts in turns in one
process: one prefill each, from an empty cache. Prints bytes, the peak memory of the exports, and the ratio of the times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgellama import data
from edgellama.bundle import Bundle
from edgellama.runtimes.load import load
from edgellama.text.label_prompt import prompt_ids
from tests.benchmarks.random_checkpoint import ROOT, make
from tests.helpers.tiny_guard import TEMPLATE

LABELS = [{"label": "novel", "text": " novel"}, {"label": "manual", "text": " manual"}]
PROMPT = "{text}\nThe text above is from a"
CHARACTERS = (60, 240, 900)  # of the texts
REPEATS, SEED = 20, 0


def exported(checkpoint: Path, output: Path, options: list[str]) -> tuple[Bundle, dict[str, Any]]:
    """The bundle of an export in a process of its own, and its stages."""
    result = output.with_suffix(".json")
    command = [sys.executable, "-m", "edgellama", "export", str(checkpoint), "-o", str(output), *options]
    command += ["-r", "int4-fast", "--context", "1024", "--no-validate", "--force", "--json", str(result)]
    subprocess.run(command, check=True, cwd=ROOT)
    return Bundle.open(output), json.loads(result.read_text())


def guard_checkpoint(directory: Path) -> Path:
    """Random weights with the sizes of the pruned Llama Guard 3 1B, and a template in the form of a guard's."""
    if not directory.exists():
        make("guard-1B", directory)
        (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def seconds(bundles: list[Bundle], prompts: list[list[int]], repeats: int) -> np.ndarray[Any, Any]:
    """Processor seconds of a prefill, float64 [bundle, prompt, repeat]. All bundles answer before the next repeat."""
    found = np.zeros((len(bundles), len(prompts), repeats))
    runtimes = [load(bundle, "xnnpack") for bundle in bundles]
    order = np.random.default_rng(SEED)
    for repeat in range(-1, repeats):  # the first one warms up
        for prompt, tokens in enumerate(prompts):
            for number in order.permutation(len(bundles)):
                runtimes[number].reset()
                start = time.process_time()
                runtimes[number].forward(tokens)
                if repeat >= 0:
                    found[number, prompt, repeat] = time.process_time() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--guard", action="store_true", help="random weights in place of a checkpoint")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.guard:
        checkpoint, options = guard_checkpoint(args.work / "guard-1B"), ["--task", "guard"]
    else:
        labels = args.work / "labels.json"
        labels.write_text(json.dumps(LABELS))
        checkpoint = args.checkpoint
        options = ["--task", "classify", "--labels", str(labels), "--prompt", PROMPT]
    runs = [
        exported(checkpoint, args.work / f"{name}.edgellama", given)
        for name, given in (("whole", []), ("pruned", options))
    ]
    sizes = [bundle.manifest["artifacts"][0]["bytes"] for bundle, _ in runs]
    print(f"bytes: whole {sizes[0]}, pruned {sizes[1]}, saved {sizes[0] - sizes[1]}")
    for name, (_, result) in zip(("whole", "pruned"), runs, strict=True):
        print(f"export, {name}: {json.dumps(result['stages'])}")
    bundles = [bundle for bundle, _ in runs]
    classifier, text = bundles[1].classifier, data.read_text("evaluation_persuasion.txt")
    assert classifier is not None
    texts = [text[1000 : 1000 + count] for count in CHARACTERS]
    prompts = [prompt_ids(classifier, bundles[1].tokenizer, t, 1024) for t in texts]
    times = seconds(bundles, prompts, args.repeats)
    for number, tokens in enumerate(prompts):
        whole, pruned = times[:, number]
        ratios = np.sort(pruned / whole)
        low, high = ratios[int(0.05 * len(ratios))], ratios[int(0.95 * len(ratios))]
        print(
            f"{len(tokens)} tokens: processor seconds whole {np.median(whole):.4f}, pruned {np.median(pruned):.4f}, "
            f"ratio {np.median(ratios):.3f} (5 % to 95 % of {len(ratios)} pairs: {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
