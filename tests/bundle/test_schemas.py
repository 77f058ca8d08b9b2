"""Tests of the published schemas: each is valid and read whole, and reports conform to theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from edgellama.bundle import Bundle
from edgellama.bundle.reports import stored_reports
from edgellama.bundle.schema import CHECKED, DESCRIBING, conforming, published
from edgellama.errors import InputError
from tests.helpers.report_data import BENCH
from tests.helpers.schemas import NAMES, keywords


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_valid_and_uses_checked_keywords_only(name: str) -> None:
    """A keyword that `violations` does not know would be passed over in silence."""
    schema = published(name)
    Draft202012Validator.check_schema(schema)
    assert keywords(schema) <= CHECKED | DESCRIBING
    assert schema["properties"]["schema"]["enum"] == [
        schema["$id"].removeprefix("urn:").replace(":", ".", 1).replace(":", "/")
    ]


@pytest.fixture(scope="module")
def report(tiny_bundle: Bundle) -> dict[str, Any]:
    return stored_reports(tiny_bundle)["xnnpack"]


def read(data: Any, name: str) -> dict[str, Any]:
    return conforming(data, name, label="data", where="FILE", remedy="None.")


def test_a_report_and_a_benchmark_conform(report: dict[str, Any]) -> None:
    for data, name in ((report, "report"), (BENCH, "bench")):
        assert read(data, name) == data
        Draft202012Validator(published(name)).validate(data)


@pytest.mark.parametrize("name", ["report", "bench"])
def test_each_required_key_is_required(name: str, report: dict[str, Any]) -> None:
    data = {"report": report, "bench": BENCH}[name]
    for key in published(name)["required"]:
        with pytest.raises(InputError, match=r"FILE: (schema is None|data has no )"):
            read({k: v for k, v in data.items() if k != key}, name)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("report", lambda data: data["quality"].update(kl_mean="0.1")),
        ("report", lambda data: data["quality"].pop("ppl_artifact")),
        ("report", lambda data: data["scored"]["windows"][0].update(tokens=0)),
        ("report", lambda data: data["scored"]["windows"][0].update(kl="0.1")),
        ("report", lambda data: data["tools"].update(torch=2)),
        ("report", lambda data: data["checks"][0].update(verdict="passed")),
        ("report", lambda data: data.update(device=[{"device": "phone", "decode_tok_s": "fast"}])),
        ("bench", lambda data: data["bandwidth"].update(low=0)),
        ("bench", lambda data: data["candidates"][0]["runs"][0]["decode_tok_s"].pop("median")),
        ("bench", lambda data: data["candidates"][0]["runs"].clear()),
        ("bench", lambda data: data["candidates"][0].update(load_s=-1.0)),
        ("bench", lambda data: data["ratios"].append({"name": "a"})),
    ],
)
def test_a_damaged_file_is_refused(
    name: str, damage: Callable[[dict[str, Any]], object], report: dict[str, Any]
) -> None:
    data = copy.deepcopy({"report": report, "bench": BENCH}[name])
    damage(data)
    with pytest.raises(InputError, match="FILE: data"):
        read(data, name)
    assert not Draft202012Validator(published(name)).is_valid(data)
