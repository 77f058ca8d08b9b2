"""ONNX Runtime, imported here and nowhere else, so that it sends nothing.

The official builds of onnxruntime 1.32.0 have telemetry, on by default: each process that makes a session reports to
Microsoft over HTTPS, from a thread of its own. Its Privacy.md names the variable that prevents it, which must be set
before the library is loaded (`disable_telemetry_events()` still reports the start). Who sets it to 0 is left alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

__all__ = ["ort", "state"]
