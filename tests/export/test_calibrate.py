"""Calibrated quantization of tiny models: lower objectives, folds without effect, repeatable codes."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgellama import data
from edgellama.bundle.restore import code_hashes
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.cli.dispatch import main
from edgellama.errors import RecipeError, TextError, UsageError
from edgellama.export.plan import make_plan
from edgellama.export.quantization import calibrate, second_moments
from edgellama.export.quantization.awq import choose_fold, fold, shared_channels
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.gptq import Inputs, damped, gptq, objective
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.export.quantization.scale_search import weighted_scales
from edgellama.host import cache
from edgellama.host.progress import Progress
from edgellama.host.threads import workers
from edgellama.model.layer_pass import groups
from edgellama.model.layerwise import SHARED_INPUTS
from edgellama.model.llama import DecoderLayer, Llama
from edgellama.model.quantized import Codes, check_codes
from edgellama.recipe import RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.targets import find_target
from edgellama.text.calibration import MIN_TOKENS, Calibration, calibrate_on, calibration_texts
from edgellama.text.windows import Text
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import CONTEXT, random_checkpoint

INT4, INT4_G64, INT8 = Scheme(4, PerGroup(32)), Scheme(4, PerGroup(64)), Scheme(8, PerChannel())
RECIPE = replace(RECIPES["int4"], calibration_tokens=MIN_TOKENS)


def inputs(columns: int, seed: int = 0) -> Inputs:
    """Second moments of correlated inputs: some far larger than others, one always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.2 + torch.diag(
        torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    )
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    x[:, 3] = 0
    return Inputs(damped(x.T @ x / len(x)))


def test_feedback_is_the_triangle_that_factors_the_second_moment() -> None:
    moments = inputs(64)
    order, upper = moments.order, moments.feedback.double()
    ordered = moments.hessian[order][:, order].double()
    assert torch.equal(upper, upper.triu()) and torch.equal(upper.diag(), torch.ones(64).double())
    middle = torch.linalg.solve_triangular(upper, ordered, upper=True)
    middle = torch.linalg.solve_triangular(upper.T, middle, upper=False, left=False)
    torch.testing.assert_close(middle, middle.diag().diag(), rtol=0, atol=1e-4)


def test_second_moments_are_summed_over_groups_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "EDGE", 4)
    x = torch.randn(30, 10, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(second_moments, "groups", partial(groups, tokens=16))
    with workers() as pool:
        moment = second_moments.second_moment(x.split(7), pool)
    torch.testing.assert_close(moment, x.T @ x / 30)


def test_codes_of_a_weight_are_joined_from_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "FEWEST_ROWS", 16)
    monkeypatch.setattr(calibrate, "PIECE", 1)
    weights, moments = weight().split([25, 15]), inputs(128)
    with workers() as pool:
        joined = calibrate._chosen(weights, moments, INT4, calibrate.METHODS["gptq"], pool)
    assert [len(codes.values) for codes in joined] == [25, 15]
    pieces = [gptq(piece, moments, INT4).dequantize() for piece in weight().split(16)]
    assert torch.equal(torch.cat([codes.dequantize() for codes in joined]), torch.cat(pieces))


