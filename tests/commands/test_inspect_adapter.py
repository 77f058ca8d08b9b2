"""Contents of an adapter's directory, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgellama.cli.dispatch import main
from edgellama.commands.inspect_adapter import inspect_adapter
from edgellama.host.adapter_files import AdapterPlace
from tests.helpers.adapters import Q0, matrices, write_adapter


def test_a_lora_can_be_merged_and_switched(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    data = inspect_adapter(path)
    assert (data["kind"], data["layout"], data["variant"], data["base"]) == (
        "adapter",
        "peft",
        "LoRA",
        "models/model",
    )
    assert (data["ranks"], data["factors"], data["layers"]) == ([2], [3.0], 1)
    assert data["linears"] == [{"linear": "q_proj", "count": 1}]
    assert data["parameters"] == 2 * (128 + 128) and data["sha256"] == AdapterPlace(path).sha256()
    assert data["bytes"] == (path / "adapter_model.safetensors").stat().st_size
    assert data["switched"] == "--adapters NAME=DIR, for onnx and gguf" and data["objections"] == []


def test_dora_and_whole_modules_cannot_be_switched(tmp_path: Path) -> None:
    tensors = {
        **matrices(),
        f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(128),
        "base_model.model.model.norm.weight": torch.ones(128),
    }
    data = inspect_adapter(write_adapter(tmp_path / "a", tensors, use_dora=True, modules_to_save=["norm"]))
    assert data["variant"] == "DoRA and whole modules" and data["trained_whole"] == ["model.norm.weight"]
    assert data["switched"] == "no: merge it"
    assert data["objections"] == [
        f"DoRA gives rows a length of their own ({Q0}.weight)",
        "a whole module was trained (model.norm.weight)",
    ]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_adapter(tmp_path / "a")
    assert main(["inspect", "--adapter", str(path), "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == inspect_adapter(path) and "models/model" in shown.err
    assert main(["inspect", str(path), "--adapter", str(path)]) == 2
    assert main(["inspect"]) == 2
    assert "Give a PATH, or --adapter DIR." in capsys.readouterr().err
