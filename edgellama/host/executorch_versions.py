"""Versions of ExecuTorch that edgellama is proven with, and what differs between them.

The XNNPACK delegate's schema and serializer are the same in all of them, file by file. So are the bytes of a
lowered model (tests/export/test_lower_xnnpack.py). 1.5 moved the bindings from one library to several, which
`runtimes/emulated_worker.py` names.
"""

from __future__ import annotations

from importlib.metadata import version

# Oldest first. The last one is what edgellama installs.
PROVEN = ("1.4.0", "1.4.1", "1.5.0", "1.5.1")
EVENT_TRACER = "1.5.0"


def installed_executorch() -> str:
    """Version of the installed executorch, without the local part (`+cpu`)."""
    return version("executorch").partition("+")[0]


def proven() -> bool:
    """Returns True if edgellama writes delegates for the installed executorch itself."""
    return installed_executorch() in PROVEN


def has_event_tracer() -> bool:
    """Returns True if the installed wheel was compiled with the event tracer, which times operators.

    ExecuTorch 1.5.0 turned it on for Linux and macOS. With 1.4 a method runs, and leaves no events.
    """
    from packaging.version import Version  # not needed where this file is loaded alone, in the emulator

    return Version(installed_executorch()) >= Version(EVENT_TRACER)
