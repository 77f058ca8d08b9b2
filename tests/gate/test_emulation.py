"""The artifact on emulated Arm. Skipped, with the reason, without an installed emulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgellama.bundle import Bundle
from edgellama.commands.export import export
from edgellama.emulator.installed import Emulator, find_emulator
from edgellama.emulator.kernels import Kernels
from edgellama.emulator.processors import PROCESSORS
from edgellama.errors import EdgellamaError, UsageError
from edgellama.formats.pte import read_pte
from edgellama.formats.stored_bytes import StoredBytes
from edgellama.gate.emulated_kernels import check_kernels, client_entries
from edgellama.gate.emulation import Emulation, with_emulation
from edgellama.gate.structure import check_files
from edgellama.gate.subject import Section, report_of
from edgellama.host.progress import Progress
from edgellama.model.llama import rope_tables
from edgellama.report import Report
from edgellama.targets import find_target
from edgellama.targets.onnx.interface import GENAI_FILE, PER_BLOCK_ENTRIES
from tests.helpers.altered_bundles import altered, edit_file
from tests.helpers.paths import TINY

INT4 = "kai_run_matmul_clamp_f32_qai8dxp1x4_qsi4c32p4x4_1x4_neon_dotprod"
INT8 = "kai_run_matmul_clamp_f32_qai8dxp1x4_qsi8cxp4x4_1x4_neon_dotprod"
CONTEXT = 384  # long enough for a golden sequence of 320 tokens
FILES = {"xnnpack": "xnnpack/model.pte", "onnx": "onnx/model.onnx.data"}


def emulator() -> Emulator | str:
    """The installed emulator, or the reason why there is none."""
    try:
        return find_emulator()
    except EdgellamaError as error:
        return f"{error.message}. {error.remedy}"


EMULATOR = emulator()
emulated = pytest.mark.skipif(isinstance(EMULATOR, str), reason=str(EMULATOR))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("emulation") / "tiny.edgellama"
    return export(
        TINY, path, targets=["xnnpack", "onnx"], recipe="int4-fast", context=CONTEXT, validate=False
    )


def run(bundle: Bundle, target: str, *processors: str) -> Report:
    """The report of one target that only the emulated processors fill."""
    emulation = Emulation.of([f"arm64:{name}" for name in processors], [target])
    report = report_of(find_target(target), "not run", None, [Section((check_files(bundle),))])
    return with_emulation(bundle, [report], emulation, Progress())[0]


@emulated
@pytest.mark.slow
def test_a_pte_passes_on_two_generations(bundle: Bundle) -> None:
    report = run(bundle, "xnnpack", "cortex-a76", "neoverse-v1")
    assert report.passed, report.to_text()
    old, new = report.emulated
    assert old["label"].endswith("KleidiAI dotprod") and new["label"].endswith("KleidiAI i8mm")
    assert INT4 in old["kernels"] and INT8 in old["kernels"]
    assert 0 < old["parity_kl_mean"] < 1e-3


@emulated
@pytest.mark.slow
def test_onnx_passes_with_and_without_dotprod(bundle: Bundle) -> None:
    report = run(bundle, "onnx", "cortex-a53", "cortex-a76")
    assert report.passed, report.to_text()
    without, with_dotprod = report.emulated
    assert "sdot" not in without["products"] and "sdot" in with_dotprod["products"]
    assert [row["family"] for row in report.emulated] == ["float", "per-row"]
    assert {c.name: c.value for c in report.checks if c.name.endswith("rounding")} == {
        "emulated.cortex-a53.rounding": "float",
        "emulated.cortex-a76.rounding": "per-row",
    }
    assert without["parity_kl_mean"] < 1e-6, "nothing is rounded, so the replica differs by the order of sums"


@emulated
@pytest.mark.slow
def test_wrong_rounding_of_onnx_fails_by_name(bundle: Bundle, tmp_path: Path) -> None:
    """With this session entry the kernels round per block, and the golden vectors of this processor per row."""

    add = edit_file(
        f"onnx/{GENAI_FILE}",
        lambda data: data["model"]["decoder"]["session_options"].update(PER_BLOCK_ENTRIES),
    )
    report = run(altered(bundle, tmp_path, add), "onnx", "cortex-a76")
    failed = {c.name: c.detail for c in report.checks if c.verdict == "fail"}
    assert failed["emulated.cortex-a76.rounding"].startswith("prefill per-block, decode per-block")


def change(target: str, old: np.ndarray, new: np.ndarray) -> Callable[[Path], None]:
    """Replaces one tensor in the artifact's file, whose bytes occur there once."""

    def alter(copy: Path) -> None:
        file = copy / FILES[target]
        content = file.read_bytes()
        assert content.count(old.tobytes()) == 1
        file.write_bytes(content.replace(old.tobytes(), new.tobytes()))

    return alter


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("target", ["xnnpack", "onnx"])
def test_exchanged_halves_beyond_position_200_fail_by_name(
    target: str, bundle: Bundle, tmp_path: Path
) -> None:
    """RoPE adds the other half times the sine. Exchanged halves are a sine of the other sign."""
    sine = rope_tables(bundle.config, CONTEXT)[1][200:].numpy()
    if target == "xnnpack":
        sine = np.concatenate((-sine, sine), -1)
    report = run(altered(bundle, tmp_path, change(target, sine, -sine)), target, "cortex-a76")
    check = next(c for c in report.checks if c.verdict == "fail" and c.name.endswith("parity_kl_sequence"))
    assert check.name == "emulated.cortex-a76.parity_kl_sequence"
    assert check.detail in ("worst: middle", "worst: whole context")


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("target", ["xnnpack", "onnx"])
def test_a_damaged_tensor_fails_by_name(target: str, bundle: Bundle, tmp_path: Path) -> None:
    """The codes of one linear in a .pte, or as many bytes in the middle of ONNX's weights."""

    def damage(copy: Path) -> None:
        file = copy / FILES[target]
        content = np.frombuffer(file.read_bytes(), np.uint8).copy()
        start = len(content) // 2
        if target == "xnnpack":
            codes = next(x.data for x in read_pte(file).linears if x.group_size == 32)
            assert isinstance(codes, StoredBytes) and codes.size >= 4096
            start = codes.offset
        content[start : start + 4096] ^= 0x77
        file.write_bytes(content.tobytes())

    report = run(altered(bundle, tmp_path, damage), target, "cortex-a76")
    failed = [c.name for c in report.checks if c.verdict == "fail"]
    assert failed and set(failed) <= {
        "emulated.cortex-a76.parity_kl",
        "emulated.cortex-a76.parity_kl_sequence",
    }


