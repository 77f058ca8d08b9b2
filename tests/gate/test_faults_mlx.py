"""Planted faults in MLX directories, each found by the check that is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.safetensors_file import TensorSource, write_safetensors
from edgellama.gate.copies import examine_copies
from edgellama.gate.relowering import examine_relowering
from edgellama.host.progress import Progress
from edgellama.model.config import RopeScaling
from edgellama.model.llama import Llama
from edgellama.targets import TARGETS
from tests.helpers.altered_bundles import Alter, altered, edit_file, write
from tests.helpers.one_layer_bundle import CONTEXT, Sound, failures, sound_bundle

pytestmark = pytest.mark.slow

WEIGHTS, CONFIG = "mlx/model.safetensors", "mlx/config.json"
Q, K, GATE = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
UP, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm.weight"


MLX = TARGETS["mlx"]


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """One layer with RoPE as Llama 3 scales it."""
    config = replace(tiny_checkpoint.config, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32))
    checkpoint = replace(tiny_checkpoint, config=config)
    return sound_bundle(checkpoint, tmp_path_factory.mktemp("faults"), ("mlx",))


@pytest.fixture(scope="module")
def quantized(sound: Sound) -> Llama:
    return quantized_llama(sound.checkpoint, sound.bundle.recipe, CONTEXT)[0]


def edit_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Alter:
    """Alters tensors of the weights. The header stays as it is but for them."""

    def alter(bundle: Path) -> None:
        with safe_open(bundle / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        edit(tensors)
        sources = {n: TensorSource(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}  # type: ignore[misc]
        write_safetensors(bundle / WEIGHTS, sources, metadata)

    return alter


def exchange(*pairs: tuple[str, str]) -> Alter:
    def edit(tensors: dict[str, Tensor]) -> None:
        for one, other in pairs:
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return edit_tensors(edit)


def negate(name: str) -> Alter:
    return edit_tensors(lambda tensors: tensors[name].neg_())


def exchange_nibbles(tensors: dict[str, Tensor]) -> None:
    codes = tensors[f"{Q}.weight"].view(torch.uint8)
    tensors[f"{Q}.weight"] = ((codes >> 4) | (codes << 4)).view(torch.uint32)


def one_step(tensors: dict[str, Tensor]) -> None:
    """Raises a scale by one unit in the last place, and the bias with it."""
    bits = tensors[f"{GATE}.scales"].view(torch.int16)
    bits[3, 1] += 1
    tensors[f"{GATE}.biases"][3, 1] = -8 * tensors[f"{GATE}.scales"][3, 1]


def exchange_rows_of_scales(tensors: dict[str, Tensor]) -> None:
    for part in ("scales", "biases"):
        tensors[f"{K}.{part}"] = tensors[f"{K}.{part}"].flip(0)


def eos(ids: list[int]) -> Alter:
    def alter(bundle: Path) -> None:
        for name in (CONFIG, "mlx/generation_config.json"):
            edit_file(name, lambda data: data.update(eos_token_id=ids))(bundle)

    return alter


def lose_entry(data: dict[str, dict[str, object]]) -> None:
    for key in ("quantization", "quantization_config"):
        del data[key]["model.embed_tokens"]


def second_file(bundle: Path) -> None:
    shutil.copy(bundle / WEIGHTS, bundle / "mlx" / "model-00002-of-00002.safetensors")


FAULTS: list[tuple[str, Alter, str, str]] = [
    ("the sign of a bias", negate(f"{Q}.biases"), "structure.biases", f"differ in {Q}"),
    ("the sign of scales and biases", edit_tensors(lambda t: (t[f"{Q}.biases"].neg_(), t[f"{Q}.scales"].neg_())), "structure.scales", f"differ in {Q}"),
    ("the order of nibbles", edit_tensors(exchange_nibbles), "structure.codes", f"differ in {Q}"),
    ("a scale off by one step", edit_tensors(one_step), "structure.scales", f"differ in {GATE}"),
    ("scales of two modules exchanged", exchange((f"{GATE}.scales", f"{UP}.scales"), (f"{GATE}.biases", f"{UP}.biases")), "structure.scales", f"differ in {GATE}, {UP}"),
    ("scales in another order of rows", edit_tensors(exchange_rows_of_scales), "structure.scales", f"differ in {K}"),
    ("a norm off by one step", edit_tensors(lambda t: t[NORM].view(torch.int16)[2].add_(1)), "structure.constants", f"{NORM} is altered"),
    ("a tensor more", edit_tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2, dtype=torch.float16)})), "structure.tensors", "inv_freq is not expected"),
    ("an entry with the group size is missing", edit_file(CONFIG, lose_entry), "structure.schemes", "model.embed_tokens: expected int8 g64, config.json says int4 g32"),
    ("RoPE scaling is lost", edit_file(CONFIG, lambda d: d.update(rope_scaling=None)), "structure.config", "rope_scaling is None, expected {'rope_type': 'llama3'"),
    ("another factor of RoPE", edit_file(CONFIG, lambda d: d["rope_scaling"].update(factor=4.0)), "structure.config", "rope_scaling is {"),
    ("another epsilon", edit_file(CONFIG, lambda d: d.update(rms_norm_eps=1e-6)), "structure.config", "rms_norm_eps is 1e-06"),
    ("an eos id is lost", eos([2]), "structure.client_files", "mlx/config.json differs in eos_token_id, mlx/generation_config.json differs in eos_token_id"),
    ("a model file of its own", edit_file(CONFIG, lambda d: d.update(model_file="model.py")), "structure.config", "model_file is not expected"),
    ("another tokenizer", edit_file("mlx/tokenizer.json", lambda d: d.update(decoder=None)), "structure.client_files", "mlx/tokenizer.json differs in decoder"),
    ("another template", write("mlx/chat_template.jinja", "x"), "structure.client_files", "mlx/chat_template.jinja"),
    ("two files of weights", second_file, "structure.weight_files", "model-00002-of-00002.safetensors is a second file"),
]  # fmt: skip
# Checks that one of these faults fails as well. Words of config.json are compared by two of them.
COPIES = {"structure.client_files", "structure.config"}
ALSO = {
    "the sign of scales and biases": {"structure.biases"},
    "an entry with the group size is missing": {*COPIES, "structure.codes", "structure.scales", "structure.biases"},
    "RoPE scaling is lost": COPIES,
    "another factor of RoPE": COPIES,
    "another epsilon": COPIES,
    "an eos id is lost": COPIES,
    "a model file of its own": COPIES,
    "two files of weights": {"structure.client_files"},
}  # fmt: skip
# Faults that the whole gate must find, by what MLX computes as well as by what the files say.
FELT = ("the sign of a bias", "RoPE scaling is lost")


@pytest.mark.parametrize(("fault", "alter", "check", "detail"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_of_the_files(
    fault: str, alter: Alter, check: str, detail: str, sound: Sound, quantized: Llama, tmp_path: Path
) -> None:
    """Structure alone, which needs no MLX."""
    bundle = altered(sound.bundle, tmp_path, alter)
    found = structure(bundle, sound, quantized)
    assert detail in found.get(check, ""), found
    assert set(found) <= {check, *ALSO.get(fault, ())}
    (again,) = examine_relowering(bundle, MLX, quantized, Progress()).checks
    client = check == "structure.client_files" and fault != "an eos id is lost"
    assert again.verdict == ("pass" if client or fault == "two files of weights" else "fail"), again


def structure(bundle: Bundle, sound: Sound, quantized: Llama) -> dict[str, str]:
    """Name and detail of the structure checks that do not pass."""
    path, provenance = bundle.artifact("mlx"), MLX.provenance(bundle.manifest)
    copies = examine_copies(bundle, MLX, quantized, sound.checkpoint.tokenizer).checks
    checks = (*MLX.check_structure(path, quantized, provenance), *copies)
    return {c.name: c.detail for c in checks if c.verdict != "pass"}


@pytest.mark.parametrize("fault", FELT)
def test_a_fault_of_the_whole_gate(fault: str, sound: Sound, tmp_path: Path) -> None:
    alter, check, detail = next(f[1:] for f in FAULTS if f[0] == fault)
    found = failures(altered(sound.bundle, tmp_path, alter), sound.checkpoint, "mlx")
    assert detail in found[check] and {"parity.parts", "parity.kl", "golden.mlx"} <= set(found), found


def test_a_sound_bundle_has_no_fault(sound: Sound) -> None:
    assert failures(sound.bundle, sound.checkpoint, "mlx") == {}
    assert failures(sound.bundle, None, "mlx") == {}
    assert set(failures(altered(sound.bundle, sound.bundle.path.parent, eos([2])), None, "mlx")) == {
        "structure.client_files"
    }
