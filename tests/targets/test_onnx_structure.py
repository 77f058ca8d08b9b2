"""Faults planted in ONNX files, one at a time, and the check that must find each by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import write_manifest
from edgellama.checkpoints import Checkpoint
from edgellama.commands.export import export
from edgellama.commands.inspect import inspect
from edgellama.commands.validate import validate
from edgellama.errors import BundleError
from edgellama.export.onnx.lower import lower_to_onnx
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.onnx_model import read_onnx
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.recipe import RECIPES
from edgellama.targets import TARGETS
from edgellama.targets.onnx.structure import check_structure
from tests.helpers.tiny_models import CONTEXT, provenance, random_checkpoint

ATTENTION = "model.layers.0.self_attn"


@dataclass(frozen=True)
class HealthyArtifact:
    """Bundle of one layer, with its checkpoint and its quantized model."""

    checkpoint: Checkpoint
    bundle: Bundle
    model: Llama


@pytest.fixture(scope="module", params=["ort", "portable"])
def healthy_artifact(
    request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> HealthyArtifact:
    """One layer in a bundle, in each form."""
    cut = tiny_checkpoint.first_layers(1)
    recipe = replace(RECIPES["int4-fast"], name="mine", onnx_form=request.param)
    output = tmp_path_factory.mktemp("onnx") / "cut.edgellama"
    bundle = export(cut, output, targets=["onnx"], recipe=recipe, context=CONTEXT, validate=False)
    return HealthyArtifact(cut, bundle, quantized_llama(cut, recipe, CONTEXT)[0])


@pytest.fixture
def artifact_copy(healthy_artifact: HealthyArtifact, tmp_path: Path) -> Path:
    """Copy of the artifact's directory for damage."""
    return Path(shutil.copytree(healthy_artifact.bundle.path / "onnx", tmp_path / "onnx"))


