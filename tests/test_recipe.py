"""Recipes: round trips, rules and schemes, files, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellama.errors import RecipeError, UsageError
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme, find_recipe

INT4, INT8 = Scheme(4, PerGroup(32)), Scheme(8, PerChannel())


def recipe(*rules: Rule, **changes: Any) -> Recipe:
    """Recipe with these rules, by default int4 for all modules."""
    return replace(Recipe("mine", "for tests", rules or (Rule("*", INT4),), 0.1, 0.2), **changes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_a_manifest(name: str) -> None:
    data = json.loads(json.dumps(RECIPES[name].to_dict()))
    assert Recipe.from_dict(data) == RECIPES[name]
    assert RECIPES[name].name == name


def test_a_scheme_of_every_kind_survives() -> None:
    mixed = recipe(
        Rule("a", None),
        Rule("b", Scheme(8, PerChannel(), int8_activations=False)),
        Rule("c", Scheme(4, PerChannel())),
        Rule("d", Scheme(4, PerGroup(128))),
    )
    assert Recipe.from_dict(mixed.to_dict()) == mixed


def test_schemes_of_the_recipes_match_their_names() -> None:
    modules = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"]
    described = {
        name: [s.describe() if s else "float32" for s in RECIPES[name].assign(modules).values()]
        for name in ("fp32", "int8", "int4-fast")
    }
    assert described == {
        "fp32": ["float32", "float32", "float32"],
        "int8": ["int8 channel", "int8 channel a8", "int8 channel a8"],
        "int4-fast": ["int8 channel", "int4 g32 a8", "int8 channel a8"],
    }


def test_the_first_rule_that_matches_decides() -> None:
    rules = (Rule("model.layers.0.*", None), Rule("*.down_proj", INT8), Rule("*", INT4))
    assigned = recipe(*rules).assign(
        ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    )
    assert list(assigned.values()) == [None, INT8, INT4]


def test_a_module_without_a_rule_is_refused() -> None:
    with pytest.raises(RecipeError, match="no rule for lm_head") as caught:
        recipe(Rule("model.*", INT4)).assign(["model.layers.0.mlp.up_proj", "lm_head"])
    assert '"scheme": null' in caught.value.remedy


@pytest.mark.parametrize(
    ("rules", "idle"),
    [
        ((Rule("*.down_porj", INT8), Rule("*", INT4)), r"\*\.down_porj"),
        ((Rule("*", INT4), Rule("lm_head", INT8)), "lm_head"),
        ((Rule("*", INT4), Rule("*", INT8)), r"\*"),
    ],
    ids=["misspelled", "behind a wider rule", "behind its twin"],
)
def test_a_rule_that_matches_nothing_is_refused(rules: tuple[Rule, ...], idle: str) -> None:
    with pytest.raises(RecipeError, match=rf"match no module: {idle}\n"):
        recipe(*rules).assign(["lm_head", "model.layers.0.mlp.down_proj"])


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 16, 0, -4])
def test_bits_without_a_kernel_in_xnnpack_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"bits must be 4 or 8, got {bits}"):
        Scheme(bits, PerChannel())


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 48), (4, 0), (4, -32), (8, 16)])
def test_groups_without_a_kernel_in_xnnpack_are_refused(bits: int, group: int) -> None:
    with pytest.raises(RecipeError, match=f"group_size {group} with {bits} bits"):
        Scheme(bits, PerGroup(group))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": ()}, "has no rules"),
        ({"algorithm": "magic"}, "unknown algorithm 'magic'"),
        ({"max_kl": 0.0}, "KL limit must lie in"),
        ({"max_kl_small": -1.0}, "KL limit must lie in"),
        ({"max_kl": float("nan")}, "KL limit must lie in"),
        ({"max_kl": float("inf")}, "KL limit must lie in"),
    ],
)
def test_invalid_fields_of_a_recipe_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


def test_the_limit_is_looser_for_small_models() -> None:
    mine = recipe(max_kl=0.1, max_kl_small=0.4)
    assert mine.kl_limit(800_000) == mine.kl_limit(135_000_000) == 0.4
    assert mine.kl_limit(8_000_000_000) == mine.kl_limit(70_000_000_000) == 0.1
    between = [mine.kl_limit(n) for n in (360_000_000, 1_236_000_000, 3_000_000_000)]
    assert [round(limit, 3) for limit in between] == [0.287, 0.189, 0.14]


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.pop(key)


def _with(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update({key: value})


def _in_rule(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["rules"][0].update({key: value})


def _in_scheme(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["rules"][0]["scheme"].update({key: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("max_kl"), "a recipe has the keys"),
        (_with("colour", "red"), "a recipe has the keys .*; got .*colour"),
        (_with("name", 3), "name has the wrong type: 3"),
        (_with("rules", {}), "rules has the wrong type"),
        (_with("rules", []), "has no rules"),
        (_with("rules", [7]), "a rule has the keys"),
        (_with("max_kl", "0.1"), "max_kl has the wrong type"),
        (_with("max_kl", True), "max_kl has the wrong type"),
        (_with("max_kl", 10**400), "KL limit must lie in"),
        (_with("algorithm", None), "algorithm has the wrong type"),
        (_in_rule("modules", 1), "modules has the wrong type"),
        (_in_rule("module", "*"), "a rule has the keys"),
        (_in_rule("scheme", "int4"), "a scheme has the keys"),
        (_in_scheme("bits", 4.0), "bits has the wrong type"),
        (_in_scheme("bits", True), "bits has the wrong type"),
        (_in_scheme("bits", 3), "bits must be 4 or 8"),
        (_in_scheme("group_size", "32"), "group_size must be an integer or null"),
        (_in_scheme("group_size", True), "group_size must be an integer or null"),
        (_in_scheme("group_size", 24), "group_size 24"),
        (_in_scheme("int8_activations", 1), "int8_activations has the wrong type"),
        (_in_scheme("zero_point", 0), "a scheme has the keys"),
    ],
)
def test_damaged_data_is_refused_by_key(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    data = recipe().to_dict()
    damage(data)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


def test_a_name_that_does_not_exist_gets_the_list_and_the_closest() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'int4-fats'") as caught:
        find_recipe("int4-fats")
    assert "Did you mean 'int4-fast'?" in caught.value.remedy
    assert "fp32, int4, int4-best, int4-fast, int8" in caught.value.remedy
    with pytest.raises(UsageError) as caught:
        find_recipe("zzz")
    assert "Did you mean" not in caught.value.remedy


def test_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(recipe().to_dict()))
    assert find_recipe(str(file)) == recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a readable recipe"),
        (b"\xff\xfe", "not a readable recipe"),
        (b"[" * 100_000, "not a readable recipe"),
        (b"[]", "a recipe is a JSON object"),
        (b"{}", "a recipe has the keys .*; got none"),
    ],
    ids=["truncated", "not UTF-8", "too deep", "a list", "empty"],
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        find_recipe(str(file))


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.json"):
        find_recipe(str(tmp_path / "nowhere.json"))
