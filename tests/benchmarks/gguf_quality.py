"""Quality of GGUF files on one model, all run by llama.cpp: the table of docs/benchmarks.md.

    python tests/benchmarks/gguf_quality.py --llama-cpp DIRECTORY [--recipe NAME|FILE.json]... [--max-bytes N]...
        [--tokens N] [--work DIRECTORY] [--json FILE]

DIRECTORY holds llama.cpp's libraries, with `llama_model_quantize`, which PyPI's xllamacpp does not export: the
folder `bins/linux-x64` of the npm package @node-llama-cpp/linux-x64 3.22.1 (llama.cpp v0.5.0). It makes Q4_0 and
Q4_K_M, each plain and with an importance matrix from the text that `int4` reads.

The model is the permuted one of quantization_quality.py, whose channels favour no method. Every file, ours too,
is run by the same llama.cpp, in the form that apps run, on the same tokens. Ratios of KL are paired by window.

With --max-bytes, recipe `auto` chooses schemes for files of that many bytes, and `auto-best` distils them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama_cpp_models import write_gguf, write_importance
from quantization_quality import CONTEXT, Scored, chosen_by_auto, permuted, ratio, scored_windows
from torch import Tensor

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.cli.demo import demo_checkpoint
from edgellama.export.gguf.lower import lower_to_gguf
from edgellama.export.plan import calibration
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.gate.metrics import Positions, summarize
from edgellama.host.progress import Progress
from edgellama.recipe import RECIPES, find_recipe
from edgellama.runtimes.gguf import GgufRuntime
from edgellama.targets.provenance import Provenance

BASELINE = "Q4_0 imatrix"
THEIRS = {"Q4_0": 2, "Q4_0 imatrix": 2, "Q4_K_M": 15, "Q4_K_M imatrix": 15}  # llama.h, `enum llama_ftype`

# Runs in a process of its own, because its library is another version of llama.cpp than xllamacpp's.
QUANTIZE = """
import ctypes, sys, numpy
directory, source, output, kind, importance = sys.argv[1:]
for name in ("libggml-base.so", "libggml.v0.5.0.so"):
    ggml = ctypes.CDLL(f"{directory}/{name}", ctypes.RTLD_GLOBAL)
ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
ggml.ggml_backend_load_all_from_path(f"{directory}/".encode())
llama = ctypes.CDLL(f"{directory}/libllama.v0.5.0.so")
class Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]
class Options(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("nthread", "ftype", "output_type", "embedding_type")] + [
        (n, ctypes.c_bool) for n in ("allow_requantize", "quantize_output", "only_copy", "pure", "keep_split", "dry")
    ] + [(n, ctypes.c_void_p) for n in ("imatrix", "kv_overrides", "tensor_types", "prune_layers")] + [
        ("max_buffer", ctypes.c_size_t)]
llama.llama_model_quantize_default_params.restype = Options
options = llama.llama_model_quantize_default_params()
assert options.quantize_output and not options.pure and options.output_type == options.embedding_type
options.nthread, options.ftype = 2, int(kind)
if importance:
    found = numpy.load(importance)
    kept = [(n.encode(), numpy.ascontiguousarray(found[n], numpy.float32)) for n in found.files]
    entries = (Importance * (len(kept) + 1))(*((n, v.ctypes.data, v.size) for n, v in kept))
    options.imatrix = ctypes.addressof(entries)
llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Options)]
sys.exit(llama.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(options)))
"""


def make_theirs(directory: Path, checkpoint: Checkpoint, work: Path, name: str) -> Path:
    """llama.cpp's own file of type `name`, quantized from float32."""
    source, importance, path = work / "ALL_F32.gguf", work / "importance.npz", work / f"{name}.gguf"
    if not source.exists():
        write_gguf(checkpoint, source)
    if not importance.exists():
        text = calibration(checkpoint, RECIPES["int4"], CONTEXT)
        assert text is not None
        write_importance(checkpoint, text, importance)
    if not path.exists():
        given = str(importance) if name.endswith("imatrix") else ""
        command = [
            sys.executable,
            "-c",
            QUANTIZE,
            str(directory),
            str(source),
            str(path),
            str(THEIRS[name]),
            given,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llama.cpp did not make {name}: {done.stderr[-2000:]}")
    return path


def make_ours(name: str, checkpoint: Checkpoint, work: Path) -> Path:
    """Our file with a recipe: a name, or a JSON file."""
    path = work / f"{Path(name).stem}.gguf"
    if not path.exists():
        recipe, progress = find_recipe(name), Progress(sys.stderr)
        text = calibration(checkpoint, recipe, CONTEXT)
        store = LayerStore.of(checkpoint, recipe, text) if text else LayerStore()
        model, _ = quantized_llama(checkpoint, recipe, CONTEXT, progress, calibrated_on=text, store=store)
        provenance = Provenance("Apache-2.0", checkpoint.config.parameters, "0" * 64, "0" * 64, "0", recipe)
        lower_to_gguf(model, path, provenance, tokenizer=checkpoint.tokenizer, progress=progress)
    return path


def auto_recipe(checkpoint: Checkpoint, max_bytes: int, work: Path) -> Path:
    """Recipe file with the schemes that `auto` chooses for a file of `max_bytes`, and distillation."""
    file = work / f"auto-best-{max_bytes}.json"
    if not file.exists():
        best = RECIPES["int4-best"]
        chosen = replace(
            chosen_by_auto(checkpoint, "gguf", max_bytes),
            name="auto-best-of-bytes",
            algorithm=best.algorithm,
            calibration_tokens=best.calibration_tokens,
        )
        file.write_text(json.dumps(chosen.to_dict()), encoding="utf-8")
    return file


def quality(path: Path, scored: Scored) -> list[Positions]:
    """Comparison of the file at `path`, run by llama.cpp as apps run it."""
    with GgufRuntime(path, repacked=True) as runtime:

        def run(tokens: Sequence[int]) -> Tensor:
            runtime.reset()
            return runtime.forward_all(tokens)

        positions: list[Positions] = scored.quality(run)
        return positions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", metavar="DIRECTORY", type=Path, required=True)
    parser.add_argument("--recipe", action="append", help="default: int4-fast, int4, int4-best")
    parser.add_argument(
        "--max-bytes", type=int, action="append", default=[], help="adds `auto-best` at this size"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--work", type=Path, default=Path("gguf_quality"), help="kept between runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    checkpoint = permuted(open_checkpoint(demo_checkpoint()))
    files = {name: make_theirs(args.llama_cpp, checkpoint, args.work, name) for name in THEIRS}
    names = [*(args.recipe or ["int4-fast", "int4", "int4-best"])]
    names += [str(auto_recipe(checkpoint, size, args.work)) for size in args.max_bytes]
    files |= {Path(name).stem: make_ours(name, checkpoint, args.work) for name in names}
    scored = scored_windows(checkpoint, args.tokens)
    runs = {name: quality(path, scored) for name, path in files.items()}
    table = []
    for name, run in runs.items():
        summary, size = summarize(run), files[name].stat().st_size
        share, interval = ratio(run, runs[BASELINE])
        table.append({"name": name, "bytes": size, "kl_over_q4_0": share, "ci95": interval, **summary})
        low, high = summary["kl_mean_ci95"]
        print(
            f"{name:<16} {size / 1e6:6.2f} MB  KL {summary['kl_mean']:.4f} [{low:.4f}, {high:.4f}]  "
            f"top-1 {summary['top1_agreement']:.1%}  of {BASELINE}'s KL {share:.3f} "
            f"[{interval[0]:.3f}, {interval[1]:.3f}]",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
