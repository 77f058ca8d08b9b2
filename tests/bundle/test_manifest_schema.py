"""Tests of manifest.schema.json: exports conform to it, and `violations` agrees with the package jsonschema."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.schema import CHECKED, DESCRIBING, manifest_schema, violations
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.export import manifest as export_manifest
from edgellama.export.plan import make_plan
from edgellama.model.config import LlamaConfig, RopeScaling
from edgellama.recipe import RECIPES
from edgellama.report import Report
from edgellama.targets import TARGETS, find_target
from edgellama.text.chat import ChatFormat
from tests.helpers.json_places import places
from tests.helpers.schemas import keywords

ENTRY: dict[str, Any] = {
    "target": "xnnpack",
    "path": "xnnpack/model.pte",
    "bytes": 641920,
    "inputs": [{"name": "tokens", "dtype": "int64", "shape": [1, "T"], "range": [1, 128]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": [1, 512]}],
    "states": [],
    "methods": {"forward": None, "get_eos_ids": [2, 0], "use_kv_cache": True, "get_vocab_size": 512},
    "requires": {
        "runtime": "executorch",
        "min_version": "1.4.0",
        "backends": ["XnnpackBackend"],
        "operators": ["llama::custom_sdpa.out"],
        "min_os": {"android": "API 23", "ios": "17"},
    },
    "quantization": [
        {"scheme": "int8", "bits": 8, "group_size": None, "activations": "int8", "tensors": 1, "bytes": 67584}
    ],
    "memory": {"weights": 570884, "kv_cache": 262144, "peak_estimate": 2189248},
}
QUALITY = {
    "kl_mean": 0.02,
    "kl_mean_ci95": (0.01, 0.03),
    "top1_agreement": 0.9,
    "top1_agreement_ci95": (0.89, 0.91),
    "ppl_reference": 23.0,
    "ppl_artifact": 23.5,
}


@pytest.fixture(scope="module")
def manifest(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Manifest written by the functions of `export`, without lowering."""
    directory = tmp_path_factory.mktemp("small.edgellama")
    plan = make_plan(tiny_checkpoint, RECIPES["int4-fast"], [find_target("xnnpack")], 128)
    (directory / "xnnpack").mkdir()
    (directory / ENTRY["path"]).write_bytes(b"a model")
    export_manifest.write_model_files(directory, plan, [], load_llama(tiny_checkpoint, 128))
    report = Report("xnnpack", "pte", None, 1024, 8, {}, {}, QUALITY, {}, ())
    sections = export_manifest.manifest_sections(directory, plan) | {"artifacts": [ENTRY]}
    write_manifest(directory, sections | {"accuracy": {"xnnpack": report.headline()}})
    data: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    return data


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """Violations of the schema in a manifest, by edgellama's own check."""
    return list(violations(manifest, manifest_schema(), manifest_schema(), "manifest"))


def valid(manifest: Mapping[str, Any]) -> bool:
    """True if the package jsonschema accepts a manifest."""
    return bool(Draft202012Validator(manifest_schema()).is_valid(manifest))


def test_the_schema_is_valid() -> None:
    Draft202012Validator.check_schema(manifest_schema())


def test_the_schema_uses_exactly_the_checked_keywords() -> None:
    used = keywords(manifest_schema())
    assert used <= CHECKED | DESCRIBING
    assert used >= CHECKED  # no check is unused


def test_the_manifest_of_an_export_is_valid(tiny_bundle: Bundle) -> None:
    assert list(Draft202012Validator(manifest_schema()).iter_errors(tiny_bundle.manifest)) == []
    assert problems(tiny_bundle.manifest) == []
    assert tiny_bundle.manifest["accuracy"].keys() == set(tiny_bundle.targets)


def test_the_manifest_without_lowering_is_valid(manifest: dict[str, Any]) -> None:
    assert valid(manifest) and problems(manifest) == []
    assert manifest["chat"]["format"] and manifest["accuracy"]  # the tests below change these sections


