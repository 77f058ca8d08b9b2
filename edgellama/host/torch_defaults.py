"""Refusal of torch's defaults under which a model would compute something else, as notebooks set them."""

from __future__ import annotations

import torch

from edgellama.errors import UsageError


def check_torch_defaults() -> None:
    """Raises UsageError if new tensors would not be float32 on the CPU.

    Nothing is changed, because the defaults belong to the whole process.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        raise UsageError(
            f"torch's default dtype is {dtype}, and edgellama computes in float32",
            remedy="Call torch.set_default_dtype(torch.float32) before, and set your own default again afterwards.",
        )
    if device.type != "cpu":
        raise UsageError(
            f"torch's default device is {str(device)!r}, and edgellama computes on the CPU",
            remedy="Call torch.set_default_device(None) before, and set your own default again afterwards.",
        )
