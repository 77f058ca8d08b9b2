"""Speed of a bundle against llama.cpp, in turns, on the same tokens with the same number of threads.

    python3 -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python==0.3.36
    python tests/benchmarks/against_llama_cpp.py BUNDLE SOURCE.gguf --python /tmp/llama/bin/python --threads 2

SOURCE.gguf is the checkpoint of the bundle. This script first quantizes it to Q4_0. The environment of
llama.cpp is separate because it brings its own numpy. Each side is a process. A turn is one prompt and one
piece of decoding on each side. Wall time and processor time are measured. With one thread, processor time is
the work done, independent of other load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgellama.bundle import Bundle
from edgellama.commands.bench import Spread, ratio

OURS = """
from edgellama.runtimes.load import load
from edgellama.host.executorch_libraries import set_threads
set_threads(threads)
runtime = load(path)
vocabulary = runtime.vocab_size
def fresh(): runtime.reset()
def feed(tokens): runtime.forward(tokens)
"""
THEIRS = """
import llama_cpp
model = llama_cpp.Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
vocabulary = model.n_vocab()
def fresh(): model.reset()
def feed(tokens): model.eval(tokens)
"""
LOOP = """
import json, sys, time
path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
{setup}
print("ready", flush=True)
for line in sys.stdin:
    prompt, steps = json.loads(line)
    tokens = [(7919 * i + 11) % vocabulary for i in range(prompt + steps)]
    def timed(pieces):
        wall, processor = time.perf_counter(), time.process_time()
        for piece in pieces:
            feed(piece)
        return time.perf_counter() - wall, time.process_time() - processor
    fresh()
    prefill = timed([tokens[:prompt]])
    decode = timed([[t] for t in tokens[prompt:]])
    print(json.dumps([prefill, decode]), flush=True)
"""
QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


def start(python: str, setup: str, path: Path, threads: int, context: int) -> subprocess.Popen[str]:
    """Process of LOOP with `setup`, once its model is loaded."""
    code = LOOP.format(setup=setup)
    process = subprocess.Popen(
        [python, "-c", code, str(path), str(threads), str(context)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"{python}: could not start; see its own error with: {python} -c 'import llama_cpp'")
    return process


def turn(process: subprocess.Popen[str], prompt: int, steps: int) -> list[list[float]]:
    """One turn: [[wall, processor] of prefill, [wall, processor] of decoding] in seconds."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([prompt, steps]) + "\n")
    process.stdin.flush()
    measured: list[list[float]] = json.loads(process.stdout.readline())
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--python", required=True, help="of the environment with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    context = Bundle.open(args.bundle).context_length
    with tempfile.TemporaryDirectory() as work:
        gguf = Path(work) / "q4_0.gguf"
        command = [args.python, "-c", QUANTIZE, str(args.source), str(gguf)]
        subprocess.run(command, check=True, capture_output=True)
        sides = {
            "edgellama": start(sys.executable, OURS, args.bundle, args.threads, context),
            "llama.cpp": start(args.python, THEIRS, gguf, args.threads, context),
        }
        turns: dict[str, list[list[list[float]]]] = {name: [] for name in sides}
        for number in range(args.repeat + 1):
            for name, process in sides.items():
                measured = turn(process, args.prompt_tokens, args.decode_tokens)
                if number:
                    turns[name].append(measured)
        for process in sides.values():
            process.communicate()
    counts = {"prefill": args.prompt_tokens, "decode": args.decode_tokens}
    result: dict[str, Any] = {"threads": args.threads, "prompt_tokens": args.prompt_tokens}
    for index, (phase, count) in enumerate(counts.items()):
        for clock, label in enumerate(("wall", "processor")):
            speeds = {name: [count / times[index][clock] for times in turns[name]] for name in turns}
            for name, values in speeds.items():
                spread = Spread.of(values)
                print(
                    f"{phase:<8}{label:<10}{name:<10} {spread.median:7.1f} ({spread.low:.1f}-{spread.high:.1f}) tok/s"
                )
            pairs = zip(speeds["edgellama"], speeds["llama.cpp"], strict=True)
            over = ratio([ours / theirs for ours, theirs in pairs])
            low, high = over["ci95"]
            print(f"{phase:<8}{label:<10}ratio      {over['mean']:7.3f} [{low:.3f}, {high:.3f}]")
            result[f"{phase}_{label}"] = {**speeds, "ratio": over}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
