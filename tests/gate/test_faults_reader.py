"""Faults of the readers: both references of the gate have them, and only the cross-check with transformers shows them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint, gguf, open_checkpoint
from edgellama.checkpoints.streamed import StreamedLlama
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import InputError, MissingDependencyError, UsageError
from edgellama.formats.gguf_names import unpermute
from edgellama.gate import cross_check, transformers_layers, transformers_reading
from edgellama.gate.cross_check import examine_cross_check, first_cross_check
from edgellama.gate.transformers_reading import read_foreign
from edgellama.host import cache
from edgellama.model import config as model_config
from edgellama.model import layer_pass, llama
from edgellama.model.llama import RMSNorm
from edgellama.text.tokenizer import Tokenizer
from tests.helpers.gguf_models import convert, source, tiny_config
from tests.helpers.tiny_models import CONTEXT, TINY, random_checkpoint, write_hf

pytestmark = pytest.mark.slow

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHANGES: dict[str, Any] = {
    "attention_bias": True,
    "head_dim": 24,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-3,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory in which every setting differs from its default, with a bos token."""
    path = tmp_path_factory.mktemp("reader") / "model"
    random_checkpoint(path, CHANGES)
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    special = tokenizer["added_tokens"][0]
    piece = {"SpecialToken": {"id": special["content"], "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            special["content"]: {
                "id": special["content"],
                "ids": [special["id"]],
                "tokens": [special["content"]],
            }
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return path


def failures(path: Path) -> list[str]:
    checkpoint = open_checkpoint(path)
    section = examine_cross_check(checkpoint, StreamedLlama(checkpoint), 256)
    assert section.fields["cross_check"]["done"], section.fields
    return [c.name for c in section.checks if c.verdict != "pass"]


Plant = Callable[[pytest.MonkeyPatch], None]


def rope(change: Callable[[float, Any], tuple[float, Any]]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = model_config._rope
        patch.setattr(model_config, "_rope", lambda data: change(*sound(data)))

    return plant


def weights(change: Callable[[str, Callable[[str], Tensor]], Tensor]) -> Plant:
    """The reader returns another tensor for a name."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = Checkpoint.stored
        patch.setattr(Checkpoint, "stored", lambda self, name: change(name, lambda n: sound(self, n)))

    return plant


def epsilon_of_another_key(patch: pytest.MonkeyPatch) -> None:
    sound = RMSNorm.__init__
    patch.setattr(RMSNorm, "__init__", lambda self, size, eps: sound(self, size, 1e-6))


def angles_that_stop(patch: pytest.MonkeyPatch) -> None:
    def tables(config: Any, context_length: int) -> tuple[Tensor, Tensor]:
        cosines, sines = sound(config, context_length)
        place = torch.arange(context_length, device="cpu").clamp(max=100)
        return cosines[place], sines[place]

    sound = llama.rope_tables
    patch.setattr(llama, "rope_tables", tables)
    patch.setattr(cross_check, "rope_tables", tables)


def no_bos(patch: pytest.MonkeyPatch) -> None:
    sound = Tokenizer.encode
    patch.setattr(
        Tokenizer, "encode", lambda self, text, **options: sound(self, text, add_special_tokens=False)
    )


def heads_in_turn(patch: pytest.MonkeyPatch) -> None:
    """Query head h reads value head h % G instead of h // (H / G)."""
    sound = layer_pass.causal_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, count = q.shape[2], k.shape[2]
        order = torch.arange(heads).reshape(-1, count).T.reshape(-1)
        return sound(q[:, :, order], k, v)[:, :, order.argsort()]

    patch.setattr(layer_pass, "causal_attention", attention)


def unscaled_attention(patch: pytest.MonkeyPatch) -> None:
    """Attention is scaled by the head size that hidden_size suggests, not by head_dim."""
    sound = layer_pass.causal_attention
    patch.setattr(layer_pass, "causal_attention", lambda q, k, v: sound(q * (24 / 16) ** 0.5, k, v))


def other(first: str, second: str) -> Callable[[str, Callable[[str], Tensor]], Tensor]:
    """Exchanges two parts of names."""

    def change(name: str, read: Callable[[str], Tensor]) -> Tensor:
        if first in name:
            return read(name.replace(first, second))
        return read(name.replace(second, first)) if second in name else read(name)

    return change


@pytest.mark.parametrize(
    ("plant", "checks"),
    [
        pytest.param(rope(lambda theta, scaling: (10000.0, scaling)), ["cross_check.logits", "cross_check.rope"], id="default theta"),
        pytest.param(rope(lambda theta, scaling: (theta, None)), ["cross_check.logits", "cross_check.rope"], id="scaling ignored"),
        pytest.param(
            rope(lambda theta, s: (theta, replace(s, original_max_position_embeddings=8192))),
            ["cross_check.logits", "cross_check.rope"],
            id="original context by default",
        ),
        pytest.param(angles_that_stop, ["cross_check.rope"], id="angles stop at position 100"),
        pytest.param(epsilon_of_another_key, ["cross_check.logits"], id="epsilon by default"),
        pytest.param(heads_in_turn, ["cross_check.logits"], id="value heads in turn"),
        pytest.param(unscaled_attention, ["cross_check.logits"], id="head size from the hidden size"),
        pytest.param(
            weights(lambda n, read: read("model.embed_tokens.weight" if n == "lm_head.weight" else n)),
            ["cross_check.logits"],
            id="lm_head tied",
        ),
        pytest.param(
            weights(lambda n, read: read(n) * (not n.endswith("k_proj.bias"))), ["cross_check.logits"], id="bias dropped"
        ),
        pytest.param(weights(other("gate_proj", "up_proj")), ["cross_check.logits"], id="gate and up exchanged"),
        pytest.param(weights(other("layers.0.", "layers.1.")), ["cross_check.logits"], id="layers in another order"),
        pytest.param(
            weights(lambda n, read: read(n).bfloat16().float()), ["cross_check.logits"], id="float32 read as bfloat16"
        ),
        pytest.param(
            weights(lambda n, read: read(n) + 1.0 * n.endswith("norm.weight")), ["cross_check.logits"], id="norms plus one"
        ),
        pytest.param(
            weights(lambda n, read: unpermute(read(n), 24) if ".q_proj." in n else read(n)),
            ["cross_check.logits"],
            id="q_proj permuted",
        ),
        pytest.param(no_bos, ["cross_check.tokenizer"], id="no bos"),
    ],
)  # fmt: skip
def test_a_hugging_face_directory(
    plant: Plant, checks: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failures(directory) == []
    plant(monkeypatch)
    assert failures(directory) == checks


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source(tiny_config())).write(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_a_gguf_file_without_the_permutation(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(gguf_file) == []
    monkeypatch.setattr(gguf, "unpermute", lambda weight, head_dim: weight)
    assert failures(gguf_file) == ["cross_check.logits"]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(open_checkpoint(TINY).first_layers(1), tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module")
def bundle(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("bundle") / "one.edgellama"
    return export(two_layers, output, recipe="int4-fast", context=CONTEXT, validate=False)


def test_validate(bundle: Bundle, two_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = validate(bundle, reference=two_layers, tokens=256, max_kl=100.0, cross_check=True)
    assert report.cross_check["done"] and report.passed
    assert "cross_check" not in validate(bundle, reference=two_layers, tokens=256, max_kl=100.0).to_dict()
    with pytest.raises(UsageError, match="cross-check was requested"):
        validate(bundle, cross_check=True)
    monkeypatch.setattr(cross_check, "installed_version", lambda: None)
    with pytest.raises(MissingDependencyError, match="transformers") as raised:
        validate(bundle, reference=two_layers, cross_check=True)
    assert "edgellama[cross-check]" in raised.value.remedy


def test_another_config(bundle: Bundle, two_layers: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_layers, copy)
    assert open_checkpoint(copy).config_sha256() == open_checkpoint(two_layers).config_sha256()
    data = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**data, "rms_norm_eps": 1e-6}), encoding="utf-8")
    with pytest.raises(InputError, match="another config"):
        validate(bundle, reference=copy, tokens=256)


def test_the_first_export_alone(two_layers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(two_layers)
    full = StreamedLlama(checkpoint)

    def first() -> Any:
        return first_cross_check(checkpoint, full, CONTEXT).fields["cross_check"]

    assert first()["reason"].startswith("the cache is off")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert first()["done"]
    assert first()["reason"] == "an earlier export of this checkpoint did it"
    monkeypatch.setattr(cross_check, "installed_version", lambda: None)
    assert first()["reason"] == "transformers is not installed"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "meta"}, "does not read Meta's files"),
        ({"format": "gguf", "config": {"attention_bias": True}}, "biases"),
        ({"format": "gguf", "config": {"rope_scaling": model_config.RopeScaling("linear", 2.0)}}, "RoPE"),
    ],
    ids=["Meta", "GGUF biases", "GGUF scaling"],
)
def test_what_transformers_cannot_judge(
    changes: dict[str, Any], reason: str, tiny_checkpoint: Checkpoint
) -> None:
    config = replace(tiny_checkpoint.config, **changes.get("config", {}))
    checkpoint = replace(tiny_checkpoint, format=changes["format"], config=config)
    object.__setattr__(checkpoint, "as_opened", True)
    section = examine_cross_check(checkpoint, StreamedLlama(tiny_checkpoint), 64)
    assert section.checks == () and reason in section.fields["cross_check"]["reason"]


def test_a_large_model_is_read_by_layers_of_transformers(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, positions = list(range(3, 60)), torch.arange(100)
    whole = read_foreign(tiny_checkpoint, tokens, positions)
    monkeypatch.setattr(transformers_reading, "WHOLE_BYTES", 0)
    monkeypatch.setattr(
        "transformers.LlamaForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("whole")
    )
    layered = read_foreign(tiny_checkpoint, tokens, positions)
    assert (whole.logits - layered.logits).abs().max() <= 1e-4 and whole.logits.std() > 0.5
    assert torch.equal(whole.cosines, layered.cosines) and torch.equal(whole.sines, layered.sines)
    assert layered.ids == whole.ids


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", [Ggml.Q4_1, Ggml.F16], ids=["Q4_1", "F16"])
def test_a_gguf_file_by_layers_is_what_transformers_loads_as_a_whole(
    kind: Ggml, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = convert(source(tiny_config(tie_word_embeddings=tied)), kind).write(tmp_path / "model.gguf")
    tokens, models = list(range(3, 60)), []

    def empty(config: Any) -> Any:
        models.append(transformers_layers.empty_model(config))
        return models[0]

    monkeypatch.setattr(transformers_reading, "empty_model", empty)
    read = read_foreign(open_checkpoint(path), tokens, torch.arange(100))
    assert all(weight.is_meta for weight in models[0].model.layers.parameters())
    whole = loaded_as_a_whole(path)
    with torch.no_grad():
        states = whole.model(torch.tensor([tokens]), use_cache=False).last_hidden_state
        logits = whole.lm_head(states)[0]
        cosines, sines = whole.model.rotary_emb(states, torch.arange(100)[None])
    assert torch.allclose(logits, read.logits, atol=1e-5) and logits.std() > 0.5
    assert torch.equal(cosines[0], read.cosines) and torch.equal(sines[0], read.sines)


def loaded_as_a_whole(path: Path) -> Any:
    """transformers' Llama with all tensors that its GGUF reader returns, in memory at once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(str(path))["config"])).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def test_a_gguf_file_that_lacks_a_tensor(tmp_path: Path) -> None:
    model = convert(source(tiny_config()))
    checkpoint = open_checkpoint(model.write(tmp_path / "model.gguf"))
    del model.tensors["blk.1.ffn_up.weight"]
    checkpoint = checkpoint.with_options(path=model.write(tmp_path / "less.gguf"))
    section = examine_cross_check(checkpoint, StreamedLlama(checkpoint), 64)
    assert section.checks == () and "not those of a Llama" in section.fields["cross_check"]["reason"]


def test_an_error_of_transformers_own_ends_nothing(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hidden size that is no multiple of the heads raises an error of huggingface_hub's own class."""

    class StrictError(Exception):
        pass

    def refuse(*_: Any) -> None:
        raise StrictError("hidden_size")

    monkeypatch.setattr(cross_check, "read_foreign", refuse)
    section = examine_cross_check(tiny_checkpoint, StreamedLlama(tiny_checkpoint), 64)
    assert section.checks == () and "StrictError: hidden_size" in section.fields["cross_check"]["reason"]
