"""Given codes: read as the packages that wrote them read them, and refused by name where they cannot be kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.adapters import with_adapters
from edgellama.commands.inspect import inspect
from edgellama.errors import CheckpointError
from edgellama.recipe import PerChannel, PerGroup, Scheme
from tests.helpers.quantized_models import (
    PACKAGES,
    Edit,
    codes_by_hand,
    expected_hashes,
    gguf_checkpoint,
    gptq_checkpoint,
    package_checkpoint,
)

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("package", PACKAGES)
def test_weights_are_those_of_the_packages_own_decoder(package: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(package_checkpoint(tmp_path / "model", package))
    hashes = {
        module: hashlib.sha256((checkpoint.tensor(f"{module}.weight") + 0.0).numpy().tobytes()).hexdigest()
        for module in expected_hashes(package)
    }
    assert len(hashes) == 7
    assert hashes == expected_hashes(package)


def test_three_packings_of_one_quantization_give_the_same_codes(tmp_path: Path) -> None:
    opened = [open_checkpoint(package_checkpoint(tmp_path / p, p)) for p in PACKAGES]
    given = [checkpoint.given for checkpoint in opened]
    for module in expected_hashes("awq"):
        first, *others = (g.codes(module) for g in given if g is not None)
        assert len(others) == 2
        for other in others:
            assert torch.equal(first.values, other.values)
            assert torch.equal(first.scales, other.scales)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, None), (8, None)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gptq_gives_back_the_codes_that_were_packed(
    version: int, bits: int, group: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    codes = codes_by_hand(group, bits, dtype)
    path = gptq_checkpoint(tmp_path / "model", codes, version=version, bits=bits, group=group)
    given = open_checkpoint(path).given
    assert given is not None
    granularity = PerChannel() if group is None else PerGroup(group)
    for module, (values, scales) in codes.items():
        read = given.codes(module)
        assert given.schemes[module] == Scheme(bits, granularity)
        assert torch.equal(read.values, values)
        assert torch.equal(read.scales, scales.float())


@pytest.mark.parametrize(("kind", "table"), [("Q4_0", "Q8_0"), ("Q8_0", "Q8_0"), ("Q4_0", "Q4_0")])
def test_gguf_codes_have_the_values_of_the_gguf_package(
    kind: str, table: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint.first_layers(1)
    path = gguf_checkpoint(tmp_path / "m.gguf", source, {"model.embed_tokens": table}, kind)
    checkpoint = open_checkpoint(path)
    given = checkpoint.given
    assert given is not None and not given.requires_as_is
    assert len(given.schemes) == 9  # seven linears, the table, and lm_head, which is tied to it
    negative = 0
    for module in given.schemes:
        name = "model.embed_tokens" if module == "lm_head" else module
        # The reader dequantizes by the gguf package.
        assert torch.equal(given.codes(module).dequantize(), checkpoint.tensor(f"{name}.weight"))
        negative += int((given.codes(module).scales < 0).sum())
    assert (negative > 0) == (kind == "Q4_0")


def test_inspect_says_whose_codes_they_are(tmp_path: Path) -> None:
    data = inspect(package_checkpoint(tmp_path / "model", "auto_round"))
    assert data["codes"] == {
        "method": "AutoRound",
        "package": "auto-round 0.16.1",
        "layout": "gptq",
        "act_order": False,
        "symmetric": True,
        "modules": [{"bits": 4, "group_size": 32, "modules": 7}],
    }
    assert any("`-r as-is` takes them as they are" in note for note in data["notes"])


def exchanged(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    order = weights[f"{Q}.g_idx"]
    order[0], order[64] = int(order[64]), int(order[0])


def zero_off(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    weights[f"{Q}.qzeros"][0, 0] += 1


def without_scales(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    del weights[f"{Q}.scales"]


def infinite(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    weights[f"{Q}.scales"][0, 0] = float("inf")


def setting(key: str, value: Any) -> Edit:
    return lambda weights, settings: settings.update({key: value})


REFUSALS: dict[str, tuple[Edit, str]] = {
    "act order": (exchanged, "no runs of columns .g_idx., because it was quantized in act order"),
    "one zero point": (zero_off, "1 of 512 zero points are not the middle of the range: one is stored as 8"),
    "the other version": (setting("checkpoint_format", "gptq_v2"), "stored as 7, the middle as 8"),
    "a missing part": (without_scales, f"{Q} has no scales"),
    "infinite scales": (infinite, f"{Q}: 1 scales are NaN or infinite"),
    "other bits": (setting("bits", 3), "quantization_config.bits is 3, expected 4 or 8"),
    "bits of other weights": (
        setting("bits", 8),
        r"down_proj \[128, 352\] has .* which is not 8 bits in groups of 32",
    ),
    "other groups": (
        setting("group_size", 64),
        r"down_proj \[128, 352\] has .* which is not 4 bits in groups of 64",
    ),
    "groups of 16": (setting("group_size", 16), "group_size is 16, expected -1"),
    "asymmetric": (setting("sym", False), "quantization_config.sym is False: the codes have zero points"),
    "a marlin format": (setting("checkpoint_format", "marlin"), "checkpoint_format is 'marlin'"),
    "a marlin flag": (setting("is_marlin_format", True), "is_marlin_format is True"),
    "another method": (setting("quant_method", "bitsandbytes"), "quant_method is 'bitsandbytes'"),
    "fp8": (setting("quant_method", "fp8"), "quant_method is 'fp8'"),
    "a correction beside the codes": (setting("adapter", {"name": "eora"}), "adapter is {'name': 'eora'}"),
    "a rotation at run time": (setting("rotation_config", {"r": 1}), "rotation_config is"),
    "float codes": (setting("data_type", "mx_fp"), "data_type is 'mx_fp', expected None or int"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_codes_that_cannot_be_kept_are_refused_by_name(name: str, tmp_path: Path) -> None:
    edit, message = REFUSALS[name]
    path = gptq_checkpoint(tmp_path / "model", codes_by_hand(32), edit=edit)
    with pytest.raises(CheckpointError, match=message) as raised:
        given = open_checkpoint(path).given
        assert given is not None
        given.codes(Q)
    assert raised.value.remedy


def in_group(key: str, value: Any) -> Edit:
    return lambda weights, settings: settings["config_groups"]["group_0"].update({key: value})


def in_weights(key: str, value: Any) -> Edit:
    return lambda weights, settings: settings["config_groups"]["group_0"]["weights"].update({key: value})


def with_zero_points(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    weights[f"{Q}.weight_zero_point"] = torch.zeros(16, 4, dtype=torch.int32)


def other_shape(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    weights[f"{Q}.weight_shape"] = torch.tensor([128, 96])


PACKED_REFUSALS: dict[str, tuple[Edit, str]] = {
    "asymmetric": (in_weights("symmetric", False), "symmetric is False, expected True"),
    "zero points": (with_zero_points, "has a weight_zero_point: it has zero points"),
    "act order": (in_weights("actorder", "group"), "actorder is 'group'"),
    "float codes": (in_weights("type", "float"), "type is 'float', expected int"),
    "int8 activations": (in_group("input_activations", {"num_bits": 8}), "input_activations is"),
    "sparsity": (setting("sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config is"),
    "a rotation": (setting("transform_config", {"config_groups": {}}), "transform_config is"),
    "a quantized cache": (setting("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is"),
    "another format": (setting("format", "float-quantized"), "format is 'float-quantized'"),
    "another shape": (
        other_shape,
        r"weight_shape is \[128, 96\], expected \[128, 128\]",
    ),
}


@pytest.mark.parametrize("name", PACKED_REFUSALS)
def test_compressed_tensors_that_cannot_be_kept_are_refused_by_name(name: str, tmp_path: Path) -> None:
    edit, message = PACKED_REFUSALS[name]
    path = package_checkpoint(tmp_path / "model", "compressed_tensors", edit)
    with pytest.raises(CheckpointError, match=message):
        given = open_checkpoint(path).given
        assert given is not None
        given.codes(Q)


def test_asymmetric_awq_is_refused(tmp_path: Path) -> None:
    path = package_checkpoint(tmp_path / "model", "awq", setting("zero_point", True))
    with pytest.raises(CheckpointError, match="zero_point is True: the codes have zero points"):
        open_checkpoint(path)


def test_biases_of_zeros_are_left_out_with_a_note_and_others_refused(tmp_path: Path) -> None:
    def biased(value: float) -> Edit:
        return lambda weights, settings: weights.update({f"{Q}.bias": torch.full((128,), value).half()})

    checkpoint = open_checkpoint(gptq_checkpoint(tmp_path / "zero", codes_by_hand(32), edit=biased(0.0)))
    assert any("1 biases of zeros are left out" in note for note in checkpoint.notes)
    with pytest.raises(CheckpointError, match=f"not expected: {Q}.bias"):
        open_checkpoint(gptq_checkpoint(tmp_path / "one", codes_by_hand(32), edit=biased(1.0)))


def test_a_quantized_head_of_a_tied_model_is_refused(tmp_path: Path) -> None:
    def head(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
        weights["lm_head.qweight"] = torch.zeros(16, 512, dtype=torch.int32)

    path = gptq_checkpoint(tmp_path / "model", codes_by_hand(32), edit=head)
    with pytest.raises(CheckpointError, match="lm_head has codes") as raised:
        open_checkpoint(path)
    assert "tied" in raised.value.remedy


def test_an_adapter_is_not_merged_into_codes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(package_checkpoint(tmp_path / "model", "awq"))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(CheckpointError, match="an adapter is merged into float weights, and these are codes"):
        with_adapters(checkpoint, [tmp_path / "adapter"])