def weight(rows: int = 40, columns: int = 128) -> Tensor:
    """Normal weight with a row and a group of zeros."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05
    w[5] = 0
    w[7, :32] = 0
    return w


@pytest.mark.parametrize("scheme", [INT4, INT4_G64, INT8], ids=Scheme.describe)
def test_gptq_loses_less_than_rounding_in_every_row(scheme: Scheme) -> None:
    w, moments = weight(), inputs(128)
    codes = gptq(w, moments, scheme)
    check_codes("w", codes)
    loss = objective(w, codes, moments.hessian)
    for rounded in (round_to_grid(w, scheme), weighted_scales(w, moments.hessian.diag(), scheme)):
        assert bool((loss <= objective(w, rounded, moments.hessian)).all())
    assert float(loss.sum()) < 0.7 * float(objective(w, round_to_grid(w, scheme), moments.hessian).sum())
    assert not codes.dequantize()[5].any()


def test_weighted_scales_lose_less_in_weighted_columns() -> None:
    w, moments = weight(), inputs(128)
    squares = moments.hessian.diag().float()

    def loss(codes: Codes) -> float:
        return float(((codes.dequantize() - w).square() * squares).sum())

    codes = weighted_scales(w, squares, INT4)
    check_codes("w", codes)
    assert loss(codes) < 0.95 * loss(round_to_grid(w, INT4))


def test_a_weight_that_is_on_the_grid_stays_as_it_is() -> None:
    exact = round_to_grid(weight(), INT4).dequantize()
    torch.testing.assert_close(gptq(exact, inputs(128), INT4).dequantize(), exact, rtol=0, atol=1e-6)


def test_rounding_is_kept_if_gptq_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harmful descent leaves the weighted rounding."""

    def worse(w: Tensor, codes: Codes, hessian: Tensor) -> tuple[Codes, Tensor]:
        zeros = Codes(torch.zeros_like(codes.values), codes.scales, codes.scheme)
        return zeros, objective(w, zeros, hessian)

    monkeypatch.setattr("edgellama.export.quantization.gptq._descend", worse)
    w, moments = weight(), inputs(128)
    weighted = weighted_scales(w, moments.hessian.diag(), INT4)
    loss = objective(w, gptq(w, moments, INT4), moments.hessian)
    assert bool((loss <= objective(w, weighted, moments.hessian)).all())