@emulated
@pytest.mark.slow
def test_sigill_is_explained(bundle: Bundle) -> None:
    """PyPI's ExecuTorch uses the atomic instructions of Armv8.1, which cortex-a53 lacks."""
    report = run(bundle, "xnnpack", "cortex-a53")
    check = next(c for c in report.checks if c.verdict == "fail")
    assert check.name == "emulated.cortex-a53.load" and "SIGILL" in check.detail


def test_session_entries_are_those_of_the_clients_configuration(bundle: Bundle, tmp_path: Path) -> None:
    assert client_entries(bundle.path / "onnx") == []
    add = edit_file(
        f"onnx/{GENAI_FILE}",
        lambda data: data["model"]["decoder"]["session_options"].update(PER_BLOCK_ENTRIES),
    )
    assert client_entries(altered(bundle, tmp_path, add).path / "onnx") == ["mlas.disable_kleidiai=1"]


@pytest.mark.parametrize(
    ("target", "kernels", "verdict"),
    [
        ("xnnpack", Kernels((INT4, INT8), {"sdot": 4}), "pass"),
        ("xnnpack", Kernels((INT8,), {"sdot": 4}), "fail"),
        ("xnnpack", Kernels((INT8, "xnn_qd8_f32_qb4w_gemm_minmax_ukernel_1x8"), {"sdot": 4}), "fail"),
        ("onnx", Kernels((), {"sdot": 4, "fmla": 9}), "pass"),
        ("onnx", Kernels((), {"fmla": 9}), "fail"),
    ],
)
def test_a_fallback_kernel_fails(bundle: Bundle, target: str, kernels: Kernels, verdict: str) -> None:
    check = check_kernels(bundle, target, PROCESSORS["cortex-a76"], kernels)
    assert (check.name, check.verdict) == ("emulated.cortex-a76.kernels", verdict)


def test_a_target_without_an_arm_runtime_is_refused() -> None:
    with pytest.raises(UsageError, match="emulated Arm"):
        Emulation.of(["arm64"], ["coreml"])
    with pytest.raises(UsageError, match=r"gguf has .*: llama.cpp's library .* lacks the dotprod kernels"):
        Emulation.of(["arm64"], ["gguf"])
