"""Adapters switched in one process: each target computes what torch computes, and the base stays what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.adapters.swappable import open_swappable
from edgellama.errors import BundleError, UsageError
from edgellama.export.lower import lowering_for, write_adapter
from edgellama.export.quantization.adapter_basis import AdapterBasis
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.parity import steps
from edgellama.host.progress import Progress
from edgellama.model.adapted import Pairs, adapted
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES, Recipe
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.gguf import GgufRuntime
from edgellama.runtimes.load import opener_for
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import Target, find_target
from edgellama.targets.onnx.interface import SESSION_ENTRIES
from edgellama.targets.provenance import Provenance
from tests.helpers.adapters import adapter_of_all
from tests.helpers.adapters import write_adapter as write_small
from tests.helpers.tiny_models import provenance

TOKENS = [(37 * i + 11) % 512 for i in range(24)]
CASES = {
    "onnx": ("onnx", RECIPES["int4-fast"]),
    "onnx, rotated": ("onnx", replace(RECIPES["int4-fast"], rotation="hidden")),
    "onnx, portable": ("onnx", replace(RECIPES["int4-fast"], onnx_form="portable")),
    "gguf": ("gguf", RECIPES["int4-fast"]),
    "gguf, rotated": ("gguf", replace(RECIPES["int4-fast"], rotation="values")),
}


class Made(NamedTuple):
    """A lowered base with two adapters, `all` of every linear and `small` of one."""

    target: Target
    recipe: Recipe
    model: Llama
    path: Path
    provenance: Provenance
    pairs: Mapping[str, Pairs]
    files: dict[str, Path]

    def open(self) -> Runtime:
        runtime = opener_for(self.target)(self.path)
        runtime.adapters = self.files
        return runtime

    def replica(self, name: str | None) -> Tensor:
        """Logits of torch with the target's numerics."""
        with (
            adapted(self.model, self.pairs[name] if name else {}),
            self.target.arithmetic(self.model, self.recipe),
        ):
            return ReferenceRuntime(self.model).forward_all(TOKENS)


def make(checkpoint: Checkpoint, case: str, directory: Path) -> Made:
    name, recipe = CASES[case]
    target, checkpoint = find_target(name), checkpoint.first_layers(2)
    model, _ = quantized_llama(checkpoint, recipe, 64)
    basis = AdapterBasis(checkpoint, recipe.rotation, model)
    places = {
        "all": adapter_of_all(checkpoint, directory / "peft-all"),
        "small": write_small(directory / "peft-small"),
    }
    pairs = {n: basis.moved(open_swappable(checkpoint, p).pairs()) for n, p in places.items()}
    about = replace(provenance(recipe), swappable=tuple(sorted(pairs["all"])))
    path, files = directory / Path(target.artifact).name, {}
    lowering_for(target)(model, path, about, progress=Progress())
    for n, pair in pairs.items():
        files[n] = directory / f"{n}{target.adapter_ending}"
        write_adapter(target, target.planned_adapter(pair, model.config, about), files[n])
    return Made(target, recipe, model, path, about, pairs, files)


@pytest.mark.parametrize("case", CASES)
def test_switching(case: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = make(tiny_checkpoint, case, tmp_path)
    with made.open() as runtime:
        logits: dict[str | None, list[Tensor]] = {}
        for name in (None, "all", "small", None, "all"):
            assert runtime.use(name) is runtime and runtime.adapter == name and runtime.position == 0
            logits.setdefault(name, []).append(steps(runtime, TOKENS))
        assert torch.equal(*logits[None]) and torch.equal(*logits["all"])
        for name, rows in logits.items():
            kl = kl_divergence(made.replica(name), rows[0])
            print(f"{case}, {name}: KL to torch {kl.mean():.1e}, first {kl[:8].mean():.1e}")
            assert kl.mean() < 1e-3
        assert kl_divergence(made.replica(None), logits["all"][0]).mean() > 0.1, "the adapter does something"
        with pytest.raises(UsageError, match="no adapter 'other' for"):
            runtime.use("other")
    plain = tmp_path / f"plain{made.path.suffix}"
    lowering_for(made.target)(made.model, plain, replace(made.provenance, swappable=()), progress=Progress())
    with opener_for(made.target)(plain) as runtime:
        assert torch.equal(steps(runtime, TOKENS), logits[None][0]), "bit-equal to a base without adapters"


@pytest.mark.parametrize("case", ["onnx", "gguf"])
def test_an_adapter_of_another_base_is_refused(
    case: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = make(tiny_checkpoint, case, tmp_path)
    other = replace(made.provenance, manifest_sha256="c" * 64)
    foreign = tmp_path / f"foreign{made.target.adapter_ending}"
    planned = made.target.planned_adapter(made.pairs["all"], made.model.config, other)
    write_adapter(made.target, planned, foreign)
    assert made.target.read_adapter(foreign).differences(planned) == []
    made.files["foreign"] = foreign
    with made.open() as runtime:
        before = steps(runtime.use("all"), TOKENS)
        with pytest.raises(BundleError, match="it was made for another base"):
            runtime.use("foreign")
        assert runtime.adapter == "all" and torch.equal(steps(runtime, TOKENS), before)


def test_onnxruntime_s_own_way(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """An app adds the file to RunOptions and binds nothing."""
    made = make(tiny_checkpoint, "onnx, portable", tmp_path)
    settings = ort.SessionOptions()
    for key, value in SESSION_ENTRIES["portable"].items():
        settings.add_session_config_entry(key, value)
    session = ort.InferenceSession(made.path / "model.onnx", settings, providers=["CPUExecutionProvider"])
    required = {value.name: value for value in session.get_inputs()}
    assert not any("lora" in name for name in required)
    feeds = {
        "input_ids": np.array([TOKENS]),
        "attention_mask": np.ones((1, len(TOKENS)), np.int64),
        **{
            name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for name, value in required.items()
            if name.startswith("past")
        },
    }
    options, adapter = ort.RunOptions(), ort.LoraAdapter()
    adapter.Load(str(made.files["all"]))
    options.add_active_adapter(adapter)
    actual = session.run(["logits"], feeds, options)[0][0, 0]
    with made.open() as runtime:
        runtime.use("all")
        assert np.allclose(runtime.forward(TOKENS), actual, atol=1e-4)


def test_llama_cpp_s_form_for_apps_switches_too(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Repacked weights and flash attention change the order of sums alone."""
    made = make(tiny_checkpoint, "gguf", tmp_path)
    with made.open() as runtime, GgufRuntime(made.path, repacked=True) as packed:
        packed.adapters = made.files
        base = packed.forward_all(TOKENS)
        for name in ("all", "small"):
            expected = runtime.use(name).forward_all(TOKENS)
            assert kl_divergence(expected, packed.use(name).forward_all(TOKENS)).mean() < 1e-3
        assert torch.equal(packed.use(None).forward_all(TOKENS), base)
