"""Kernels named from a log of translated code, and the check that judges them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellama.emulator import kernels
from edgellama.emulator.installed import Emulator
from edgellama.emulator.kernels import Kernels, executed_kernels

EMULATOR = Emulator(Path("/nowhere"), "10.0", {})
DECODE = "kai_run_matmul_clamp_f32_qai8dxp1x4_qsi4c32p4x4_1x4_neon_dotprod"
FUNCTIONS = [
    (0x100, 0x40, DECODE),
    (0x200, 0x40, "kai_get_m_step"),
    (0x300, 0x40, "xnn_f32_gemm_ukernel_1x8"),
]
LOG = """\
----------------
IN:
0x00001110:  4e8fe000  sdot     v0.4s, v0.16b, v15.16b
0x00001114:  d65f03c0  ret
IN: kai_get_m_step
0x00001200:  d65f03c0  ret
0x00001400:  4e20cc00  fmla     v0.4s, v0.4s, v0.4s
0x00009900:  4e8fe000  smmla    v0.4s, v0.16b, v15.16b
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kernels, "_functions", lambda emulator, library: FUNCTIONS)
    file = tmp_path / "log"
    file.write_text(LOG, encoding="utf-8")
    return file


def test_only_executed_code_of_the_library_is_named(log: Path) -> None:
    """The library lies at 0x1000 to 0x2000; the product at 0x9900 is of another library."""
    ran = executed_kernels(EMULATOR, log, [[0x1000, 0x1800, 0, "lib.so"], [0x1800, 0x2000, 0x800, "lib.so"]])
    assert ran == Kernels((DECODE,), {"fmla": 1, "sdot": 1})
    assert ran.integer == ("sdot",)


def test_a_library_that_is_not_mapped_ran_no_kernel(log: Path) -> None:
    assert executed_kernels(EMULATOR, log, []) == Kernels((), {})
