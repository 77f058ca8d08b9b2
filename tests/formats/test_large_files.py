"""Files beyond 2 GB, as holes of a sparse file: every reader and runtime finds what lies behind them."""

from __future__ import annotations

import copy
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from edgellama.errors import BundleError, CheckpointError
from edgellama.formats.gguf import read_gguf
from edgellama.formats.mlpackage_tensor import Constant
from edgellama.formats.mlx_model import read_mlx
from edgellama.formats.onnx_model import read_bytes, read_onnx
from edgellama.formats.pte import read_pte
from edgellama.formats.pte_program import PteProgram
from edgellama.formats.stored_bytes import StoredBytes
from edgellama.runtimes.xnnpack import PteRuntime
from tests.helpers.tiny_models import Cut

HOLE = 5 << 29  # bytes: 2.7 GB, beyond a signed 32-bit number
VALUES = np.arange(64, dtype=np.float32)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A directory whose file system stores no holes."""
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.truncate(HOLE)
    if probe.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system stores holes")
    probe.unlink()
    return tmp_path


def test_stored_bytes(sparse: Path) -> None:
    path = sparse / "file"
    with path.open("wb") as file:
        file.seek(HOLE)
        file.write(b"content behind the hole")
    piece = StoredBytes(path, 0, path.stat().st_size)
    assert bytes(piece[HOLE:]) == b"content behind the hole" and len(piece) == HOLE + 23


def test_a_hash_needs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 26)
    tracemalloc.start()
    try:
        assert StoredBytes(path, 8, 1 << 25).sha256 == StoredBytes(path, 16, 1 << 25).sha256
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24


def test_gguf(sparse: Path) -> None:
    path = sparse / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    rows = HOLE // 4096
    writer.add_tensor_info("first", (rows, 2048), np.dtype(np.float16), HOLE)
    writer.add_tensor_info("last", (64,), np.dtype(np.float32), VALUES.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.seek(start + HOLE)
        file.write(VALUES.tobytes())
    model = read_gguf(path)
    assert model.tensors["first"].shape == (rows, 2048)
    assert torch.equal(model.read("last"), torch.from_numpy(VALUES))
    assert not model.read("first")[-1].any()
    os.truncate(path, start + HOLE)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_gguf(path)


def test_onnx(sparse: Path) -> None:
    tensor = TensorProto(
        name="last", dims=[64], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "data"), ("offset", HOLE), ("length", VALUES.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])
    graph = helper.make_graph([helper.make_node("Identity", ["last"], ["y"])], "g", [], [output], [tensor])
    path = sparse / "model.onnx"
    opset = [helper.make_opsetid("", 21)]
    path.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())
    with (sparse / "data").open("wb") as file:
        file.seek(HOLE)
        file.write(VALUES.tobytes())
    model = read_onnx(path)
    assert model.bytes > HOLE
    assert np.array_equal(model.array("last"), VALUES) and read_bytes(model, "last") == VALUES.tobytes()
    onnx.checker.check_model(str(path))
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    assert np.array_equal(session.run(None, {})[0], VALUES)
    os.truncate(sparse / "data", HOLE)
    with pytest.raises(BundleError, match="not where its values can lie"):
        read_onnx(path)


def test_safetensors_of_mlx(sparse: Path) -> None:
    header = (
        b'{"first":{"dtype":"F16","shape":[%d,2048],"data_offsets":[0,%d]},'
        b'"last":{"dtype":"F32","shape":[64],"data_offsets":[%d,%d]}}'
        % (HOLE // 4096, HOLE, HOLE, HOLE + VALUES.nbytes)
    )
    with (sparse / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(HOLE, os.SEEK_CUR)
        file.write(VALUES.tobytes())
    (sparse / "config.json").write_text("{}")
    model = read_mlx(sparse)
    assert model.bytes > HOLE and model.tensors["first"].nbytes == HOLE
    assert torch.equal(model.tensor("last"), torch.from_numpy(VALUES))


def test_weights_of_an_mlpackage(sparse: Path) -> None:
    path = sparse / "weight.bin"
    with path.open("wb") as file:
        file.seek(HOLE)
        description = (0xDEADBEEF, 2, VALUES.nbytes, HOLE + 64)
        sizes = (4, 4, 8, 8)
        file.write(b"".join(n.to_bytes(size, "little") for n, size in zip(description, sizes, strict=True)))
        file.seek(HOLE + 64)
        file.write(VALUES.tobytes())
    assert np.array_equal(Constant("float32", (64,), HOLE, None, path).array(), VALUES)


def test_pte(sparse: Path, cut: Callable[[int, str], Cut]) -> None:
    """Segments have offsets of 64 bits, in the program and in the header before it, so only weights may be large."""
    small = cut(1, "int4-fast").path
    program = PteProgram.read(small)
    data = copy.deepcopy(program.data)
    for segment in data["segments"]:
        segment["offset"] = segment.get("offset", 0) + HOLE
    large = sparse / "large.pte"
    start, size = program.segments
    replace(program, data=data, segments=(start, HOLE + size)).write(large)
    base = PteProgram.read(large).segments[0]
    with large.open("r+b") as file, small.open("rb") as source:
        file.truncate(base)
        file.seek(base + HOLE)
        source.seek(start)
        shutil.copyfileobj(source, file)
    stored, moved = read_pte(small), read_pte(large)
    assert moved.bytes > HOLE
    assert [linear.data for linear in moved.linears] == [linear.data for linear in stored.linears]
    assert [constant.data for constant in moved.constants] == [constant.data for constant in stored.constants]
    logits = []
    for path in (small, large):
        runtime = PteRuntime(path)
        logits.append(runtime.forward([3, 1, 4]))
        runtime.close()
    assert np.array_equal(logits[0], logits[1]) and logits[0].std() > 0.1
    os.truncate(large, HOLE)
    with pytest.raises(BundleError, match="ends behind the file"):
        read_pte(large)