@pytest.mark.parametrize("biases", [False, True])
def test_folding_keeps_the_function(biases: bool, tmp_path: Path) -> None:
    changes = {"attention_bias": biases, "mlp_bias": biases}
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    model, folded = load_llama(checkpoint, 32), load_llama(checkpoint, 32)
    for parameter in folded.parameters():
        parameter.data = parameter.data.clone()
    layer = folded.model.layers[0]
    assert isinstance(layer, DecoderLayer)
    for number, reading in enumerate(SHARED_INPUTS):
        shared = shared_channels(reading, folded.config)
        w = torch.cat([layer.get_submodule(n).get_parameter("weight") for n in reading.linears])
        # The second moments weight some channels far more than others. Otherwise no scale would be chosen.
        with workers() as pool:
            scale = choose_fold(w, inputs(w.shape[1], seed=number).hessian, INT4, shared, pool)
        assert float(scale.max() / scale.min()) > 1.1
        fold(layer, reading, scale, shared)
    tokens = torch.arange(24)[None]
    torch.testing.assert_close(folded(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(folded.get_parameter(name), model.get_parameter(name))


@pytest.fixture(scope="module")
def two_layer_checkpoint(tiny_checkpoint: Checkpoint) -> Checkpoint:
    return tiny_checkpoint.first_layers(2)


def quantized(
    checkpoint: Checkpoint, recipe: Recipe = RECIPE, *, texts: list[Text] | None = None, **options: object
) -> Llama:
    """Model that `recipe` calibrates on `texts`, by default the packaged ones."""
    calibration = calibrate_on(texts or calibration_texts(), checkpoint.tokenizer, MIN_TOKENS, CONTEXT)
    return quantized_llama(checkpoint, recipe, CONTEXT, calibrated_on=calibration, **options)[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def calibrated_model(two_layer_checkpoint: Checkpoint) -> Llama:
    return quantized(two_layer_checkpoint)


def test_neither_threads_nor_the_order_of_the_texts_change_a_code(
    two_layer_checkpoint: Checkpoint, calibrated_model: Llama
) -> None:
    threads = torch.get_num_threads()
    texts = [Text(f"renamed {text.name}", text.content) for text in reversed(calibration_texts())]
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = quantized(two_layer_checkpoint, texts=texts)
        assert torch.get_num_threads() == (1 if threads > 1 else 2)
    finally:
        torch.set_num_threads(threads)
    assert code_hashes(other) == code_hashes(calibrated_model)
    for (name, first), (_, second) in zip(
        calibrated_model.named_parameters(), other.named_parameters(), strict=True
    ):
        if first.dim() == 1:
            assert torch.equal(first, second), name


def test_the_calibrated_model_is_nearer_to_the_full_one(
    two_layer_checkpoint: Checkpoint, calibrated_model: Llama
) -> None:
    """On unseen text, GPTQ beats weighted scales, and these beat rounding."""
    full = load_llama(two_layer_checkpoint, CONTEXT)
    text = data.read_text(data.EVALUATION[0])[:3000]
    tokens = torch.tensor(two_layer_checkpoint.tokenizer.encode(text)[:CONTEXT])[None]
    reference = full(tokens).log_softmax(-1)

    def kl(model: Llama) -> float:
        log_probabilities = model(tokens).log_softmax(-1)
        return float((reference.exp() * (reference - log_probabilities)).sum(-1).mean())

    rounded, _ = quantized_llama(two_layer_checkpoint, RECIPES["int4-fast"], CONTEXT)
    scales = quantized(two_layer_checkpoint, replace(RECIPE, algorithm="scales"))
    assert kl(calibrated_model) < 0.85 * kl(scales) < 0.85 * kl(rounded)


def test_an_interrupted_calibration_goes_on_where_it_stopped(
    two_layer_checkpoint: Checkpoint, calibrated_model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    calibration = calibrate_on(calibration_texts(), two_layer_checkpoint.tokenizer, MIN_TOKENS, CONTEXT)
    store = LayerStore.of(two_layer_checkpoint, RECIPE, calibration)
    done: list[int] = []
    quantize_layer = calibrate._quantize_layer

    def interrupted(model: Llama, index: int, *rest: object) -> object:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(index)
        return quantize_layer(model, index, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_quantize_layer", interrupted)
        progress = Progress(io.StringIO())
        with pytest.raises(KeyboardInterrupt), store.named_on_interrupt(2, progress):
            quantized(two_layer_checkpoint, store=store)
    assert f"1 of 2 calibrated layers are kept in {store.directory}" in progress.stream.getvalue()  # type: ignore[union-attr]
    done.clear()
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_quantize_layer", interrupted)
        resumed = quantized(two_layer_checkpoint, store=store)
    assert done == [1]
    assert code_hashes(resumed) == code_hashes(calibrated_model)
    assert store.directory is not None and store.directory.is_dir()
    (store.directory / "1.safetensors").write_bytes(b"damaged")
    assert code_hashes(quantized(two_layer_checkpoint, store=store)) == code_hashes(calibrated_model)
    assert sorted(path.name for path in store.directory.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_each_calibration_has_its_own_store(
    two_layer_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "somewhere")
    calibration = calibrate_on(calibration_texts(), two_layer_checkpoint.tokenizer, MIN_TOKENS, CONTEXT)
    other_calibration = calibrate_on(
        calibration_texts()[:1], two_layer_checkpoint.tokenizer, MIN_TOKENS, CONTEXT
    )
    stores = [
        LayerStore.of(two_layer_checkpoint, RECIPE, calibration),
        LayerStore.of(two_layer_checkpoint, RECIPE, other_calibration),
        LayerStore.of(two_layer_checkpoint, replace(RECIPE, algorithm="scales"), calibration),
        LayerStore.of(
            replace(two_layer_checkpoint, read=lambda name: two_layer_checkpoint.read(name) * 1.5),
            RECIPE,
            calibration,
        ),
    ]
    assert len({store.directory for store in stores}) == 4
    assert LayerStore.of(two_layer_checkpoint, RECIPE, calibration).directory == stores[0].directory
    portable = replace(RECIPE, name="portable", onnx_form="portable", max_kl=1.0)  # the same codes
    assert LayerStore.of(two_layer_checkpoint, portable, calibration).directory == stores[0].directory


def test_mixed_schemes_and_floats_are_calibrated_as_the_recipe_says(two_layer_checkpoint: Checkpoint) -> None:
    rules = (
        Rule("model.layers.0.self_attn.q_proj", INT8),
        Rule("model.layers.1.mlp.*", None),
        Rule("model.layers.0.mlp.down_proj", None),
        *RECIPE.rules,
    )
    model = quantized(two_layer_checkpoint, replace(RECIPE, rules=rules))
    hashes = code_hashes(model)
    assert "model.layers.0.self_attn.q_proj" in hashes and "model.layers.0.mlp.up_proj" in hashes
    assert not any(name.startswith("model.layers.1.mlp") for name in hashes)
    assert "model.layers.0.mlp.down_proj" not in hashes


def test_windows_do_not_depend_on_order_or_names_of_texts(tiny_checkpoint: Checkpoint) -> None:
    texts = calibration_texts()
    calibration = calibrate_on(texts, tiny_checkpoint.tokenizer, 3000, 128)
    reversed_calibration = calibrate_on(texts[::-1], tiny_checkpoint.tokenizer, 3000, 128)
    assert calibration == reversed_calibration
    assert calibration.tokens == 24 * 128
    assert not set(calibration.windows) & set(calibration.held_out)
    assert calibration.to_dict()["sha256"] == calibration.sha256
    assert calibration.sha256 != replace(calibration, windows=calibration.windows[1:]).sha256


def _file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"a few words only", "fewer than"),
        (b"some words " * 300, "at least 2048 are needed"),
        ("Grüße ".encode("latin-1") * 4000, "not UTF-8"),
    ],
    ids=["empty", "blank", "short", "too short", "encoding"],
)
def test_unusable_text_is_refused_before_anything_slow(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = _file(tmp_path, content), tmp_path / "out.edgellama"
    options = ["--context", "128", "--calibration", str(text), "-o", str(output)]
    assert main(["export", str(TINY), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "calibrate …" not in error
    assert not output.exists()


def test_the_evaluation_text_is_refused_for_calibration(tiny_checkpoint: Checkpoint) -> None:
    content = "Our own first line.\n" + data.read_text(data.EVALUATION[0])[5000:60000]
    with pytest.raises(TextError, match=r"shares \d+ long lines"):
        calibrate_on([Text("ours", content)], tiny_checkpoint.tokenizer, MIN_TOKENS, 128)


def test_text_for_an_uncalibrated_recipe_is_refused(tiny_checkpoint: Checkpoint) -> None:
    target = find_target("xnnpack")
    with pytest.raises(UsageError, match="reads none"):
        make_plan(tiny_checkpoint, RECIPES["int4-fast"], [target], 128, calibration_texts())
    assert make_plan(tiny_checkpoint, RECIPES["int4-fast"], [target], 128).calibration is None
    plan = make_plan(tiny_checkpoint, RECIPES["int4"], [target], 128)
    assert isinstance(plan.calibration, Calibration)


@pytest.mark.parametrize(("algorithm", "tokens"), [("round", 4096), ("gptq", 0), ("gptq", -1)])
def test_tokens_belong_to_calibrated_algorithms(algorithm: str, tokens: int) -> None:
    with pytest.raises(RecipeError, match="calibration_tokens"):
        replace(RECIPES["int4"], algorithm=algorithm, calibration_tokens=tokens)


def test_a_recipe_without_calibration_tokens_is_read_as_before() -> None:
    data = RECIPES["int4-fast"].to_dict()
    del data["calibration_tokens"]
    assert Recipe.from_dict(data) == RECIPES["int4-fast"]


def test_progress_of_a_log(two_layer_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = calibrate_on(calibration_texts(), two_layer_checkpoint.tokenizer, MIN_TOKENS, CONTEXT)
    quantized_llama(
        two_layer_checkpoint.first_layers(1), RECIPE, CONTEXT, Progress(sys.stderr), calibrated_on=calibration
    )
    assert "calibrated layer 1 of 1" in capsys.readouterr().err
