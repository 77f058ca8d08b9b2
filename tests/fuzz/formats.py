"""Fuzz worker: reads seeded mutations of small files of every format, in a process with limits.

    python -m tests.fuzz.formats WORK [FORMAT FIRST COUNT]...      (tests/fuzz/runs.py starts it)

A case is accepted, or refused with an EdgellamaError that has a readable sentence and a remedy. Findings are:

- any other exception
- a file opened for writing outside the work folder, or a host file or device opened at all
- a started process or a socket
- more than 1 GiB of memory, which a limit of the process ends
- more than 60 seconds, which SIGALRM ends

`python -m tests.fuzz.formats WORK FORMAT N 1` repeats case N.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edgellama.errors import EdgellamaError
from tests.fuzz.mutations import (
    OUTSIDE,
    STRINGS,
    mutate_bytes,
    mutate_json,
    mutate_message,
    mutate_template,
)
from tests.helpers.paths import ROOT, TINY, VECTORS

SECONDS, MEMORY = 60, 1 << 30
LONGEST = 2000  # characters of a message

# Number of cases of each format in a plain run of the tests. EDGELLAMA_FUZZ multiplies them.
CASES: Mapping[str, int] = {
    "config": 2400,
    "safetensors": 3200,
    "index": 1500,
    "tokenizer": 1200,
    "tokenizer_config": 1000,
    "gguf": 1800,
    "meta": 400,
    "manifest": 2600,
    "golden": 1800,
    "device_log": 3400,
    "pte": 200,
    "coreml_pte": 300,
    "mlpackage": 250,
    "onnx": 1000,
    "mlx": 600,
    "recipe": 2000,
    "template": 250,
    "links": 200,
    "signature": 900,
    "delta": 600,
    "gguf_output": 1000,
    "adapter": 1200,
    "given": 800,
    "labels": 1000,
    "challenge": 1000,
}


LABELS = [
    {"label": "yes", "text": ["yes", "Yes"], "description": "It is so."},
    {"label": "no", "text": "no"},
]
LABELLED = [
    {"text": "Is it?", "label": "yes", "group": "en"},
    {"text": "né 你好 🙂", "label": "no"},
    {"text": "Never.", "label": "no", "group": "en"},
]


def build_seeds(work: Path) -> None:
    """Writes the unmutated files to WORK/seeds."""
    from safetensors.torch import save_file

    from edgellama.checkpoints import open_checkpoint
    from edgellama.export.coreml.lower import lower_to_coreml
    from edgellama.export.coreml.lower_pte import lower_to_coreml_pte
    from edgellama.export.gguf.lower import lower_to_gguf
    from edgellama.export.mlx.lower import lower_to_mlx
    from edgellama.export.onnx.lower import lower_to_onnx
    from edgellama.export.quantization.quantize import quantized_llama
    from edgellama.host.progress import Progress
    from edgellama.recipe import RECIPES
    from tests.helpers import adapters, gguf_models, meta_models, quantized_models, tiny_models

    seeds = work / "seeds"
    seeds.mkdir(parents=True)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    checkpoint = tiny_models.random_checkpoint(seeds / "hf", small)
    shutil.copy(TINY / "generation_config.json", seeds / "hf")
    _shrink_tokenizer(seeds / "hf" / "tokenizer.json")
    sharded = seeds / "sharded"
    shutil.copytree(seeds / "hf", sharded)
    (sharded / "model.safetensors").unlink()
    names, weight_map = list(checkpoint.infos), {}
    for i, names_of_shard in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: checkpoint.read(name).clone() for name in names_of_shard}, sharded / file)
        weight_map.update(dict.fromkeys(names_of_shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    config = gguf_models.tiny_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8)
    source = gguf_models.source(config)
    gguf_models.convert(source).write(seeds / "model.gguf")
    meta = seeds / "meta"
    meta.mkdir()
    model = meta_models.source_model(num_hidden_layers=1)
    meta_models.write(meta, meta_models.meta_weights(model), params={**meta_models.PARAMS, "n_layers": 1})
    recipe = RECIPES["int4-fast"]
    provenance = tiny_models.provenance(recipe)
    tiny_models.lower(checkpoint, recipe, seeds / "model.pte", context=32)
    quantized, _ = quantized_llama(checkpoint, recipe, 32)
    lower_to_coreml(quantized, seeds / "model.mlpackage", provenance, progress=Progress())
    lower_to_onnx(quantized, seeds / "onnx", provenance, progress=Progress())
    lower_to_mlx(quantized, seeds / "mlx", provenance, progress=Progress())
    lower_to_coreml_pte(quantized, seeds / "coreml.pte", provenance, progress=Progress())
    lower_to_gguf(
        quantized,
        seeds / "output.gguf",
        provenance,
        tokenizer=open_checkpoint(seeds / "hf").tokenizer,
        progress=Progress(),
    )
    adapters.adapter_of_all(checkpoint, seeds / "adapter")
    quantized_models.gptq_checkpoint(seeds / "given", quantized_models.codes_by_hand(32))
    _shrink_tokenizer(seeds / "given" / "tokenizer.json")
    (seeds / "labels.json").write_text(json.dumps(LABELS))
    (seeds / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in LABELLED))
    challenge = json.loads((VECTORS / "challenge.json").read_bytes())["challenge"]
    (seeds / "challenge.json").write_text(json.dumps(challenge))
    (seeds / "response.json").write_text(json.dumps(_response(challenge)))
    shutil.copytree(VECTORS / "bundle", seeds / "bundle")
    _signed_update(seeds)


def _response(challenge: Mapping[str, Any]) -> dict[str, Any]:
    """An answer of uniform probabilities to a challenge."""
    one = {"ids": [list(range(4))], "logp": [[-2.0] * 4], "rest": [-0.8]}
    figures = dict.fromkeys(("prefill_tok_s", "decode_tok_s", "load_ms", "peak_bytes"), 1.5)
    return {
        "schema": "edgellama.response/1",
        **{key: challenge[key] for key in ("nonce", "target", "artifact_sha256")},
        "device": "phone",
        "os": "Android 15",
        "runtime": "executorch 1.5.1",
        "sequences": [{"name": sequence["name"], **one} for sequence in challenge["sequences"]],
        **figures,
    }


def _signed_update(seeds: Path) -> None:
    """Writes another release of the vectors' bundle, signed with the key of the vectors, and the delta to it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edgellama.bundle import Bundle
    from edgellama.bundle.bundle import write_manifest
    from edgellama.release.delta import write_delta
    from edgellama.release.signature import ManifestSignature
    from tests.helpers.keys import SEED

    old = Bundle.open(seeds / "bundle")
    signed = Path(shutil.copytree(old.path, seeds / "signed"))
    (signed / "xnnpack/model.pte").write_bytes(
        b"another model; the vectors do not say what it would compute\n"
    )
    new = write_manifest(signed, {k: v for k, v in old.manifest.items() if k not in ("schema", "files")})
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    signature = ManifestSignature.of((signed / "manifest.json").read_bytes(), key, 3)
    (signed / "signature.json").write_text(signature.to_json())
    write_delta(old, new, seeds / "update.delta")


