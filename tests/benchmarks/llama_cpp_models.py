"""llama.cpp's own quantizations of a checkpoint, and their logits, for `quantization_quality.py`.

llama.cpp lives in an environment of its own, because llama-cpp-python brings its own numpy. The programs for
that environment are strings below. Its quantizer makes its own decisions: the mix of types of Q4_K_M, and
other types for rows that are no multiple of 256. The importance matrix holds the mean squares of every
linear's inputs, as `llama-imatrix` collects them. They are computed here on the calibration text of recipe
`int4`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.host.progress import Progress
from edgellama.host.threads import workers
from edgellama.model.layerwise import SharedInput, layer_of, run_layer
from edgellama.text.calibration import Calibration

LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

QUANTIZE = """
import ctypes, sys, llama_cpp, numpy
source, output, kind, importance = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind), 2
found = numpy.load(importance)
Entry = llama_cpp.llama_model_imatrix_data
entries = (Entry * (len(found.files) + 1))()  # ends with an empty name
kept = []
for entry, name in zip(entries, found.files):
    values = numpy.ascontiguousarray(found[name], dtype=numpy.float32)
    kept += [values, name.encode()]
    entry.name, entry.size = kept[-1], values.size
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
if found.files:
    options.imatrix = ctypes.cast(entries, ctypes.POINTER(Entry))
sys.exit(llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(options)))
"""
LOGITS = """
import json, sys, llama_cpp, numpy
model = llama_cpp.Llama(sys.argv[1], n_ctx=int(sys.argv[2]), logits_all=True, n_threads=2, verbose=False)
out = sys.stdout.buffer
for line in sys.stdin:
    tokens = json.loads(line)
    model.reset()
    model.eval(tokens)
    out.write(numpy.ascontiguousarray(model.scores[: len(tokens)], dtype=numpy.float32).tobytes())
    out.flush()
"""


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the checkpoint in float32, with the metadata of the GGUF that it was read from."""
    writer = gguf.GGUFWriter(path, "llama")
    for field in gguf.GGUFReader(checkpoint.path).fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
            "general.architecture",
            "general.file_type",
        ):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for name in checkpoint.config.tensor_shapes():
        weight = checkpoint.tensor(name)
        # RoPE of llama.cpp rotates neighbours, that of Hugging Face rotates halves.
        if ".q_proj." in name or ".k_proj." in name:
            halves = weight.reshape(-1, 2, checkpoint.config.head_dim // 2, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(gguf_name(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor: model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight."""
    module, _, attribute = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{attribute}"
    index, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{LINEARS[inner]}.{attribute}"


@torch.no_grad()
def write_importance(checkpoint: Checkpoint, calibration: Calibration, path: Path) -> None:
    """Writes the mean square of each input of each full-precision linear, by llama.cpp's tensor names."""
    model = load_llama(checkpoint, max(map(len, calibration.windows)))
    states = [model.model.embed_tokens(torch.tensor(window)) for window in calibration.windows]
    squares: dict[str, np.ndarray] = {}
    progress = Progress()
    with workers() as pool, progress.bar("importance", len(model.model.layers), "layer"):
        for index in range(model.config.num_hidden_layers):

            def visit(reading: SharedInput, inputs: list[Tensor], layer: int = index) -> None:
                mean = torch.cat(inputs).square().mean(0).numpy()
                for name in reading.linears:
                    squares[gguf_name(f"model.layers.{layer}.{name}.weight")] = mean

            states = run_layer(layer_of(model, index), states, model.config, {}, pool, visit)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **squares)


def quantize(python: str, source: Path, output: Path, kind: str, importance: Path) -> None:
    """Quantizes the GGUF `source` with llama.cpp to `kind`, a name such as Q4_K_M."""
    command = [python, "-c", QUANTIZE, str(source), str(output), kind, str(importance)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp did not make {kind}: {done.stderr[-2000:]}")


@contextmanager
def logits_of(python: str, path: Path, context: int, vocabulary: int) -> Iterator[Logits]:
    """Runs llama.cpp with the model at `path` in a process of its own."""
    process = subprocess.Popen(
        [python, "-c", LOGITS, str(path), str(context)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Logits(process, vocabulary)
    finally:
        process.communicate()


class Logits:
    """Process of llama.cpp. A call with tokens gives logits, float32 [T, vocabulary], from an empty cache."""

    def __init__(self, process: subprocess.Popen[bytes], vocabulary: int) -> None:
        self.process, self.vocabulary = process, vocabulary

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(list(tokens)).encode() + b"\n")
        self.process.stdin.flush()
        size = 4 * len(tokens) * self.vocabulary
        data = bytearray(self.process.stdout.read(size))
        if len(data) < size:
            raise SystemExit("llama.cpp stopped; run the LOGITS program by hand to see why")
        return torch.frombuffer(data, dtype=torch.float32).reshape(len(tokens), self.vocabulary)
