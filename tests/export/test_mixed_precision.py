"""Budgets: the choice of schemes as arithmetic, and recipe `auto` on the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands import export
from edgellama.errors import CheckFailed, RecipeError
from edgellama.export.lower import lowering_for
from edgellama.export.quantization import quantize, sensitivity
from edgellama.export.quantization.distillation import recover
from edgellama.export.quantization.mixed_precision import Option, Part, frontier, mixed_recipe, pick
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.host.progress import Progress
from edgellama.model.schemes import check_recipe, module_shapes
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.targets import find_target
from edgellama.targets.sizes import planned_bytes
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import CONTEXT, provenance
from tests.helpers.tunings import SHORT

pytestmark = pytest.mark.slow

INT4, INT4_G64, INT8 = Scheme(4, PerGroup(32)), Scheme(4, PerGroup(64)), Scheme(8, PerChannel())
PARTS = (
    Part("model.layers.0.*", (Option(INT4_G64, 90, 0.5), Option(INT4, 100, 0.3), Option(INT8, 180, 0.01))),
    Part("model.layers.1.*", (Option(INT4_G64, 90, 0.2), Option(INT4, 100, 0.19), Option(INT8, 180, 0.0))),
    Part("model.layers.2.*", (Option(INT8, 180, 0.05), Option(INT4, 100, 0.02), Option(None, 720, 0.0))),
)
FIXED = 1000


def test_every_point_is_best_for_its_bytes() -> None:
    """No combination of at most as many bytes has a lower KL than the point."""
    points = frontier(PARTS, FIXED)
    combinations = [
        (FIXED + sum(o.bytes for o in c), sum(o.kl for o in c)) for c in product(*(p.options for p in PARTS))
    ]
    for point in points:
        assert (point.bytes, point.kl) == (
            FIXED + sum(o.bytes for o in point.chosen),
            sum(o.kl for o in point.chosen),
        )
        assert not any(b <= point.bytes and k < point.kl - 1e-12 for b, k in combinations)
    assert all(a.bytes < b.bytes and a.kl > b.kl for a, b in pairwise(points))
    slopes = [(a.kl - b.kl) / (b.bytes - a.bytes) for a, b in pairwise(points)]
    assert slopes == sorted(slopes, reverse=True)
    assert points[0].bytes == min(b for b, _ in combinations)
    assert points[-1].kl == pytest.approx(min(k for _, k in combinations))


def test_a_budget_picks_the_smallest_or_the_best() -> None:
    points = frontier(PARTS, FIXED)
    assert pick(points, None, 0.4).kl <= 0.4
    assert all(p.kl > 0.4 for p in points if p.bytes < pick(points, None, 0.4).bytes)
    best = pick(points, 1300, None)
    assert best.bytes <= 1300 and all(p.bytes > 1300 for p in points if p.kl < best.kl)
    with pytest.raises(CheckFailed, match=r"no choice .* at most 1300 bytes and a KL of 0\.01") as caught:
        pick(points, 1300, 0.01)
    assert f"KL {best.kl:.4f} with {best.bytes} bytes" in caught.value.message
    with pytest.raises(CheckFailed, match="1280 bytes"):
        pick(points, 1200, None)


def test_the_choice_becomes_rules_that_cover_everything(tiny_checkpoint: Checkpoint) -> None:
    parts = [Part(f"model.layers.{i}.*", PARTS[0].options) for i in range(4)]
    point = pick(frontier(parts, 0), None, 0.7)
    recipe = mixed_recipe(replace(RECIPES["auto"], algorithm="gptq"), parts, point)
    config = tiny_checkpoint.config
    schemes = check_recipe(recipe, module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    for part, option in zip(parts, point.chosen, strict=True):
        assert schemes[f"{part.modules[:-1]}mlp.up_proj"] == option.scheme
    assert schemes["lm_head"] == INT8


@pytest.fixture(scope="module")
def short_calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sets a cache of calibrations for this file and makes them short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("auto", "auto-best"):
            patch.setitem(RECIPES, name, replace(RECIPES[name], calibration_tokens=2048))
        yield


@pytest.fixture(scope="module")
def model_frontier(tiny_checkpoint: Checkpoint, short_calibrations: None) -> sensitivity.Frontier:
    """Frontier of the first two layers for target `xnnpack`."""
    return export.frontier(tiny_checkpoint.first_layers(2), context=CONTEXT)


def test_the_frontier_of_a_model(model_frontier: sensitivity.Frontier, tiny_checkpoint: Checkpoint) -> None:
    assert len(model_frontier.parts) == 4
    base = [next(o for o in part.options if o.scheme == INT4) for part in model_frontier.parts]
    for part, option in zip(model_frontier.parts, base, strict=True):
        kl = {o.scheme: o.kl for o in part.options}
        assert 0 == kl[None] < kl[INT8] < option.kl
        assert all(o.kl > option.kl for o in part.options if o.scheme == INT4_G64)
    assert [p.bytes for p in model_frontier.points] == sorted(p.bytes for p in model_frontier.points)


@pytest.mark.parametrize("target", ["xnnpack", "coreml", "onnx"])
def test_bytes_of_the_frontier_are_the_planned_bytes(
    target: str, model_frontier: sensitivity.Frontier, tiny_checkpoint: Checkpoint
) -> None:
    """The bytes include room for the graph around the weights."""
    checkpoint = tiny_checkpoint.first_layers(2)
    if target != "xnnpack":
        model_frontier = export.frontier(checkpoint, context=CONTEXT, targets=[target])
    storage = find_target(target).storage
    for point in (
        model_frontier.points[0],
        model_frontier.points[len(model_frontier.points) // 2],
        model_frontier.points[-1],
    ):
        recipe = mixed_recipe(model_frontier.recipe, model_frontier.parts, point)
        planned = planned_bytes(checkpoint.config, recipe, storage, CONTEXT)
        assert planned + storage.program_bytes(2) == point.bytes


@pytest.mark.parametrize(
    ("target", "recipe"),
    [
        ("xnnpack", RECIPES["int4-fast"]),
        ("coreml", RECIPES["int8-ane"]),
        ("onnx", replace(RECIPES["int4-fast"], onnx_form="portable")),
    ],
)
def test_the_graph_fits_into_its_reserve(
    target: str, recipe: Recipe, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The difference of two cuts is the graph of one layer, without the parts that a model has once."""
    chosen_target, sizes = find_target(target), []
    for layers in (1, 2):
        checkpoint = tiny_checkpoint.first_layers(layers)
        model, _ = quantized_llama(checkpoint, recipe, CONTEXT)
        path = chosen_target.artifact_in(tmp_path / str(layers))
        path.parent.mkdir(parents=True)
        lowering_for(chosen_target)(model, path, provenance(recipe), progress=Progress())
        planned = planned_bytes(checkpoint.config, recipe, chosen_target.storage, CONTEXT)
        sizes.append(chosen_target.describe(path, model)["bytes"] - planned)
    assert 0 < sizes[1] - sizes[0] <= chosen_target.storage.layer_program
    assert sizes[1] <= chosen_target.storage.program_bytes(2)


