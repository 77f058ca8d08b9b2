"""Reader of ExecuTorch's event dumps (ETDump): what the calls of a method took, and operators in delegates.

ExecuTorch 1.5.1 has a public reader, which makes a Python object of each of 1,500 events of a token. Its
conversion to JSON, one step below, is used here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.host.log_filters import ignored_deprecations

_NANOSECONDS = 1e9
_EXECUTE, _DELEGATE, _OPERATOR, _KERNEL = (
    "Method::execute",
    "DELEGATE_CALL",
    "OPERATOR_CALL",
    "native_call_",
)


@dataclass(frozen=True)
class ProfiledCall:
    """One call of a method.

    Attributes:
        name: the kernel's name without its namespace, or "" for a delegate or an unnamed call.
        seconds: time of the call, with all inside it.
        operators: name and seconds of each operator of a delegate, in order. Empty for a kernel.
    """

    name: str
    seconds: float
    operators: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ProfiledRun:
    """One run of a method: its time in seconds, and its calls in order."""

    seconds: float
    calls: tuple[ProfiledCall, ...]


def read_profile(path: Path) -> list[ProfiledRun]:
    """Runs of methods in the dump at `path`, which this process has written, in order."""
    from executorch.devtools.etdump.serialize import _convert_from_flatcc

    with ignored_deprecations():
        runs = json.loads(_convert_from_flatcc(path.read_bytes()))["run_data"]
    events = ([e["profile_event"] for e in run["events"] if "profile_event" in e] for run in runs)
    return [run for found in events for run in _runs(found)]


def _runs(events: list[dict[str, Any]]) -> Iterator[ProfiledRun]:
    """The run that these events are of. Loading has events too, which are of no run."""
    calls: list[ProfiledCall] = []
    kernel, operators = "", []
    # An event is listed when it ends: what is inside a call comes before it.
    for event in events:
        name, seconds = event.get("name", ""), (event["end_time"] - event["start_time"]) / _NANOSECONDS
        if "delegate_debug_id_str" in event:
            operators.append((event["delegate_debug_id_str"].partition(" #")[0], seconds))
        elif name in (_DELEGATE, _OPERATOR):
            calls.append(ProfiledCall(kernel, seconds, tuple(operators)))
            kernel, operators = "", []
        elif name == _EXECUTE:
            yield ProfiledRun(seconds, tuple(calls))
        else:
            kernel = name.removeprefix(_KERNEL).rpartition("::")[2]
