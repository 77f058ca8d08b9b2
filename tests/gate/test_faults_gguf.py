"""Planted faults of GGUF files, each found by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.formats.gguf_names import unpermute
from edgellama.gate import device_form
from edgellama.gate.device_form import examine_device_form
from edgellama.gate.noise import Noise
from edgellama.model.config import RopeScaling
from edgellama.runtimes.load import open_device_form
from edgellama.targets import TARGETS
from edgellama.targets.gguf import interface
from tests.helpers.altered_artifacts import with_manifest
from tests.helpers.altered_gguf import Edit, edit_codes, edit_keys, without_tensor
from tests.helpers.one_layer_bundle import CONTEXT, Sound, failures, sound_bundle

pytestmark = pytest.mark.slow

Q = "blk.0.attn_q.weight"
SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """One layer with Llama 3's RoPE and two stop tokens, exported with the gate: a sound file passes it."""
    config = replace(tiny_checkpoint.config, rope_scaling=SCALING, eos_token_ids=(2, 5))
    checkpoint = replace(tiny_checkpoint, config=config)
    return sound_bundle(checkpoint, tmp_path_factory.mktemp("gguf"), ("gguf",))


def altered(sound: Sound, directory: Path, edit: Edit) -> Bundle:
    copy = directory / "altered.edgellama"
    shutil.copytree(sound.bundle.path, copy)
    edit(Bundle.open(copy).artifact("gguf"))
    return with_manifest(copy, {})


def rows(array: np.ndarray) -> np.ndarray:
    """Rows of q in Hugging Face's order."""
    ordered: np.ndarray = unpermute(torch.from_numpy(array), 32).numpy()
    return ordered


def one_ulp(values: Any, scales: Any) -> Any:
    scales.view(np.uint16)[7, 1] += 1
    return values, scales


def exchange_nibbles(values: Any, scales: Any) -> Any:
    halves = values.reshape(len(values), -1, 2, 16)
    return np.ascontiguousarray(halves[:, :, ::-1]).reshape(values.shape), scales


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda keys: keys.update({f"tokenizer.ggml.{key}": value})


FAULTS: dict[str, tuple[Edit, str, str]] = {
    "q rows not permuted": (
        edit_codes(Q, lambda v, s: (rows(v), rows(s))),
        "structure.codes",
        f"{Q}: codes and scales differ in 120 of 128 rows (rows in Hugging Face's order)",
    ),
    "scales not permuted with their rows": (
        edit_codes(Q, lambda v, s: (v, rows(s))),
        "structure.codes",
        f"{Q}: scales differ in 120 of 128 rows (rows in Hugging Face's order)",
    ),
    "order of nibbles": (
        edit_codes("blk.0.ffn_up.weight", exchange_nibbles),
        "structure.codes",
        "blk.0.ffn_up.weight: codes differ in 352 of 352 rows (halves of bytes exchanged)",
    ),
    "a scale off by one ulp": (
        edit_codes("blk.0.ffn_down.weight", one_ulp),
        "structure.codes",
        "blk.0.ffn_down.weight: scales differ in 1 of 128 rows",
    ),
    "rope_freqs missing": (
        without_tensor("rope_freqs.weight"),
        "structure.schemes",
        "rope_freqs.weight is missing",
    ),
    "wrong pre": (
        edit_keys(set_key("pre", "gpt-2")),
        "structure.embedded_tokenizer",
        "tokenizer.ggml.pre is 'gpt-2', expected 'smollm'",
    ),
    "eot missing": (
        edit_keys(lambda keys: keys.pop("tokenizer.ggml.eot_token_id")),
        "structure.embedded_tokenizer",
        "tokenizer.ggml.eot_token_id is missing",
    ),
    "add_bos flipped": (
        edit_keys(set_key("add_bos_token", True)),
        "structure.embedded_tokenizer",
        "tokenizer.ggml.add_bos_token is True, expected False",
    ),
}
# Checks that find a fault in what llama.cpp does, without looking at the file.
BY_BEHAVIOUR = {
    "wrong pre": ("consistency.tokenizer", "alone differs at token"),
    "eot missing": ("consistency.stop_tokens", "(5) does not stop it"),
    "add_bos flipped": ("consistency.tokenizer", "with added tokens differs"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault(name: str, sound: Sound, tmp_path: Path) -> None:
    edit, check, detail = FAULTS[name]
    bundle = altered(sound, tmp_path, edit)
    found = failures(bundle, sound.checkpoint, "gguf")
    assert detail in found.get(check, ""), found
    if name in BY_BEHAVIOUR:
        other, words = BY_BEHAVIOUR[name]
        assert words in found.get(other, ""), found
        assert check in failures(bundle, None, "gguf"), "found without a checkpoint too"


def test_rows_that_export_and_gate_leave_alike(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Structure compares with what the same code would write. Parity runs the file."""
    monkeypatch.setattr(interface, "permute", lambda weight, head_dim: weight)
    edit = edit_codes(Q, lambda v, s: (rows(v), rows(s)))
    keys = edit_codes("blk.0.attn_k.weight", lambda v, s: (rows(v), rows(s)))

    def both(path: Path) -> None:
        edit(path)
        keys(path)

    found = failures(altered(sound, tmp_path, both), sound.checkpoint, "gguf")
    assert "structure.codes" not in found and {"parity.kl", "parity.parts"} <= set(found)
    assert "layer 0" in found["parity.parts"]


def test_a_form_of_devices_that_computes_otherwise(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong arrangement of the weights for this processor. Here it is another file in its place."""
    other = altered(sound, tmp_path, edit_codes("blk.0.attn_v.weight", lambda v, s: (v[::-1].copy(), s)))
    target, path = TARGETS["gguf"], sound.bundle.artifact("gguf")
    noise = Noise.assumed(1e-4)
    tokens = list(range(CONTEXT))
    (check,) = examine_device_form(target, path, tokens, noise).checks
    assert check.verdict == "pass" and check.name == "parity.device_form"
    wrong = partial(open_device_form, target, other.artifact("gguf"))
    monkeypatch.setattr(device_form, "open_device_form", lambda target, path: wrong())
    (check,) = examine_device_form(target, path, tokens, noise).checks
    assert check.verdict == "fail"
