"""Data for tests of reports: layers, a benchmark, and the same data with hostile texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HOSTILE = (
    "</title></style></svg>--><script>alert(1)</script><img src=x onerror=alert(2)>\"'`|\x00\u202e\ud800@a"
)


def poisoned(value: Any, *, names_too: bool = False) -> Any:
    """The same data with HOSTILE after every text. With `names_too` keys get it as well.

    The names of domains come from the texts of users, so they are always poisoned.
    """
    if isinstance(value, Mapping):
        return {
            (f"{key}{HOSTILE}" if names_too else key): item
            if key in ("verdict", "schema")
            else poisoned(item, names_too=key == "domains")
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [poisoned(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def _interval(value: float) -> list[float]:
    return [0.9 * value, 1.1 * value]


LAYERS: dict[str, Any] = {
    "tokens": 512,
    "windows": 8,
    "split": {
        name: {"kl": kl, "kl_ci95": _interval(kl)}
        for name, kl in {"weights": 0.2, "activations": 0.03, "lowering": -0.001, "all": 0.229}.items()
    },
    "parts": [
        {
            "part": name,
            "sqnr_db": None if name == "lm_head" else 30.0 - i,
            "kl_alone": 0.01 * i,
            "kl_alone_ci95": _interval(0.01 * i),
            "kl_restored": 0.008 * i - 0.002,
            "kl_restored_ci95": [0.008 * i - 0.004, 0.008 * i],
        }
        for i, name in enumerate(["model.embed_tokens", *(f"model.layers.{i}" for i in range(30)), "lm_head"])
    ],
}
SPREAD = {"median": 100.0, "low": 90.0, "high": 105.0}
BENCH: dict[str, Any] = {
    "schema": "edgellama.bench/1",
    "machine": {"processor": "a processor", "cores": 2},
    "bandwidth": {"median": 2e10, "low": 1.9e10, "high": 2.1e10},
    "decode_tokens": 64,
    "repeat": 7,
    "candidates": [
        {
            "name": f"{name}.edgellama:xnnpack",
            "runtime": "executorch-xnnpack",
            "threads": 2,
            "artifact_bytes": 118_000_000,
            "load_s": 0.02,
            "peak_resident_bytes": 500_000_000,
            "runs": [
                {
                    "prompt_tokens": n,
                    "time_to_first_token_s": SPREAD,
                    "prefill_tok_s": SPREAD,
                    "decode_tok_s": SPREAD,
                    "bytes_per_token": 90_000_000,
                    "bandwidth_share": 0.45,
                }
                for n in (32, 128, 512)
            ],
        }
        for name in ("one", "other")
    ],
    "ratios": [
        {
            "name": "other.edgellama:xnnpack",
            "over": "one.edgellama:xnnpack",
            "prompt_tokens": n,
            "prefill": {"mean": 1.1, "ci95": [1.0, 1.2]},
            "decode": {"mean": 0.9, "ci95": [0.8, 1.02]},
        }
        for n in (32, 128, 512)
    ],
}
