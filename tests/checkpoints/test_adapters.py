"""Reading and merging of adapters, on files written by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.adapters import open_adapter, with_adapters
from edgellama.checkpoints.adapters.peft_config import peft_config
from edgellama.errors import CheckpointError, UsageError
from edgellama.host.adapter_files import AdapterPlace
from tests.helpers.adapters import CONFIG, Q0, matrices, write_adapter
from tests.helpers.paths import TINY

Q0_WEIGHT = f"{Q0}.weight"
HIDDEN, SIZE = 128, 512  # of the tiny model


@pytest.fixture
def base(tiny_checkpoint: Checkpoint) -> Checkpoint:
    return tiny_checkpoint


def test_the_change_is_added_in_float32(base: Checkpoint, tmp_path: Path) -> None:
    a, b = matrices().values()
    merged = with_adapters(base, [write_adapter(tmp_path / "a")])
    expected = base.tensor(Q0_WEIGHT) + 3.0 * b @ a
    assert torch.allclose(merged.tensor(Q0_WEIGHT), expected, rtol=1e-6, atol=1e-6)
    for name in base.infos.keys() - {Q0_WEIGHT}:
        assert merged.tensor(name).equal(base.tensor(name))


def test_the_weight_scales_the_change(base: Checkpoint, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    whole, half = with_adapters(base, [path]), with_adapters(base, [f"{path}:-0.5"])
    change = whole.tensor(Q0_WEIGHT) - base.tensor(Q0_WEIGHT)
    assert torch.allclose(half.tensor(Q0_WEIGHT), base.tensor(Q0_WEIGHT) - 0.5 * change, atol=1e-5)


def write_mlx(path: Path, kind: str = "lora", num_layers: int = 1, **more: Tensor) -> Path:
    """Writes the adapter of `matrices` in MLX's layout."""
    a, b = matrices().values()
    path.mkdir()
    tensors = {f"{Q0}.lora_a": a.T.contiguous(), f"{Q0}.lora_b": b.T.contiguous()}
    save_file(
        {**tensors, **{f"{Q0}.{name}": tensor for name, tensor in more.items()}},
        path / "adapters.safetensors",
    )
    settings = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    data = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings}
    (path / "adapter_config.json").write_text(json.dumps(data), encoding="utf-8")
    return path


def test_mlx_s_layout_gives_the_same_model(base: Checkpoint, tmp_path: Path) -> None:
    one_layer = base.first_layers(1)
    merged = with_adapters(one_layer, [write_mlx(tmp_path / "mlx")])
    wanted = with_adapters(one_layer, [write_adapter(tmp_path / "peft")])
    assert merged.tensor(Q0_WEIGHT).equal(wanted.tensor(Q0_WEIGHT))
    assert merged.adapters[0].layout == "mlx"


def test_mlx_s_dora(base: Checkpoint, tmp_path: Path) -> None:
    a, b = matrices().values()
    magnitude = torch.linspace(0.5, 2, HIDDEN)
    path = write_mlx(tmp_path / "mlx", "dora", m=magnitude)
    merged = with_adapters(base.first_layers(1), [path]).tensor(Q0_WEIGHT)
    plain = base.tensor(Q0_WEIGHT) + 3.0 * b @ a
    assert torch.allclose(torch.linalg.vector_norm(merged, dim=1), magnitude, rtol=1e-5)
    assert torch.allclose(torch.nn.functional.cosine_similarity(merged, plain), torch.ones(HIDDEN), atol=1e-5)