def test_every_recipe_and_target_is_valid(manifest: dict[str, Any]) -> None:
    for recipe in RECIPES.values():
        assert problems(manifest | {"recipe": recipe.to_dict()}) == []
    for target in TARGETS.values():
        entry = ENTRY | {"target": target.name, "path": target.artifact}
        assert problems(manifest | {"artifacts": [entry]}) == []


def test_every_rope_scaling_is_valid(manifest: dict[str, Any]) -> None:
    for scaling in (RopeScaling("linear", 2.0), RopeScaling("frequency_factors", factors=(1.0,) * 16)):
        config = LlamaConfig.from_dict(manifest["model"] | {"rope_scaling": vars(scaling)})
        model = json.loads(json.dumps(config.to_dict())) | {"context_length": 128}
        assert problems(manifest | {"model": model}) == []


@pytest.mark.parametrize(
    ("keys", "kind"),
    [(("model",), LlamaConfig), (("chat", "format"), ChatFormat), (("model", "rope_scaling"), RopeScaling)],
)
def test_required_keys_are_the_fields_of_the_class(keys: tuple[str, ...], kind: Any) -> None:
    schema = manifest_schema()
    for key in keys:
        schema = schema["properties"][key]
    names = {field.name for field in fields(kind)} | ({"context_length"} if keys == ("model",) else set())
    optional = {"label_rows"} if keys == ("model",) else set()  # of classifiers alone
    assert set(schema["required"]) == names - optional and schema["properties"].keys() == names


def locate(data: Any, place: str) -> tuple[Any, Any]:
    """(container, key) of a place written with bars, such as `source|sha256`."""
    *steps, last = place.split("|")
    for step in steps:
        data = data[int(step) if isinstance(data, list) else step]
    return data, int(last) if isinstance(data, list) else last


