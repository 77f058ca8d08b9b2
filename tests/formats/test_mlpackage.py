"""Reader of .mlpackage directories: contents, and refusals of damaged packages in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from coremltools.libmilstoragepython import _BlobStorageWriter
from coremltools.optimize import coreml as cto
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.inspect import inspect
from edgellama.errors import BundleError
from edgellama.export.coreml.lower import lower_to_coreml, write_package
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.coreml_pte import extracted_package
from edgellama.formats.mlpackage import MINIMUM_OS, OPSETS, Weight, load_spec, read_mlpackage
from edgellama.formats.mlpackage_tensor import Constant
from edgellama.host.log_filters import coremltools_quiet
from edgellama.host.progress import Progress
from edgellama.recipe import RECIPES
from edgellama.targets.coreml.interface import PROFILES
from tests.helpers.mil_programs import save
from tests.helpers.tiny_models import CONTEXT, Cut, provenance

MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def int4_package(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Package of one layer at int4-fast."""
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), RECIPES["int4-fast"], CONTEXT)
    path = tmp_path_factory.mktemp("package") / "model.mlpackage"
    lower_to_coreml(model, path, provenance(RECIPES["int4-fast"]), progress=Progress())
    return path


def test_contents_of_a_package(int4_package: Path) -> None:
    contents = read_mlpackage(int4_package)
    (function,) = contents.functions
    assert (contents.specification, function.opset, contents.minimum_os) == (
        9,
        "CoreML8",
        {"ios": "18", "macos": "15"},
    )
    assert [(x.name, x.dtype, x.shape) for x in function.inputs] == [
        ("inputIds", "int32", (1, (1, CONTEXT))),
        ("causalMask", "float16", (1, 1, (1, CONTEXT), (1, CONTEXT))),
    ]
    assert [(x.name, x.dtype, x.shape) for x in function.states] == [
        ("keyCache", "float16", (1, 1, 2, CONTEXT, 32)),
        ("valueCache", "float16", (1, 1, 2, CONTEXT, 32)),
    ]
    assert all(x.description for x in (*function.inputs, *function.states))
    weight = function.weights["model_layers_0_mlp_down_proj_weight"]
    assert (weight.scheme, weight.bits, weight.group_size, weight.shape) == ("int4 g32", 4, 32, (128, 352))
    assert weight.nbytes == 128 * 352 // 2 + 2 * 128 * 11
    codes = weight.parts["data"].array()
    assert codes.dtype == np.int8 and (int(codes.min()), int(codes.max())) == (-8, 7)
    assert contents.bytes == sum(f.stat().st_size for f in int4_package.rglob("*") if f.is_file())
    assert contents.weight_bytes == (int4_package / WEIGHTS).stat().st_size
    assert contents.operators["scaled_dot_product_attention"] == 1


def test_inspect_shows_functions_weights_and_operators(int4_package: Path) -> None:
    data = inspect(int4_package)
    assert data["kind"] == "mlpackage"
    assert data["minimum_os"] == {"ios": "18", "macos": "15"}
    assert [f["function"] for f in data["functions"]] == ["main"]
    assert data["functions"][0]["inputs"].startswith(f"inputIds int32 [1, 1..{CONTEXT}], causalMask float16")
    schemes = {row["scheme"]: row for row in data["weights"]}
    assert set(schemes) == {"int4 g32", "int8 channel", "float16"}
    assert schemes["int8 channel"]["bytes"] == 512 * 128 + 2 * 512
    assert sum(row["share"] for row in data["weights"]) == pytest.approx(1)
    assert {"operator": "linear", "calls": 8} in data["operators"]
    assert json.loads(data["user_defined"]["edgellama.recipe"])["name"] == "int4-fast"


Damage = Callable[[Path], object]


def edited(change: Callable[[Any], object]) -> Damage:
    """Damage that changes the protobuf message of the model."""

    def damage(path: Path) -> None:
        spec = load_spec(path)
        change(spec)
        (path / MODEL).write_bytes(spec.SerializeToString())

    return damage