@pytest.mark.parametrize("name", ["auto", "auto-best"])
def test_a_budget_is_met_by_the_artifact(
    name: str,
    model_frontier: sensitivity.Frontier,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The budget holds for the bytes, and for the KL on unseen text, which the gate measures."""
    monkeypatch.setattr(quantize, "recover", lambda *a, **k: recover(*a, **k, tuning=SHORT))
    checkpoint = tiny_checkpoint.first_layers(2)
    middle = model_frontier.points[len(model_frontier.points) // 2]
    bundle = export.export(
        checkpoint,
        tmp_path / "bytes.edgellama",
        recipe=name,
        context=CONTEXT,
        max_bytes=middle.bytes,
    )
    (artifact,) = bundle.manifest["artifacts"]
    assert 0 <= middle.bytes - artifact["bytes"] <= find_target("xnnpack").storage.program_bytes(2)
    assert bundle.recipe.algorithm == {"auto": "gptq", "auto-best": "recover"}[name]
    assert len({rule.scheme for rule in bundle.recipe.rules if rule.modules.startswith("model.layers.")}) > 1
    if name == "auto":
        limit = 2 * middle.kl
        bundle = export.export(
            checkpoint, tmp_path / "kl.edgellama", recipe=name, context=CONTEXT, max_kl=limit
        )
        assert bundle.manifest["accuracy"]["xnnpack"]["kl_mean"] <= limit
        with pytest.raises(CheckFailed, match=r"no choice .* a KL of"):
            smallest = model_frontier.points[0]
            export.export(
                checkpoint,
                tmp_path / "none.edgellama",
                recipe=name,
                context=CONTEXT,
                max_kl=smallest.kl / 2,
                max_bytes=smallest.bytes,
            )
        assert not (tmp_path / "none.edgellama").exists()


def test_a_chosen_recipe_quantizes_as_it_says(
    model_frontier: sensitivity.Frontier, tiny_checkpoint: Checkpoint
) -> None:
    middle = model_frontier.points[len(model_frontier.points) // 2]
    recipe = replace(model_frontier.choose(middle.bytes, None), calibration_tokens=2048)
    with torch.no_grad():
        _, rows = quantized_llama(tiny_checkpoint.first_layers(2), recipe, CONTEXT)
    schemes = {row.name: row.scheme for row in rows}
    for part, option in zip(model_frontier.parts, middle.chosen, strict=True):
        name = part.modules.replace("*", "down_proj" if "mlp" in part.modules else "o_proj")
        assert schemes[f"{name}.weight"] == (option.scheme.describe() if option.scheme else "float32")


def test_a_missing_or_too_small_budget_is_refused_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["export", str(TINY), "-o", str(tmp_path / "out.edgellama"), "--context", "128", "-r", "auto"]
    assert main(common) == 2
    assert "none was given" in capsys.readouterr().err
    assert main([*common, "--max-bytes", "300KB"]) == 1
    error = capsys.readouterr().err
    assert "the smallest xnnpack artifact has" in error and "calibrate …" not in error
    assert list(tmp_path.iterdir()) == []


def test_auto_without_a_budget_is_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match="to a budget first"):
        quantized_llama(tiny_checkpoint, RECIPES["auto"], CONTEXT)


def test_groups_as_long_as_a_row_are_no_choice() -> None:
    assert sensitivity.fits(Scheme(4, PerGroup(64)), [128, 192])
    assert not sensitivity.fits(Scheme(4, PerGroup(128)), [128])
    assert not sensitivity.fits(Scheme(4, PerGroup(64)), [96])
    assert sensitivity.fits(None, [7]) and sensitivity.fits(INT8, [7])


def test_a_plan_is_printed_and_drawn(
    model_frontier: sensitivity.Frontier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(export, "frontier", lambda *_, **__: model_frontier)
    picture = tmp_path / "plan.svg"
    command = ["export", str(TINY), "--context", str(CONTEXT), "--plan", "--plan-plot", str(picture)]
    assert main(command) == 2
    assert "Add -r auto" in capsys.readouterr().err
    assert main([*command, "-r", "auto"]) == 0
    assert "int8 channel a8" in capsys.readouterr().out
    assert picture.read_text().count("<svg") == 1


def test_unused_rules_are_dropped() -> None:
    parts = [Part("model.layers.0.*", PARTS[0].options)]
    recipe = mixed_recipe(RECIPES["auto"], parts, frontier(parts, 0)[0])
    assert Rule("model.layers.*", INT4) not in recipe.rules
