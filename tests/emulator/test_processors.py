"""Names of Arm processors on the command line."""

from __future__ import annotations

import pytest

from edgellama.emulator.processors import PROCESSORS, find_processor
from edgellama.errors import UsageError


def test_every_processor_is_found_by_its_name() -> None:
    for name, processor in PROCESSORS.items():
        assert find_processor(f"arm64:{name}") is processor


def test_arm64_alone_is_a_common_phone() -> None:
    assert find_processor("arm64").name == "cortex-a76"


@pytest.mark.parametrize("specification", ["x86", "arm64:cortex-a67", "arm64:", "arm:cortex-a76", ""])
def test_unknown_names_are_refused(specification: str) -> None:
    if specification == "arm64:":  # the same as arm64
        assert find_processor(specification).name == "cortex-a76"
        return
    with pytest.raises(UsageError):
        find_processor(specification)


def test_a_misspelt_processor_is_corrected() -> None:
    with pytest.raises(UsageError) as error:
        find_processor("arm64:cortex-a67")
    assert "cortex-a76" in error.value.remedy
