"""ONNX Runtime, imported only here, so that it sends no telemetry.

The official builds of onnxruntime 1.32.0 have telemetry, on by default. Each process that makes a session
reports to Microsoft over HTTPS, from a thread of its own. Its Privacy.md names the variable that prevents
this. The variable must be set before the library is loaded: `disable_telemetry_events()` still reports the
start. A value that the user has set, even 0, is kept.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

__all__ = ["ort", "state"]