def block(spec: Any) -> Any:
    """Program of the only function."""
    return spec.mlProgram.functions["main"].block_specializations["CoreML8"]


def blob(spec: Any) -> Any:
    """First constant that lies in weight.bin."""
    values = (op.attributes["val"] for op in block(spec).operations if op.type == "const")
    return next(value for value in values if value.WhichOneof("value") == "blobFileValue")


def grow(spec: Any) -> None:
    """Declares a constant far larger than weight.bin."""
    blob(spec).type.tensorType.dimensions[0].constant.size = 2**40


DAMAGES: dict[str, Damage] = {
    "no manifest": lambda p: (p / "Manifest.json").unlink(),
    "manifest is no JSON": lambda p: (p / "Manifest.json").write_text("{"),
    "manifest is a list": lambda p: (p / "Manifest.json").write_text("[]"),
    "manifest without a root": lambda p: (p / "Manifest.json").write_text('{"itemInfoEntries": {}}'),
    "manifest leads outside": lambda p: (p / "Manifest.json").write_text(
        (p / "Manifest.json").read_text().replace("com.apple.CoreML/model", "../../../com.apple.CoreML/model")
    ),
    "no model": lambda p: (p / MODEL).unlink(),
    "model is garbage": lambda p: (p / MODEL).write_bytes(b"\xff" * 1000),
    "model is empty": lambda p: (p / MODEL).write_bytes(b""),
    "model is cut off": lambda p: (p / MODEL).write_bytes((p / MODEL).read_bytes()[:-500]),
    "no function": edited(lambda spec: spec.mlProgram.functions.clear()),
    "no block for the opset": edited(
        lambda spec: setattr(spec.mlProgram.functions["main"], "opset", "CoreML77")
    ),
    "a neural network": edited(lambda spec: spec.neuralNetwork.SetInParent()),
    "a value that nothing computes": edited(lambda spec: block(spec).operations.pop(0)),
    "a value that is computed twice": edited(
        lambda spec: block(spec).operations.add().CopyFrom(block(spec).operations[0])
    ),
    "weights of another shape": edited(lambda spec: grow(spec)),
    "weights at another place": edited(lambda spec: setattr(blob(spec).blobFileValue, "offset", 2**40)),
    "weights in another file": edited(
        lambda spec: setattr(blob(spec).blobFileValue, "fileName", "/etc/passwd")
    ),
    "weights outside": edited(
        lambda spec: setattr(blob(spec).blobFileValue, "fileName", "@model_path/../../../../weight.bin")
    ),
    "no weights": lambda p: (p / WEIGHTS).unlink(),
    "a link": lambda p: (p / "link").symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_packages_are_refused(name: str, int4_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    shutil.copytree(int4_package, path)
    DAMAGES[name](path)
    with pytest.raises(BundleError) as caught:
        read_mlpackage(path)
    assert caught.value.message.startswith(str(path)) and caught.value.remedy


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_weights_that_are_cut_off_are_refused(kept: float, int4_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    shutil.copytree(int4_package, path)
    stored = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(stored[: int(kept * len(stored)) if isinstance(kept, float) else kept])
    with pytest.raises(BundleError, match=r"weight\.bin is damaged"):
        read_mlpackage(path)


def test_a_damaged_package_is_one_message(
    int4_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.mlpackage"
    shutil.copytree(int4_package, path)
    DAMAGES["weights of another shape"](path)
    assert main(["inspect", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"edgellama: error: {path}/{WEIGHTS} is damaged: ")
    assert err.count("\n") == 2


def test_mutated_models_are_refused_or_read(int4_package: Path, tmp_path: Path) -> None:
    """A changed byte leaves a readable package or raises BundleError. Nothing crashes."""
    path = tmp_path / "model.mlpackage"
    shutil.copytree(int4_package, path)
    stored = (path / MODEL).read_bytes()
    random, refused = np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(stored)
        changed[random.integers(0, len(stored))] = random.integers(0, 256)
        (path / MODEL).write_bytes(changed)
        try:
            for function in read_mlpackage(path).functions:
                assert function.weights is not None
        except BundleError:
            refused += 1
    assert 0 < refused < 150


def test_a_pte_without_core_ml_holds_no_package(cut: Callable[[int, str], Cut]) -> None:
    with pytest.raises(BundleError, match="0 Core ML packages"), extracted_package(cut(1, "int4-fast").path):
        pass


def test_reading_takes_no_memory_for_weights(int4_package: Path) -> None:
    contents = read_mlpackage(int4_package)
    assert all(part.data is None for w in contents.functions[0].weights.values() for part in w.parts.values())
    assert torch.from_numpy(contents.functions[0].weights["cos"].parts["val"].array()).shape == (CONTEXT, 16)


def test_a_symbolic_link_to_a_package_is_read(int4_package: Path, tmp_path: Path) -> None:
    (tmp_path / "link.mlpackage").symlink_to(int4_package)
    assert read_mlpackage(tmp_path / "link.mlpackage").functions[0].weights


@pytest.mark.slow
def test_shared_weights_of_functions_count_once(
    tiny_checkpoint: Checkpoint, int4_package: Path, tmp_path: Path
) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), RECIPES["int4-fast"], CONTEXT)
    path = tmp_path / "model.mlpackage"
    write_package(model, PROFILES["ane"], path, provenance(RECIPES["int4-fast"]), progress=Progress())
    one_function, two_functions = read_mlpackage(int4_package), read_mlpackage(path)
    assert [f.name for f in two_functions.functions] == ["decode", "prefill"]
    assert two_functions.default_function == "decode"

    def quantized(weights: list[Weight]) -> list[tuple[str, int]]:
        return sorted((w.scheme, w.nbytes) for w in weights if w.type != "const")

    assert quantized(two_functions.weights) == quantized(one_function.weights)
    decode, prefill = (quantized(list(f.weights.values())) for f in two_functions.functions)
    assert decode == prefill == quantized(one_function.weights)
    assert two_functions.operators["linear"] == 2 * one_function.operators["linear"]


@pytest.mark.slow
def test_the_same_codes_with_other_scales_are_another_weight(tmp_path: Path) -> None:
    """Per-tensor scales lie in the program. The equal codes of all functions lie once in weight.bin."""
    functions = ct.utils.MultiFunctionDescriptor()
    for name, scale in (("a", 0.5), ("b", 0.25), ("c", 0.5)):
        specs = {"x": mb.TensorSpec((1, 64), types.fp16)}
        with Function(specs, ct.target.iOS18) as function, coremltools_quiet():
            codes = np.arange(64 * 64, dtype=np.int64).reshape(64, 64).astype(np.int8)
            scale_array = np.full((1, 1), scale, np.float16)
            weight = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale_array, name="weight")
            function.set_outputs([mb.linear(x=function.inputs["x"], weight=weight, name="y")])
        functions.add_function(str(save(function, tmp_path / f"{name}.mlpackage")), "main", name)
    functions.default_function_name = "a"
    with coremltools_quiet():
        ct.utils.save_multifunction(functions, str(tmp_path / "m.mlpackage"))
    combined = read_mlpackage(tmp_path / "m.mlpackage")
    scales = [w.parts["scale"].array().item() for w in combined.weights if w.type != "const"]
    assert scales == [0.5, 0.25]
    assert len({w.parts["data"].offset for w in combined.weights if w.type != "const"}) == 1


@pytest.mark.parametrize(
    ("dtype", "writer", "low", "high"),
    [
        *((f"uint{n}", f"uint{n}", 0, 2**n) for n in (1, 2, 3, 4, 6, 8)),
        *(("int4", "int4", -8, 8), ("int8", "int8", -128, 128), ("int16", "int16", -(2**15), 2**15)),
        *(
            ("uint16", "uint16", 0, 2**16),
            ("int32", "int32", -(2**31), 2**31),
            ("uint32", "uint32", 0, 2**32),
        ),
        *(("float16", "fp16", 0, 0), ("float32", "float", 0, 0)),
    ],
)
def test_every_dtype_of_weight_bin_reads_as_it_was_written(
    dtype: str, writer: str, low: int, high: int, tmp_path: Path
) -> None:
    """37 values of a packed type end within a byte."""
    random, file = np.random.default_rng(0), tmp_path / "weight.bin"
    if dtype.startswith("float"):
        values = random.normal(size=37).astype(dtype)
    else:
        values = random.integers(low, high, 37, dtype=np.int64)
        narrow = {"int4": "int8"}.get(dtype, "uint8" if int(dtype.strip("uint")) < 8 else dtype)
        values = values.astype(narrow)
    storage = _BlobStorageWriter(str(file))
    storage.write_uint8_data(np.zeros(5, np.uint8))
    stored = values.view(np.uint16) if dtype == "float16" else values
    offset = getattr(storage, f"write_{writer}_data")(stored)
    del storage  # closes the file
    array = Constant(dtype, (37,), offset, None, file).array()
    assert array.dtype == values.dtype and np.array_equal(array, values)
    with pytest.raises(BundleError, match="are stored there"):
        Constant(dtype, (64,), offset, None, file).array()


class Products(nn.Module):
    """One weight each of a convolution, a linear, and a matmul whose weight has its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(64, 96, 1, bias=False)
        self.linear = nn.Linear(96, 64, bias=False)
        self.factor = nn.Parameter(torch.randn(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.conv(x)[:, :, 0].transpose(1, 2)) @ self.factor
        return y


@pytest.fixture(scope="module")
def models_by_ios_version() -> dict[int, Any]:
    """Core ML models of `Products` by minimum version of iOS: 16 and 18."""
    with coremltools_quiet():
        program = torch.export.export(Products().eval(), (torch.zeros(1, 64, 1, 8),)).run_decompositions({})
        return {
            version: ct.convert(
                program, minimum_deployment_target=ct.target[f"iOS{version}"], skip_model_load=True
            )
            for version in (16, 18)
        }


SIZES = {(96, 64, 1, 1): 96 * 64, (64, 96): 96 * 64, (32, 64): 64 * 32}
Form = Callable[[Any], Any]


def linear(**options: Any) -> Form:
    """Linear quantization of every weight."""
    config = cto.OpLinearQuantizerConfig(weight_threshold=1, **options)
    return lambda model: cto.linear_quantize_weights(model, cto.OptimizationConfig(config))


def palettized(**options: Any) -> Form:
    """Palettization of every weight by k-means."""
    config = cto.OpPalettizerConfig(mode="kmeans", weight_threshold=1, num_kmeans_workers=1, **options)
    return lambda model: cto.palettize_weights(model, cto.OptimizationConfig(config))


def pruned(model: Any) -> Any:
    """Model with half of the weights set to zero and stored as sparse."""
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=1)
    return cto.prune_weights(model, cto.OptimizationConfig(config))


def pruned_and_quantized(model: Any) -> Any:
    config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=1)
    config = cto.OptimizationConfig(config)
    return cto.linear_quantize_weights(pruned(model), config, joint_compression=True)


def pruned_and_palettized(model: Any) -> Any:
    config = cto.OpPalettizerConfig(mode="kmeans", nbits=4, weight_threshold=1, num_kmeans_workers=1)
    return cto.palettize_weights(pruned(model), cto.OptimizationConfig(config), joint_compression=True)


@pytest.mark.parametrize(
    ("version", "form", "scheme", "bits", "group", "bits_per_weight"),
    [
        (
            18,
            linear(mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32),
            *("int4 g32", 4, 32, 4.5),
        ),
        (18, linear(mode="linear_symmetric"), "int8 channel", 8, None, 8),
        (
            18,
            linear(mode="linear", dtype="uint4", granularity="per_tensor"),
            *("uint4 tensor", 4, None, 4),
        ),
        (18, palettized(nbits=6), "palettized 6 bit", 6, None, 6),
        (18, palettized(nbits=3, enable_per_channel_scale=True), "palettized 3 bit", 3, None, 3),
        (
            18,
            palettized(nbits=4, cluster_dim=2, granularity="per_grouped_channel", group_size=32),
            *("palettized 4 bit", 4, None, 2),
        ),
        (18, pruned, "sparse", 16, None, 9),
        (18, pruned_and_quantized, "sparse int8 channel", 8, None, 5),
        (18, pruned_and_palettized, "sparse palettized 4 bit", 4, None, 3),
        (16, linear(mode="linear", dtype="uint8"), "uint8 channel", 8, None, 8),
        (16, palettized(nbits=4), "palettized 4 bit", 4, None, 4),
        (16, pruned, "sparse", 16, None, 9),
    ],
    ids=[
        *("int4 blocks", "int8 channels", "uint4", "palettized", "palettized and scaled", "vectors"),
        *("sparse", "sparse int8", "sparse palettized", "iOS 16 uint8", "iOS 16 palettized", "iOS 16 sparse"),
    ],
)
def test_compressed_weights(
    version: int,
    form: Form,
    scheme: str,
    bits: int,
    group: int | None,
    bits_per_weight: float,
    models_by_ios_version: dict[int, Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.mlpackage"
    with coremltools_quiet():
        form(models_by_ios_version[version]).save(str(path))
    compressed = read_mlpackage(path)
    weights = [w for w in compressed.weights if w.type != "const"]
    assert compressed.minimum_os["ios"] == str(version)
    assert sorted(w.shape for w in weights) == sorted(SIZES)
    for weight in weights:
        assert (weight.scheme, weight.bits, weight.group_size) == (scheme, bits, group)
        assert weight.nbytes > 0.99 * SIZES[weight.shape] * bits_per_weight / 8
        assert all(part.array().shape == part.shape for part in weight.parts.values())
    stored = sum(w.nbytes for w in compressed.weights)
    padding = 64 * 2 * sum(len(w.parts) + 1 for w in compressed.weights)
    assert stored <= compressed.weight_bytes <= stored + padding


@pytest.mark.slow
def test_enumerated_shapes_and_images_are_described(tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage"
    with coremltools_quiet():
        traced = torch.jit.trace(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8), check_trace=False)
        shapes = ct.EnumeratedShapes([(1, 3, 8, 8), (1, 3, 16, 8)])
        for kind, name in (
            (ct.TensorType(shape=shapes, name="x"), "tensor"),
            (ct.ImageType(shape=(1, 3, 8, 8), name="x"), "image"),
        ):
            model = ct.convert(
                traced, inputs=[kind], minimum_deployment_target=ct.target.iOS17, skip_model_load=True
            )
            model.save(str(path.with_stem(name)))
    (x,) = read_mlpackage(path.with_stem("tensor")).functions[0].inputs
    assert x.shape == (1, 3, (8, 16), 8)
    assert x.shapes == ((1, 3, 8, 8), (1, 3, 16, 8))
    assert inspect(path.with_stem("tensor"))["functions"][0]["inputs"] == (
        "x float16 [1, 3, 8, 8] or [1, 3, 16, 8]"
    )
    (x,) = read_mlpackage(path.with_stem("image")).functions[0].inputs
    assert (x.dtype, x.shape) == ("image", ())
    description = inspect(path.with_stem("image"))
    assert description["functions"][0]["inputs"] == "x image"
    assert description["minimum_os"] == {"ios": "17", "macos": "14"}


def test_minimum_systems_are_those_of_coremltools() -> None:
    for version, (ios, macos) in MINIMUM_OS.items():
        assert ct.target[f"iOS{ios}"] == ct.target[f"macOS{macos}"] == version
    assert sorted(OPSETS.values()) == sorted(MINIMUM_OS)