REFUSED: dict[str, Any] = {
    "layer_replication": [[0, 4]],
    "use_qalora": True,
    "use_bdlora": {"a": 1},
    "arrow_config": {"top_k": 1},
    "target_parameters": ["mlp.experts"],
    "alora_invocation_tokens": [1, 2],
    "lora_bias": True,
    "trainable_token_indices": [3],
    "megatron_config": {"a": 1},
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "kasa_config": {"a": 1},
    "a_key_of_the_future": 0.5,
    "ensure_weight_tying": True,
    "bias": "some",
    "init_lora_weights": "pissa",
    "peft_type": "ADALORA",
    "task_type": "SEQ_CLS",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_changes_the_computation_is_refused_by_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        open_adapter(write_adapter(tmp_path, **{key: REFUSED[key]}))
    assert caught.value.remedy


@pytest.mark.parametrize("value", ["olora", "corda", "loftq", "pissa_niter_4", "lora_ga", "of the future"])
def test_a_beginning_that_changed_the_base_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="init_lora_weights"):
        open_adapter(write_adapter(tmp_path, init_lora_weights=value))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no rank": ({"r": None}, "r is None"),
    "a rank that the matrices do not have": ({"r": 4}, "rank 4"),
    "a rank of zero": ({"r": 0}, "whole numbers"),
    "an alpha that is no number": ({"lora_alpha": "6"}, "lora_alpha"),
    "an alpha that is not finite": ({"lora_alpha": float("inf")}, "lora_alpha"),
    "an alpha that no float32 holds": ({"lora_alpha": 1e300}, "lora_alpha"),
    "an alpha beyond every float": ({"lora_alpha": 10**400}, "lora_alpha"),
    "a target that the file lacks": ({"target_modules": ["q_proj", "v_proj"]}, "v_proj"),
    "a whole module that the file lacks": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "targets that are no names": ({"target_modules": 7}, "target_modules"),
    "DoRA without magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, "regular expression"),
    "a pattern that is endless": ({"rank_pattern": {"a" * 501: 2}}, "501 characters"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_contradict_each_other_are_refused(fault: str, tmp_path: Path) -> None:
    changes, words = FAULTS[fault]
    with pytest.raises(CheckpointError, match=words.replace("(", r"\(")):
        open_adapter(write_adapter(tmp_path, **changes))


TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "a key of another method": ({"base_model.model.a.ia3_l": torch.ones(2)}, "ia3_l"),
    "a token adapter": (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 2)},
        "token_adapter",
    ),
    "one matrix of two": (
        {f"base_model.model.{Q0}.lora_A.weight": torch.ones(2, HIDDEN)},
        "no lora_B",
    ),
    "NaN": ({key: tensor * float("nan") for key, tensor in matrices().items()}, "NaN"),
    "zero": ({key: tensor * 0 for key, tensor in matrices().items()}, "changes nothing"),
    "a whole layer that no key names": (
        {**matrices(), f"base_model.model.{Q0}.weight": torch.ones(HIDDEN, HIDDEN)},
        "modules_to_save does not name it",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_weights_that_are_not_understood_are_refused(fault: str, tmp_path: Path) -> None:
    tensors, words = TENSORS[fault]
    with pytest.raises(CheckpointError, match=words):
        open_adapter(write_adapter(tmp_path, tensors))


OTHER_BASES = {
    "a deeper model": matrices("model.layers.4.self_attn.q_proj"),
    "a wider model": matrices(Q0, 256, 256),
    "biases": {**matrices(), f"base_model.model.{Q0}.bias": torch.ones(HIDDEN)},
}


@pytest.mark.parametrize("fault", OTHER_BASES)
def test_an_adapter_of_another_base_is_refused(base: Checkpoint, fault: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the adapter changes model\.layers") as caught:
        with_adapters(base, [write_adapter(tmp_path, OTHER_BASES[fault], bias="all")])
    assert "models/model" in str(caught.value.remedy)


def test_another_name_of_the_base_is_a_note(base: Checkpoint, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, base_model_name_or_path="acme/other-7b")
    assert any("acme/other-7b" in note for note in with_adapters(base, [path]).notes)
    assert with_adapters(base, [write_adapter(tmp_path)]).notes == base.notes


def test_a_tied_head_that_is_changed_alone_is_untied_with_a_note(base: Checkpoint, tmp_path: Path) -> None:
    tensors = matrices("lm_head", SIZE, HIDDEN)
    merged = with_adapters(base, [write_adapter(tmp_path, tensors, target_modules=["lm_head"])])
    assert base.config.tie_word_embeddings and not merged.config.tie_word_embeddings
    assert any(f"{SIZE * HIDDEN:,} parameters" in note for note in merged.notes)
    assert merged.tensor("model.embed_tokens.weight").equal(base.tensor("model.embed_tokens.weight"))
    assert not merged.tensor("lm_head.weight").equal(base.tensor("model.embed_tokens.weight"))


def test_a_resized_table_alone_is_refused_for_an_untied_model(base: Checkpoint, tmp_path: Path) -> None:
    tensors = {**matrices(), "base_model.model.model.embed_tokens.weight": torch.ones(SIZE + 8, HIDDEN)}
    path = write_adapter(tmp_path, tensors, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match="not both"):
        with_adapters(base, [path])


def test_changes_that_are_no_sums_are_not_added(base: Checkpoint, tmp_path: Path) -> None:
    dora = {**matrices(), f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(HIDDEN)}
    one, two = write_adapter(tmp_path / "one", dora, use_dora=True), write_adapter(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"both change"):
        with_adapters(base, [one, two])
    with pytest.raises(CheckpointError, match=r"weight 0\.5"):
        with_adapters(base, [f"{one}:0.5"])


def test_places(tmp_path: Path) -> None:
    odd = tmp_path / "run:2"
    odd.mkdir()
    assert AdapterPlace.parse(str(odd)) == AdapterPlace(odd)
    assert AdapterPlace.parse(f"{odd}:0.25") == AdapterPlace(odd, 0.25)
    assert AdapterPlace.parse("adapters/ours") == AdapterPlace(Path("adapters/ours"))
    for weight in ("0", "nan", "inf"):
        with pytest.raises(UsageError, match="finite"):
            AdapterPlace.parse(f"{odd}:{weight}")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_directory_without_one_of_the_files_is_refused(missing: str, tmp_path: Path) -> None:
    (write_adapter(tmp_path) / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        open_adapter(tmp_path)


def test_two_layouts_in_one_directory_are_refused(tmp_path: Path) -> None:
    shutil.copy(write_adapter(tmp_path) / "adapter_model.safetensors", tmp_path / "adapters.safetensors")
    with pytest.raises(CheckpointError, match="two adapters"):
        open_adapter(tmp_path)


def test_torchtune_s_own_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="torchtune"):
        open_adapter(tmp_path)


def test_an_adapter_alone_leads_to_its_base(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_adapter(tmp_path))
    assert "edgellama export models/model --adapter" in str(caught.value.remedy)


def test_the_identity_covers_adapters_and_weights(base: Checkpoint, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one")
    two = write_adapter(tmp_path / "two", lora_alpha=8)
    shutil.copytree(one, tmp_path / "three")
    hashes = [
        base.sha256(),
        *(with_adapters(base, places).sha256() for places in ([one], [two], [f"{one}:0.5"], [one, two])),
    ]
    assert len(set(hashes)) == len(hashes)
    assert with_adapters(base, [tmp_path / "three"]).sha256() == with_adapters(base, [one]).sha256()
    assert with_adapters(base, [one]).base_sha256() == base.sha256()


def test_the_adapter_s_tokenizer_and_template_count(base: Checkpoint, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, path)
    assert with_adapters(base, [path]).tokenizer is base.tokenizer
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    merged = with_adapters(base, [path])
    assert merged.tokenizer.chat_template == settings["chat_template"]
    assert any("tokenizer and chat template" in note for note in merged.notes)
    assert "the chat template" in merged.stop_tokens[0].sources


def test_scale_and_rank_by_pattern() -> None:
    data = {
        **CONFIG,
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {r"layers\.1\..*q_proj": 4},
        "alpha_pattern": {"q_proj": 2},
    }
    config = peft_config(data, Path("adapter_config.json"))
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 0.5
    assert config.scale_of("model.layers.11.self_attn.q_proj") == 0.25
    assert config.scale_of("model.layers.1.self_attn.v_proj") == 2.0


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": None},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": None, "target_modules": r"model\.layers\.[0-3]\.self_attn\.q_proj"},
        {"layers_to_transform": None, "exclude_modules": ["model.layers.2.self_attn.q_proj"]},
    ],
    ids=["every layer", "two layers", "a regular expression", "all but one"],
)
def test_weights_that_are_cut_off_are_refused(
    base: Checkpoint, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="modules that its weights lack"):
        with_adapters(base, [write_adapter(tmp_path, **changes)])


@pytest.mark.parametrize("num_layers", [-1, 4])
def test_mlx_s_weights_that_are_cut_off_are_refused(
    base: Checkpoint, tmp_path: Path, num_layers: int
) -> None:
    with pytest.raises(CheckpointError, match="3 modules that its weights lack"):
        with_adapters(base, [write_mlx(tmp_path / "mlx", num_layers=num_layers)])
    one_layer = base.first_layers(1)
    assert with_adapters(one_layer, [tmp_path / "mlx"]).adapters