def _shrink_tokenizer(path: Path) -> None:
    """Keeps the first 300 tokens. Cases take less time, and mutations reach the other parts more often."""
    data = json.loads(path.read_bytes())
    vocab = dict(list(data["model"]["vocab"].items())[:300])
    pairs = (m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"])
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    data["model"] |= {"vocab": vocab, "merges": merges[:20]}
    path.write_text(json.dumps(data))


class Case:
    """One case: its own folder, the seeds, and a random generator seeded by format and number."""

    def __init__(self, work: Path, name: str, number: int) -> None:
        self.seeds = work / "seeds"
        self.folder = work / f"case-{name}{'.mlpackage' if name == 'mlpackage' else ''}"
        self.rng = random.Random(f"{name}/{number}")

    def fresh(self, seed: str) -> Path:
        """Copies a seed with hard links. Cases replace files and never write into them."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        source = self.seeds / seed
        if source.is_dir():
            shutil.copytree(source, self.folder, copy_function=os.link)
            return self.folder
        self.folder.mkdir()
        os.link(source, self.folder / source.name)
        return self.folder / source.name

    def reused(self, seed: str) -> Path:
        """A copy that is made once, for formats that replace the same files in each case."""
        path = self.folder if (self.seeds / seed).is_dir() else self.folder / seed
        return path if path.exists() else self.fresh(seed)

    def put(self, path: Path, content: bytes) -> None:
        """Replaces a file, so that the seed keeps its content."""
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    def json(self, path: Path) -> Any:
        return json.loads(path.read_bytes())


def read_checkpoint(path: Path) -> None:
    """Opens a checkpoint and reads every tensor."""
    from edgellama.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(path)
    for name in checkpoint.config.tensor_shapes():
        checkpoint.tensor(name)


def fuzz_config(case: Case) -> None:
    path = case.reused("hf")
    name = case.rng.choice(("config.json", "config.json", "config.json", "generation_config.json"))
    seed = case.json(case.seeds / "hf" / name)
    case.put(path / name, mutate_json(case.rng, seed))
    try:
        read_checkpoint(path)
    finally:
        case.put(path / name, (case.seeds / "hf" / name).read_bytes())


def fuzz_safetensors(case: Case) -> None:
    path = case.reused("hf")
    data = (case.seeds / "hf" / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    if case.rng.random() < 0.3:
        data = mutate_bytes(case.rng, data, head=8 + size)
    else:
        header = mutate_json(case.rng, json.loads(data[8 : 8 + size]))
        stated_size = len(header)
        if case.rng.random() >= 0.9:
            stated_size = case.rng.choice((0, 1, size, 10**9, 2**63, 2**64 - 1))
        data = struct.pack("<Q", stated_size) + header + data[8 + size :]
    case.put(path / "model.safetensors", data)
    read_checkpoint(path)


def fuzz_index(case: Case) -> None:
    path = case.reused("sharded")
    name = "model.safetensors.index.json"
    case.put(path / name, mutate_json(case.rng, case.json(case.seeds / "sharded" / name)))
    read_checkpoint(path)


def use_tokenizer(path: Path) -> None:
    """Reads a tokenizer, encodes texts and decodes them."""
    from edgellama.text.tokenizer import Tokenizer, missing_merges

    tokenizer = Tokenizer.from_directory(path)
    stream = tokenizer.stream()
    for text in ("Hello, world! 123", "né 你好 🙂\n\n  x", "a" * 64, "<|im_start|>user"):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        tokenizer.decode(ids, skip_special_tokens=False)
        for token in ids[:8]:
            stream.push(token)
    missing_merges(tokenizer.files["tokenizer.json"])


def _varied_tokenizer(case: Case) -> Any:
    """tokenizer.json with steps that the seed lacks, some of them malicious."""
    data = case.json(case.seeds / "hf" / "tokenizer.json")
    parts: dict[str, tuple[Any, ...]] = {
        "normalizer": (
            {"type": "NFKC"},
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"Regex": " +"}, "content": "  "},
            {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30,
            },
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        ),
        "pre_tokenizer": (
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            {"type": "Sequence", "pretokenizers": [data["pre_tokenizer"]["pretokenizers"][-1]] * 40},
        ),
        "post_processor": (
            {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 3,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {},
            },
        ),
        "truncation": ({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 2},),
        "padding": (
            {
                "strategy": {"Fixed": 8},
                "direction": "Right",
                "pad_to_multiple_of": 8,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            },
        ),
    }
    for key, choices in parts.items():
        if case.rng.random() < 0.1:
            data[key] = case.rng.choice(choices)
    return data


def fuzz_tokenizer(case: Case) -> None:
    path = case.reused("hf")
    case.put(path / "tokenizer.json", mutate_json(case.rng, _varied_tokenizer(case)))
    use_tokenizer(path)


def fuzz_tokenizer_config(case: Case) -> None:
    path = case.reused("hf")
    seed = case.json(case.seeds / "hf" / "tokenizer_config.json")
    name = case.rng.choice(("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"))
    seed |= {"chat_template": case.rng.choice(("{{ x }}", [{"name": "default", "template": "{{ x }}"}]))}
    seed |= {"bos_token": {"content": "<s>", "special": True}} if case.rng.random() < 0.5 else {}
    case.put(path / name, mutate_json(case.rng, seed))
    try:
        use_tokenizer(path)
    finally:
        (path / name).unlink()
        if name == "tokenizer_config.json":
            os.link(case.seeds / "hf" / "tokenizer_config.json", path / name)


def fuzz_gguf(case: Case) -> None:
    path = case.reused("model.gguf")
    data = (case.seeds / "model.gguf").read_bytes()
    case.put(path, mutate_bytes(case.rng, data, head=case.rng.choice((64, 1200, 20_000, None))))
    read_checkpoint(path)


def fuzz_meta(case: Case) -> None:
    path = case.reused("meta")
    name = case.rng.choice(("params.json", "params.json", "consolidated.00.pth", "tokenizer.model"))
    seed = (case.seeds / "meta" / name).read_bytes()
    content = (
        mutate_json(case.rng, json.loads(seed)) if name == "params.json" else mutate_bytes(case.rng, seed)
    )
    case.put(path / name, content)
    try:
        read_checkpoint(path)
    finally:
        case.put(path / name, seed)


def fuzz_manifest(case: Case) -> None:
    from edgellama.bundle import Bundle
    from edgellama.commands.inspect import inspect
    from edgellama.text.chat import ChatFormat

    path = case.reused("bundle")
    manifest = case.json(case.seeds / "bundle" / "manifest.json")
    case.put(path / "manifest.json", mutate_json(case.rng, manifest))
    bundle = Bundle.open(path)
    _ = bundle.recipe, bundle.config, bundle.targets, bundle.context_length
    for target in bundle.targets:
        bundle.artifact_sha256(target)
    if bundle.manifest["chat"]["format"]:
        ChatFormat.from_dict(bundle.manifest["chat"]["format"])
    format_safely(inspect(path))
    if case.rng.random() < 0.1:
        from edgellama.release.sbom import bill_of_materials

        bill_of_materials(bundle)
    for target in bundle.targets:
        bundle.artifact(target)
    _ = bundle.tokenizer


def format_safely(data: Mapping[str, Any]) -> None:
    """Formats data as `inspect` prints it. Asserts that no character moves the cursor."""
    from edgellama.files import to_json
    from edgellama.report.tables import to_text

    text = to_text(data)
    assert all(c.isprintable() or c == "\n" for c in text), "output that moves the cursor"
    to_json(json.loads(json.dumps(dict(data))))


def fuzz_golden(case: Case) -> None:
    from edgellama.bundle import Bundle
    from edgellama.bundle.golden import FILE, read_golden

    path = case.reused("bundle")
    content = mutate_json(case.rng, case.json(case.seeds / "bundle" / FILE))
    case.put(path / FILE, content)
    _hashed(case, path, FILE, content)
    golden = read_golden(Bundle.open(path))
    for target in golden.data["artifacts"]:
        golden.limits(target)
    for number in range(len(golden.sequences)):
        golden.expected["reference"][golden.rows(number)]


def _hashed(case: Case, path: Path, name: str, content: bytes) -> None:
    """Writes the hash of the content into the manifest, as an attacker would."""
    manifest = case.json(case.seeds / "bundle" / "manifest.json")
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    case.put(path / "manifest.json", json.dumps(manifest).encode())


def device_log(golden: Any, bundle: Any) -> dict[str, Any]:
    """Log of a phone that computes exactly the values of the host."""
    log: dict[str, Any] = {
        "schema": "edgellama.device/1",
        "device": "phone",
        "os": "Android 15",
        "runtime": "executorch 1.4.0",
        "bundle": "vectors",
        "target": "xnnpack",
        "artifact_sha256": bundle.artifact_sha256("xnnpack"),
        "golden_sha256": golden.sha256,
        "kl_mean": 0.1,
        "top1_agreement": 1.0,
        "parity_kl_mean": 0.0,
        "parity_top1_agreement": 1.0,
        "prefill_tok_s": 100.0,
        "decode_tok_s": 20.0,
        "load_ms": 50.0,
        "peak_bytes": 10**8,
        "verdict": "pass",
        "checks": [],
    }
    log["sequences"] = [
        {
            "name": s.name,
            "tokens_match": True,
            "kl": [0.1] * s.scored,
            "top1": [True] * s.scored,
            "parity_kl": [0.0] * s.scored,
            "parity_top1": [True] * s.scored,
        }
        for s in golden.sequences
    ]
    return log


@cache
def _vectors(path: Path) -> tuple[Any, Any]:
    from edgellama.bundle import Bundle
    from edgellama.bundle.golden import read_golden

    bundle = Bundle.open(path)
    return bundle, read_golden(bundle)


def fuzz_device_log(case: Case) -> None:
    from edgellama.gate.device import judge, read_device_logs, summary

    bundle, golden = _vectors(case.seeds / "bundle")
    case.folder.mkdir(exist_ok=True)
    path = case.folder / "device.json"
    case.put(path, mutate_json(case.rng, device_log(golden, bundle)))
    (log,) = read_device_logs([path], ["xnnpack"])
    judge(bundle, golden, log)
    summary(log)


def fuzz_pte(case: Case) -> None:
    from edgellama.commands.inspect import inspect

    path = case.reused("model.pte")
    data = (case.seeds / "model.pte").read_bytes()
    case.put(path, mutate_bytes(case.rng, data, head=case.rng.choice((64, 2000, 40_000, None))))
    format_safely(inspect(path))


def fuzz_coreml_pte(case: Case) -> None:
    from edgellama.formats.coreml_pte import BACKEND, unpack
    from edgellama.formats.mlpackage import read_mlpackage
    from edgellama.formats.pte import delegate_data

    stored = case.seeds / "coreml.blob"
    if not stored.exists():
        blobs, named = delegate_data(case.seeds / "coreml.pte", BACKEND)
        stored.write_bytes(max((*blobs, *named.values()), key=len))
    blob = stored.read_bytes()
    table = json.JSONDecoder().raw_decode(blob[-(2**20) :][::-1].decode("utf-8", "replace"))[0]
    case.folder.mkdir(exist_ok=True)
    folder = case.folder / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    length = len(json.dumps(table))
    mutated = blob[:-length] + mutate_json(case.rng, table)[::-1]
    try:
        unpack(mutated, folder)
    except (ValueError, OSError) as error:  # `extracted_packages` turns it into a BundleError
        assert len(str(error)) < LONGEST
        return
    for package in folder.rglob("*.mlpackage"):
        read_mlpackage(package)


def fuzz_mlpackage(case: Case) -> None:
    from coremltools.proto import Model_pb2

    from edgellama.commands.inspect import inspect

    path, seed = case.reused("model.mlpackage"), case.seeds / "model.mlpackage"
    model = "Data/com.apple.CoreML/model.mlmodel"
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    kind = case.rng.random()
    name = "Manifest.json" if kind < 0.15 else weights if kind < 0.3 else model
    content = (seed / name).read_bytes()
    if name == "Manifest.json":
        content = mutate_json(case.rng, json.loads(content))
    elif name == weights or kind < 0.45:
        content = mutate_bytes(case.rng, content)
    else:
        spec = Model_pb2.Model.FromString(content)
        mutate_message(case.rng, spec)
        content = spec.SerializeToString()
    case.put(path / name, content)
    try:
        format_safely(inspect(path))
        from edgellama.formats.mlpackage import read_mlpackage

        for weight in read_mlpackage(path).weights:
            for tensor in weight.parts.values():
                tensor.array()
    finally:
        case.put(path / name, (seed / name).read_bytes())


def fuzz_onnx(case: Case) -> None:
    import onnx

    from edgellama.commands.inspect import inspect
    from edgellama.formats.onnx_model import read_onnx

    path = case.reused("onnx")
    content = (case.seeds / "onnx" / "model.onnx").read_bytes()
    if case.rng.random() < 0.3:
        content = mutate_bytes(case.rng, content)
    else:
        proto = onnx.ModelProto.FromString(content)
        mutate_message(case.rng, proto)
        content = proto.SerializeToString()
    case.put(path / "model.onnx", content)
    format_safely(inspect(path))
    file = read_onnx(path)
    for name in file.tensors:
        file.array(name)


def fuzz_mlx(case: Case) -> None:
    from edgellama.commands.inspect import inspect
    from edgellama.formats.mlx_model import read_mlx
    from edgellama.targets.mlx.describe import quantization

    path, seed = case.reused("mlx"), case.seeds / "mlx"
    kind = case.rng.random()
    name = "config.json" if kind < 0.4 else "model.safetensors"
    content = (seed / name).read_bytes()
    if name == "config.json":
        content = mutate_json(case.rng, json.loads(content))
    elif kind < 0.7:
        content = mutate_bytes(case.rng, content, head=2000)
    else:
        length = int.from_bytes(content[:8], "little")
        header = mutate_json(case.rng, json.loads(content[8 : 8 + length]))
        content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    try:
        case.put(path / name, content)
        format_safely(inspect(path))
        file = read_mlx(path)
        quantization(file)
        for module in file.quantized:
            file.packed(module)
    finally:
        case.put(path / name, (seed / name).read_bytes())


def fuzz_recipe(case: Case) -> None:
    from edgellama.recipe import RECIPES, find_recipe

    case.folder.mkdir(exist_ok=True)
    path = case.folder / "recipe.json"
    recipe = RECIPES[case.rng.choice(sorted(RECIPES))]
    case.put(path, mutate_json(case.rng, recipe.to_dict()))
    find_recipe(str(path)).assign(["model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"])


def fuzz_template(case: Case) -> None:
    from edgellama.text.chat import ChatTemplate

    source = (case.seeds / "bundle" / "tokenizer" / "chat_template.jinja").read_text()
    template = ChatTemplate(mutate_template(case.rng, source), bos_token="<s>", eos_token="</s>")
    template.render([{"role": "user", "content": case.rng.choice(STRINGS)}])


def fuzz_links(case: Case) -> None:
    """Replaces a file or a folder by a link, an empty folder, or a pipe without a writer."""
    from edgellama.commands.inspect import inspect

    seed = case.rng.choice(("bundle", "model.mlpackage", "onnx", "hf", "sharded"))
    case.folder = case.folder.with_suffix(Path(seed).suffix)
    path = case.fresh(seed)
    victim = case.rng.choice(sorted(path.rglob("*")))
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    kind = case.rng.random()
    if kind < 0.2:
        os.mkfifo(victim)
    elif kind < 0.3:
        victim.mkdir()
    else:
        elsewhere = (OUTSIDE, "/etc", "..", ".", "../../../../etc/hostname", "/dev/zero")
        victim.symlink_to(case.rng.choice((*elsewhere, "nowhere", victim.name)))
    format_safely(inspect(path))


def fuzz_signature(case: Case) -> None:
    """Both signatures' files. An accepted one has only white space or the hint changed."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edgellama.release.signature import verify_manifest
    from tests.helpers.keys import SEED

    path = case.reused("signed")
    seed = (case.seeds / "signed/signature.json").read_bytes()
    mutate = case.rng.random() < 0.5
    content = mutate_json(case.rng, json.loads(seed)) if mutate else mutate_bytes(case.rng, seed)
    case.put(path / "signature.json", content)
    verify_manifest(path, Ed25519PrivateKey.from_private_bytes(SEED).public_key())


def fuzz_delta(case: Case) -> None:
    """Both sides of a delta's header, and the frames. An accepted one gives exactly the new bundle."""
    from edgellama.bundle import Bundle
    from edgellama.release.apply import apply_delta

    path = case.reused("update.delta")
    data = (case.seeds / "update.delta").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    if case.rng.random() < 0.4:
        data = mutate_bytes(case.rng, data, head=case.rng.choice((8 + size, None)))
    else:
        header = mutate_json(case.rng, json.loads(data[8 : 8 + size]))
        data = struct.pack("<Q", len(header)) + header + data[8 + size :]
    case.put(path, data)
    output = case.folder / "made.edgellama"
    shutil.rmtree(output, ignore_errors=True)
    try:
        apply_delta(Bundle.open(case.seeds / "bundle"), path, output)
    finally:
        left = {p.name for p in case.folder.iterdir()} - {"update.delta", "made.edgellama"}
        assert not left, left
    new = case.seeds / "signed"
    for file in output.rglob("*"):
        if file.is_file() and file.name != "signature.json":
            assert file.read_bytes() == (new / file.relative_to(output)).read_bytes(), file


@cache
def _lowered(seeds: Path) -> tuple[Any, Any]:
    """The quantized model that the exported seeds hold, and their provenance."""
    from edgellama.checkpoints import open_checkpoint
    from edgellama.export.quantization.quantize import quantized_llama
    from edgellama.recipe import RECIPES
    from tests.helpers.tiny_models import provenance

    recipe = RECIPES["int4-fast"]
    model, _ = quantized_llama(open_checkpoint(seeds / "hf"), recipe, 32)
    return model, provenance(recipe)


def fuzz_gguf_output(case: Case) -> None:
    """An exported file. One that passes every structure check has the weights of the seed."""
    import torch

    from edgellama.commands.inspect import inspect
    from edgellama.formats.gguf import read_gguf
    from edgellama.targets.gguf.structure import check_structure, stored_codes

    model, provenance = _lowered(case.seeds)
    path, seed = case.reused("output.gguf"), case.seeds / "output.gguf"
    head = case.rng.choice((64, 1200, 20_000, None))
    case.put(path, mutate_bytes(case.rng, seed.read_bytes(), head=head))
    passed = all(check.verdict == "pass" for check in check_structure(path, model, provenance))
    format_safely(inspect(path))
    read_checkpoint(path)
    list(stored_codes(path))
    if passed:
        mutated, original = read_gguf(path), read_gguf(seed)
        assert all(torch.equal(mutated.read(name), original.read(name)) for name in original.tensors)


@cache
def _base(seeds: Path) -> Any:
    from edgellama.checkpoints import open_checkpoint

    return open_checkpoint(seeds / "hf")


def _mutated_safetensors(case: Case, data: bytes) -> bytes:
    if case.rng.random() < 0.5:
        return mutate_bytes(case.rng, data, head=2000)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(case.rng, json.loads(data[8 : 8 + length]))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def fuzz_adapter(case: Case) -> None:
    from edgellama.checkpoints.adapters import with_adapters

    path, seed = case.reused("adapter"), case.seeds / "adapter"
    name = case.rng.choice(("adapter_config.json", "adapter_model.safetensors"))
    content = (seed / name).read_bytes()
    as_json = name == "adapter_config.json"
    mutated = mutate_json(case.rng, json.loads(content)) if as_json else _mutated_safetensors(case, content)
    case.put(path / name, mutated)
    try:
        merged = with_adapters(_base(case.seeds), [path])
        for tensor in merged.config.tensor_shapes():
            merged.tensor(tensor)
    finally:
        case.put(path / name, content)


def fuzz_given(case: Case) -> None:
    """A checkpoint of GPTQ's codes, with altered settings or altered tensors."""
    from edgellama.checkpoints import open_checkpoint

    path, seed = case.reused("given"), case.seeds / "given"
    name = case.rng.choice(("config.json", "model.safetensors"))
    content = (seed / name).read_bytes()
    if name == "config.json":
        config = json.loads(content)
        settings = mutate_json(case.rng, config.pop("quantization_config"))
        mutated = json.dumps(config).encode()[:-1] + b', "quantization_config": ' + settings + b"}"
    else:
        mutated = _mutated_safetensors(case, content)
    case.put(path / name, mutated)
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.config.tensor_shapes():
            checkpoint.tensor(tensor)
        if checkpoint.given is not None:
            checkpoint.given.to_dict()
            for module in checkpoint.given.schemes:
                checkpoint.given.codes(module), checkpoint.given.raw(module)
    finally:
        case.put(path / name, content)


def fuzz_labels(case: Case) -> None:
    """Labels of a classifier, and labelled texts."""
    from edgellama.checkpoints.labels import read_labels
    from edgellama.text.labelled import read_labelled

    case.folder.mkdir(exist_ok=True)
    path = case.folder / "file"
    if case.rng.random() < 0.5:
        case.put(path, mutate_json(case.rng, LABELS))
        read_labels(path)
        return
    lines = [json.dumps(row).encode() for row in LABELLED]
    number = case.rng.randrange(len(lines))
    lines[number] = mutate_json(case.rng, LABELLED[number])
    case.put(path, b"\n".join(lines))
    texts = read_labelled(path)
    _ = texts.sha256, texts.groups
    texts.check_labels(("yes", "no"))


def fuzz_challenge(case: Case) -> None:
    """A challenge, or a device's answer to it."""
    from edgellama.gate.challenge import read_challenge, read_response

    case.folder.mkdir(exist_ok=True)
    name = case.rng.choice(("challenge.json", "response.json"))
    path = case.folder / name
    case.put(path, mutate_json(case.rng, case.json(case.seeds / name)))
    (read_challenge if name == "challenge.json" else read_response)(path)


FORMATS: Mapping[str, Callable[[Case], None]] = {name: globals()[f"fuzz_{name}"] for name in CASES}

# The schema compiler that reads .pte files, and the sandbox of templates.
_ALLOWED_PROCESSES = ("flatc", "python")


def watch(work: Path, events: list[str]) -> None:
    """Appends forbidden actions of readers to `events`: files, processes, sockets and pickles."""
    roots = (str(work), "/dev/null", "/dev/urandom")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writing = (isinstance(mode, str) and any(c in mode for c in "wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            )
            if isinstance(path, (str, bytes)):
                name = os.fsdecode(path)
                if name.startswith(("/etc/host", "/dev/zero")):
                    events.append(f"opened {name}")
                if writing and not os.path.abspath(name).startswith(roots):
                    events.append(f"opened {name} for writing")
        elif event in ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "socket.connect"):
            events.append(event)
        elif event == "pickle.find_class":
            events.append(f"unpickled {arguments}")
        elif event == "subprocess.Popen" and not any(a in str(arguments[0]) for a in _ALLOWED_PROCESSES):
            events.append(f"started {arguments[0]}")

    sys.addaudithook(hook)


def run_case(work: Path, name: str, number: int, events: list[str]) -> tuple[str, str | None]:
    """Runs a case. Returns "accepted" or "refused", and the finding if there is one."""
    events.clear()
    outcome, finding = "accepted", None
    try:
        FORMATS[name](Case(work, name, number))
    except EdgellamaError as error:
        outcome = "refused"
        message = error.message
        if not message or len(message) > LONGEST or not message.isprintable():
            finding = f"the message is not a readable sentence: {message[:300]!r}"
        elif not error.remedy or not error.remedy.isprintable():
            finding = f"no remedy: {error.remedy!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        outside_tests = [f for f in frames if "/tests/" not in f.filename] or frames
        own = [f for f in outside_tests if f.filename.startswith(f"{ROOT}/")] or outside_tests
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        finding = f"{type(error).__name__}: {str(error)[:200]!r} at {place}"
    return outcome, finding or ("; ".join(events) if events else None)


def main(work: Path, parts: Sequence[tuple[str, int, int]]) -> None:
    """Runs cases of several formats, given as (format, first, count). Prints one line of JSON a case."""
    import tempfile
    import warnings

    os.environ["TMPDIR"] = tempfile.tempdir = str(work)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DeprecationWarning)
    events: list[str] = []
    for name, _, _ in parts:
        for number in range(-1, -20 if name == "links" else -2, -1):
            run_case(work, name, number, events)  # imports the libraries of the format before the limits
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch(work, events)
    for name, first, count in parts:
        with open(work / f"{name}.at", "wb", buffering=0) as mark:
            for number in range(first, first + count):
                mark.seek(0)
                mark.write(struct.pack("<q", number))
                signal.alarm(SECONDS)
                outcome, finding = run_case(work, name, number, events)
                signal.alarm(0)
                print(json.dumps([name, number, outcome, finding]), flush=finding is not None)
            sys.stdout.flush()


if __name__ == "__main__":
    words = sys.argv[2:]
    parts = zip(words[::3], words[1::3], words[2::3], strict=True)
    main(Path(sys.argv[1]), [(name, int(first), int(count)) for name, first, count in parts])