def failed(healthy_artifact: HealthyArtifact, path: Path) -> dict[str, str]:
    """Name and detail of every structure check that does not pass."""
    checks = check_structure(
        path, healthy_artifact.model, TARGETS["onnx"].provenance(healthy_artifact.bundle.manifest)
    )
    return {c.name: c.detail for c in checks if c.verdict != "pass"}


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Applies `change` to model.onnx. External data stay as they are."""
    file = path / "model.onnx"
    proto = onnx.load(file, load_external_data=False)
    change(proto)
    file.write_bytes(proto.SerializeToString())


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    matching: onnx.NodeProto = next(n for n in proto.graph.node if n.name == name)
    return matching


def set_attribute(proto: onnx.ModelProto, name: str, key: str, value: object) -> None:
    target_node = node(proto, name)
    other_attributes = [a for a in target_node.attribute if a.name != key]
    del target_node.attribute[:]
    target_node.attribute.extend([*other_attributes, helper.make_attribute(key, value)])


def set_constant(proto: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def flip(path: Path, tensor: str, byte: int, mask: int) -> None:
    """Flips bits of one byte of a tensor, in model.onnx or in its external data."""
    location, offset, length = read_onnx(path).place(tensor)
    assert byte < length
    if location:
        data = bytearray((path / location).read_bytes())
        data[offset + byte] ^= mask
        (path / location).write_bytes(data)
        return
    array = read_onnx(path).array(tensor).copy()
    raw = array.view(np.uint8).reshape(-1)
    raw[byte] ^= mask
    edit(path, lambda proto: set_constant(proto, tensor, array))


def test_a_healthy_artifact_passes(healthy_artifact: HealthyArtifact) -> None:
    assert failed(healthy_artifact, healthy_artifact.bundle.path / "onnx") == {}
    report = validate(
        healthy_artifact.bundle, reference=healthy_artifact.checkpoint, tokens=256, max_kl=100.0
    )
    assert [c for c in report.checks if c.verdict != "pass"] == []


@pytest.mark.parametrize(
    ("module", "part"),
    [("mlp.down_proj", "weight"), ("self_attn.o_proj", "scales"), ("mlp.up_proj", "weight")],
)
def test_one_bit_of_a_weight(
    healthy_artifact: HealthyArtifact, artifact_copy: Path, module: str, part: str
) -> None:
    """The third module lies in the second half of a joined node, in form `ort`."""
    name = f"model.layers.0.{module}.{part}"
    joined = name.replace("up_proj", "gate_up_proj")
    tensors = read_onnx(artifact_copy).tensors
    tensor, byte = (joined, -3) if joined in tensors and joined != name else (name, 7)
    length = read_onnx(artifact_copy).place(tensor)[2]
    flip(artifact_copy, tensor, byte % length, 1)
    assert failed(healthy_artifact, artifact_copy) == {
        "structure.codes": f"differ in model.layers.0.{module}"
    }


@pytest.mark.parametrize("table", ["cos", "sin", "model.norm.weight"])
def test_one_bit_of_a_table_or_norm(
    healthy_artifact: HealthyArtifact, artifact_copy: Path, table: str
) -> None:
    flip(artifact_copy, table, 64, 1)
    assert failed(healthy_artifact, artifact_copy) == {
        "structure.constants": f"{table} is missing or altered"
    }


def test_another_epsilon(healthy_artifact: HealthyArtifact, artifact_copy: Path) -> None:
    edit(artifact_copy, lambda proto: set_attribute(proto, "model.norm", "epsilon", 1e-6))
    assert failed(healthy_artifact, artifact_copy) == {
        "structure.constants": "model.norm.weight is missing or altered"
    }


@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.post_attention_layernorm"])
def test_a_missing_norm(healthy_artifact: HealthyArtifact, artifact_copy: Path, name: str) -> None:
    """Its readers read its input. Its weight stays in the file."""

    def bypass(proto: onnx.ModelProto) -> None:
        norm = node(proto, name)
        output, before = norm.output[0], norm.input[0]
        if norm.op_type == "SkipSimplifiedLayerNormalization":  # norm of a sum, which may be an output too
            before = norm.output[3] if len(norm.output) > 3 else "sum"
            norm.CopyFrom(helper.make_node("Add", norm.input[:2], [before], name="sum"))
        else:
            proto.graph.node.remove(norm)
        for reader in proto.graph.node:
            reader.input[:] = [before if value == output else value for value in reader.input]

    edit(artifact_copy, bypass)
    failures = failed(healthy_artifact, artifact_copy)
    assert failures["structure.constants"] == f"{name}.weight is missing or altered"


def test_attention_of_another_kind(healthy_artifact: HealthyArtifact, artifact_copy: Path) -> None:
    for key, value in (("scale", 0.2), ("softcap", 30.0)):
        edit(artifact_copy, lambda proto, key=key, value=value: set_attribute(proto, ATTENTION, key, value))  # type: ignore[misc]
        assert failed(healthy_artifact, artifact_copy).keys() == {"structure.attention"}


def test_keys_where_values_belong(healthy_artifact: HealthyArtifact, artifact_copy: Path) -> None:
    def swap(proto: onnx.ModelProto) -> None:
        attention = node(proto, ATTENTION)
        names = list(attention.input)
        first = names.index("past_key_values.0.key")
        names[first], names[first + 1] = names[first + 1], names[first]
        attention.input[:] = names

    edit(artifact_copy, swap)
    assert failed(healthy_artifact, artifact_copy).keys() == {"structure.attention"}


def shorten_the_past(proto: onnx.ModelProto) -> None:
    """Shortens the cache by one token."""
    if any(n.name == "seqlens_k" for n in proto.graph.node):
        set_constant(proto, "one", np.array([2], np.int64))
        return
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1), "off_by_one"))
    position = next(i for i, n in enumerate(proto.graph.node) if n.name == "token_positions")
    earlier = helper.make_node("Sub", ["past_count", "off_by_one"], ["earlier"], name="earlier")
    proto.graph.node[position].input[0] = "earlier"
    proto.graph.node.insert(position, earlier)


def unmask(proto: onnx.ModelProto) -> None:
    """Takes lengths from elsewhere than the mask (`ort`), or lets tokens look ahead (`portable`)."""
    if any(n.name == "seqlens_k" for n in proto.graph.node):
        node(proto, "mask_width").input[0] = "input_ids"
        return
    node(proto, "visible").input[0] = "attention_mask_bool"


@pytest.mark.parametrize("damage", [shorten_the_past, unmask])
def test_lengths_and_masks(
    healthy_artifact: HealthyArtifact,
    artifact_copy: Path,
    damage: Callable[[onnx.ModelProto], None],
    tmp_path: Path,
) -> None:
    """Structure finds the fault in the graph, and the gate finds it in the numbers of a valid bundle."""
    edit(artifact_copy, damage)
    assert failed(healthy_artifact, artifact_copy).keys() == {"structure.lengths"}
    broken = Path(shutil.copytree(healthy_artifact.bundle.path, tmp_path / "broken.edgellama"))
    shutil.copy(artifact_copy / "model.onnx", broken / "onnx" / "model.onnx")
    bundle = write_manifest(
        broken, {k: v for k, v in healthy_artifact.bundle.manifest.items() if k != "files"}
    )
    try:
        report = validate(bundle, reference=healthy_artifact.checkpoint, tokens=256, max_kl=100.0)
    except BundleError as error:  # ONNX Runtime itself refuses contradictory lengths
        assert "failed while running it" in error.message
        return
    names = {c.name.partition(".")[0] for c in report.checks if c.verdict == "fail"}
    assert names >= {"structure"} and names & {"parity", "consistency"}


def test_zero_points_and_accuracy_level(healthy_artifact: HealthyArtifact, artifact_copy: Path) -> None:
    if healthy_artifact.bundle.recipe.onnx_form != "ort":
        pytest.skip("attributes of MatMulNBits")
    name = "model.layers.0.mlp.down_proj"
    edit(artifact_copy, lambda proto: set_attribute(proto, name, "accuracy_level", 1))
    assert failed(healthy_artifact, artifact_copy)["structure.schemes"].endswith(
        "found int4 g32 at accuracy level 1"
    )

    def add_zero_points(proto: onnx.ModelProto) -> None:
        set_attribute(proto, name, "accuracy_level", 4)
        rows, blocks = (t for t in proto.graph.initializer if t.name == f"{name}.scales").__next__().dims
        zeros = np.full((rows, -(-blocks // 2)), 0x77, np.uint8)
        proto.graph.initializer.append(numpy_helper.from_array(zeros, "zeros"))
        node(proto, name).input.append("zeros")

    edit(artifact_copy, add_zero_points)
    assert failed(healthy_artifact, artifact_copy)["structure.schemes"].endswith("with zero points")


def test_a_linear_left_in_float(healthy_artifact: HealthyArtifact, artifact_copy: Path) -> None:
    def unquantize(proto: onnx.ModelProto) -> None:
        name = "model.layers.0.self_attn.o_proj"
        linear = next(n for n in proto.graph.node if n.name in (name, f"{name}.matmul"))
        linear.CopyFrom(
            helper.make_node("MatMul", [linear.input[0], "float"], linear.output, name=linear.name)
        )
        size = healthy_artifact.model.config.hidden_size
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros((size, size), np.float32), "float"))

    edit(artifact_copy, unquantize)
    failures = failed(healthy_artifact, artifact_copy)
    assert (
        failures["structure.schemes"] == "model.layers.0.self_attn.o_proj: expected int4 g32, found float32"
    )
    assert "structure.codes" in failures


def test_an_input_that_no_node_computes(healthy_artifact: HealthyArtifact, artifact_copy: Path) -> None:
    def bypass(proto: onnx.ModelProto) -> None:
        node(proto, "last_token").input[0] = "no_such_value"

    edit(artifact_copy, bypass)
    assert "structure.valid" in failed(healthy_artifact, artifact_copy)


def test_metadata_and_clients(healthy_artifact: HealthyArtifact, artifact_copy: Path) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        next(p for p in proto.metadata_props if p.key == "edgellama.context_length").value = "64"

    edit(artifact_copy, rename)
    genai = artifact_copy / "genai_config.json"
    data = json.loads(genai.read_text())
    data["model"]["eos_token_id"] = [5]
    data["model"]["decoder"]["inputs"]["past_key_names"] = "past.%d.key"
    genai.write_text(json.dumps(data))
    failures = failed(healthy_artifact, artifact_copy)
    assert failures.keys() == {"structure.metadata", "structure.clients"}
    assert "eos_token_id" in failures["structure.clients"] and "past.%d.key" in failures["structure.clients"]
    genai.unlink()
    assert failed(healthy_artifact, artifact_copy)["structure.clients"] == "no genai_config.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../model.onnx.data"),
        ("location", "/etc/passwd"),
        ("location", ""),
        ("offset", "-1"),
        ("offset", "999999999999"),
        ("length", "3"),
        ("offset", "many"),
    ],
)
def test_weights_that_lie_elsewhere_are_refused(
    healthy_artifact: HealthyArtifact, artifact_copy: Path, key: str, value: str
) -> None:
    def move(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        next(e for e in tensor.external_data if e.key == key).value = value

    edit(artifact_copy, move)
    with pytest.raises(BundleError):
        read_onnx(artifact_copy)


def test_damaged_files_are_refused_in_one_sentence(
    healthy_artifact: HealthyArtifact, artifact_copy: Path
) -> None:
    """Bytes are cut off, overwritten and flipped. A file is shown, or raises BundleError only."""
    generator, file = random.Random(0), artifact_copy / "model.onnx"
    content, refused = file.read_bytes(), 0
    for _ in range(150):
        data = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(data))
            data[at : at + generator.choice((1, 1, 4, 40))] = generator.randbytes(generator.choice((1, 4, 0)))
        file.write_bytes(data[: generator.choice((len(data), generator.randrange(1, len(data))))])
        try:
            inspect(artifact_copy)
        except BundleError as error:
            refused += 1
            assert "\n" not in error.message
    assert refused > 50


def test_biases_of_joined_modules_in_another_order(tmp_path: Path) -> None:
    """Exchanges k and v, which have equally many rows, in the bias that q, k and v share."""
    recipe, path = RECIPES["int4-fast"], tmp_path / "onnx"
    checkpoint = random_checkpoint(tmp_path / "model", {"attention_bias": True})
    model, _ = quantized_llama(checkpoint, recipe, 16)
    lower_to_onnx(model, path, provenance(recipe), progress=Progress())

    def exchange(proto: onnx.ModelProto) -> None:
        name = f"{ATTENTION}.qkv_proj.bias"
        q, k, v = np.split(read_onnx(path).array(name), [64, 96])
        set_constant(proto, name, np.concatenate([q, v, k]))

    edit(path, exchange)
    checks = check_structure(path, model, provenance(recipe))
    failures = {c.name: c.detail for c in checks if c.verdict != "pass" and c.name != "structure.clients"}
    assert failures == {
        "structure.constants": f"{ATTENTION}.k_proj.bias is missing or altered; {ATTENTION}.v_proj.bias is missing or altered"
    }