@pytest.mark.parametrize(
    "place",
    [
        *("schema", "name", "tools", "source", "model", "chat", "recipe", "artifacts", "accuracy", "files"),
        *("tools|edgellama", "tools|torch", "source|license", "source|sha256", "model|context_length"),
        *("model|eos_token_ids", "model|rope_scaling", "chat|reason", "chat|format|trim", "recipe|rules"),
        *("recipe|rules|0|scheme", "recipe|rules|0|scheme|bits", "artifacts|0", "artifacts|0|methods"),
        *("artifacts|0|requires|operators", "artifacts|0|memory|kv_cache", "artifacts|0|quantization|0|bits"),
        *("artifacts|0|inputs|0|dtype", "accuracy|xnnpack|kl_mean_ci95", "files|tokenizer/tokenizer.json"),
        *("files|xnnpack/model.pte|bytes", "files|xnnpack/model.pte|sha256"),
    ],
)
def test_required_keys(manifest: dict[str, Any], place: str) -> None:
    data = copy.deepcopy(manifest)
    container, key = locate(data, place)
    del container[key]
    assert not valid(data)
    assert place.partition("|")[0] in problems(data)[0]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("schema", "edgellama.bundle/2"),
        ("surprise", 1),
        ("name", None),
        ("tools|torch", 2.13),
        ("source|surprise", 1),
        ("source|format", "pickle"),
        ("source|architecture", "mamba"),
        ("source|parameters", 0),
        ("source|parameters", 2**60),
        ("source|sha256", "0" * 63),
        ("source|sha256", "A" * 64),
        ("source|sha256", "0" * 64 + "\n"),
        ("model|vocab_size", "512"),
        ("model|vocab_size", 511.5),
        ("model|vocab_size", True),
        ("model|rms_norm_eps", 0),
        ("model|bos_token_id", -1),
        ("model|eos_token_ids", 2),
        ("model|eos_token_ids", [[2]]),
        ("model|tie_word_embeddings", 1),
        ("model|rope_scaling", {"rope_type": "yarn"}),
        ("chat|template", "../template"),
        ("chat|template", None),
        ("chat|reason", "although there is a format"),
        ("chat|format", None),
        ("chat|format|trim", "no"),
        ("chat|format|tool_prefix", ""),
        ("recipe|rules", []),
        ("recipe|rules|0|scheme|group_size", 0),
        ("recipe|max_kl", -1),
        ("artifacts", []),
        ("artifacts", {}),
        ("artifacts|0|target", "XNNPACK"),
        ("artifacts|0|path", "../model.pte"),
        ("artifacts|0|bytes", -1),
        ("artifacts|0|inputs", []),
        ("artifacts|0|inputs|0|range", [1]),
        ("artifacts|0|inputs|0|shape", [None]),
        ("artifacts|0|methods|get_x", {}),
        ("artifacts|0|methods|get_x", [[1]]),
        ("artifacts|0|requires|backends", "XnnpackBackend"),
        ("artifacts|0|quantization|0|scheme", " "),
        ("artifacts|0|memory|weights", 1.5),
        ("accuracy|xnnpack|verdict", "good"),
        ("accuracy|xnnpack|top1_agreement", 1.1),
        ("accuracy|xnnpack|kl_mean_ci95", [0, 1, 2]),
        ("accuracy|xnnpack", None),
        ("files|xnnpack/model.pte|mode", 0o644),
        ("files|xnnpack/model.pte|bytes", -1),
        ("files|../model.pte", {"bytes": 0, "sha256": "0" * 64}),
        ("files|a//b", {"bytes": 0, "sha256": "0" * 64}),
        ("files|a\\b", {"bytes": 0, "sha256": "0" * 64}),
        ("files|a\n", {"bytes": 0, "sha256": "0" * 64}),
    ],
)
def test_forbidden_values(manifest: dict[str, Any], place: str, wrong: Any) -> None:
    data = copy.deepcopy(manifest)
    container, key = locate(data, place)
    container[key] = wrong
    assert not valid(data)
    assert place.partition("|")[0] in problems(data)[0]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("tools|coremltools", "9.0"),
        ("artifacts|0|compute_units", "all"),
        ("artifacts|0|requires|min_os|macos", "14"),
        ("artifacts|0|memory|compiled", 1),
        ("artifacts|0|target", "coreml-pte"),
        ("artifacts|0|states", [{"name": "k", "dtype": "float16", "shape": [1, 2, 128, 32]}]),
        ("recipe|calibration", {"tokens": 4096}),
        ("recipe|rules|0|scheme|bits", 3),
        ("accuracy", {}),
        ("chat", {"template": None, "format": None, "reason": "the checkpoint has no chat template"}),
        ("source|license", "apache-2.0"),
        ("files|a b/…/..c", {"bytes": 0, "sha256": "0" * 64}),
    ],
)
def test_allowed_additions(manifest: dict[str, Any], place: str, value: Any) -> None:
    data = copy.deepcopy(manifest)
    container, key = locate(data, place)
    container[key] = value
    assert valid(data)
    assert problems(data) == []


REMOVED = object()


@pytest.mark.parametrize(
    "wrong", [None, True, -1, 0, 1, 0.5, 10**30, "", "x", [], ["x"], [1, 2], [[]], {}, {"x": 1}, REMOVED]
)
def test_reading_agrees_with_jsonschema_everywhere(manifest: dict[str, Any], wrong: Any) -> None:
    validator = Draft202012Validator(manifest_schema())
    verdicts = []
    for i, (_, name) in enumerate(list(places(manifest))):
        data = copy.deepcopy(manifest)
        container, key = list(places(data))[i]
        if wrong is REMOVED:
            del container[key]
        else:
            container[key] = wrong
        verdicts.append(not problems(data))
        assert verdicts[-1] == validator.is_valid(data), name
    assert not all(verdicts)
