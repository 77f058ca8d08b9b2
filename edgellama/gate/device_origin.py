"""Origin of a device's answer: its device, system, runtime and speeds must belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgellama.bundle import Bundle
from edgellama.gate import limits
from edgellama.report import Check, check
from edgellama.targets import Target

_APPLE = {"ios", "ipados", "macos", "darwin", "visionos", "tvos", "iphoneos"}
_APPLE_DEVICES = {"iphone", "ipad", "ipod", "mac", "macbook", "apple"}
_OTHER_MAKERS = {
    "google",
    "samsung",
    "xiaomi",
    "oneplus",
    "huawei",
    "oppo",
    "vivo",
    "motorola",
    "sony",
    "pixel",
}
_STAND_INS = {"reference", "interpreter", "interpreted", "fallback", "simulated", "stub", "mock"}
_BACKENDS = {"xnnpack", "coreml", "portable", "vulkan", "qnn", "mps"}


def runtime_check(name: str, target: Target, log: Mapping[str, Any]) -> Check:
    """Check that the runtime of a log runs artifacts of `target`, and is no stand-in for it."""
    words = _words(log["runtime"])
    foreign = sorted(set(words) & (_BACKENDS - set(target.device_backends)))
    reason = ""
    if set(words) & _STAND_INS:
        reason = "a stand-in for the runtime of a device"
    elif words[:1] != [target.device_runtime]:
        reason = f"not {target.device_runtime}, which runs {target.name}"
    elif foreign:
        reason = f"{foreign[0]} does not run {target.name}"
    elif "cpuonly" in words and target.name == "coreml":
        reason = "Core ML was told to leave the GPU and the Neural Engine alone"
    return check(name, not reason, value=log["runtime"], limit=target.device_runtime, detail=reason)


def system_check(name: str, target: Target, log: Mapping[str, Any]) -> Check:
    """Check that device, system and runtime of a log can belong to one machine."""
    system, device = set(_words(log["os"])), set(_words(log["device"]))
    runtime = set(_words(log["runtime"]))
    other_systems = system & {"android", "linux", "windows"}
    reason = ""
    if other_systems and system & _APPLE:
        reason = "two systems"
    elif other_systems and (target.device_backends == ("coreml",) or "coreml" in runtime):
        reason = "Core ML runs on Apple's systems only"
    elif system & (_APPLE | {"windows", "linux"}) and "android" in runtime:
        reason = "a runtime for Android on another system"
    elif "android" in system and device & _APPLE_DEVICES:
        reason = "Android does not run on Apple's devices"
    elif system & {"ios", "ipados"} and device & _OTHER_MAKERS:
        reason = "iOS runs on Apple's devices only"
    return check(name, not reason, value=f"{log['device']}, {log['os']}", detail=reason)


def figures_check(name: str, bundle: Bundle, target: Target, log: Mapping[str, Any]) -> Check:
    """Check that speeds, times and bytes of a log are possible. A device that cannot tell says null."""
    reasons = []
    for key, least, most in (
        ("prefill_tok_s", 0.0, limits.DEVICE_TOKENS_PER_S),
        ("decode_tok_s", 0.0, limits.DEVICE_TOKENS_PER_S),
        ("load_ms", 0.0, limits.DEVICE_LOAD_MS),
        ("peak_bytes", 0.0, limits.DEVICE_BYTES),
    ):
        value = log[key]
        if value is not None and not least < value <= most:
            reasons.append(f"{key} is {value:g}")
    weights = bundle.artifact_entry(target.name)["memory"]["weights"]
    if (log["decode_tok_s"] or 0) * weights > limits.DEVICE_BYTES_PER_S:
        reasons.append(f"decode reads {log['decode_tok_s'] * weights / 1e9:.0f} GB of weights a second")
    return check(name, not reasons, detail=", ".join(reasons))


def device_check(name: str, wanted: str | None, log: Mapping[str, Any]) -> Check:
    """Check that a log or response comes from the device that was asked for; None for any."""
    passed = wanted is None or wanted.casefold() in log["device"].casefold()
    return check(
        name,
        passed,
        value=log["device"],
        limit=wanted,
        detail="" if passed else "another device was asked for",
    )


def copies(logs: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Logs whose times are those of an earlier log of another device: number of the log -> that device.

    Two runs never take the same time to the last digit.
    """
    seen: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    copied = {}
    for number, log in enumerate(logs):
        times = tuple(log[key] for key in ("prefill_tok_s", "decode_tok_s", "load_ms"))
        if sum(time is not None for time in times) < 2:
            continue
        earlier = seen.setdefault(times, log)
        if any(earlier[key] != log[key] for key in ("device", "os", "target")):
            copied[number] = f"{earlier['device']}, {earlier['os']}, {earlier['target']}"
    return copied


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
