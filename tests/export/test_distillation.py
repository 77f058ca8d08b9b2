"""Recovery (distillation) of the tiny model: closer to full precision on unseen text, or unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgellama import data
from edgellama.bundle.restore import code_hashes, quantized_modules, restored_llama
from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.cli.dispatch import main
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.export.quantization import distillation, quantize
from edgellama.export.quantization.calibrate import calibrated_llama
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.distillation import Tuning, recover
from edgellama.export.quantization.distilled_model import TunedLinear, tunable
from edgellama.export.quantization.generated_text import sampled
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.quantization.round_to_nearest import round_to_grid
from edgellama.host.progress import Progress
from edgellama.host.threads import workers
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.model.quantized import check_codes
from edgellama.recipe import RECIPES, PerGroup, Scheme
from edgellama.targets import find_target
from edgellama.targets.xnnpack.numerics import xnnpack_numerics
from edgellama.text.calibration import Calibration, calibrate_on, calibration_texts
from tests.helpers.paths import TINY
from tests.helpers.tiny_models import CONTEXT
from tests.helpers.tunings import QUICK, SHORT

pytestmark = pytest.mark.slow

TOKENS = 3072
RECIPE = replace(RECIPES["int4-best"], name="short", calibration_tokens=TOKENS)


@pytest.fixture(scope="module")
def two_layer_checkpoint(tiny_checkpoint: Checkpoint) -> Checkpoint:
    return tiny_checkpoint.first_layers(2)


@pytest.fixture(scope="module")
def calibration(two_layer_checkpoint: Checkpoint) -> Calibration:
    return calibrate_on(calibration_texts(), two_layer_checkpoint.tokenizer, TOKENS, CONTEXT)


@pytest.fixture(scope="module")
def make_calibrated(
    two_layer_checkpoint: Checkpoint, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Llama]:
    """Makes a new calibrated model at each call. Its layers are calibrated once."""
    store = LayerStore(tmp_path_factory.mktemp("layers"))

    def new_model() -> Llama:
        return calibrated_llama(
            two_layer_checkpoint, RECIPE, CONTEXT, calibration, store=store, progress=Progress()
        )[0]

    return new_model


@pytest.fixture
def make_recovered(
    two_layer_checkpoint: Checkpoint, calibration: Calibration, make_calibrated: Callable[[], Llama]
) -> Callable[[Tuning, LayerStore], Llama]:
    """Makes a new recovered model at each call."""

    def run(tuning: Tuning, store: LayerStore) -> Llama:
        model = make_calibrated()
        recover(model, two_layer_checkpoint, calibration, store=store, progress=Progress(), tuning=tuning)
        return model

    return run


MakeRecovered = Callable[[Tuning, LayerStore], Llama]


@torch.no_grad()
def kl(checkpoint: Checkpoint, model: Llama) -> float:
    """Mean KL to the full-precision model on evaluation text, with the artifact's arithmetic."""
    ids = checkpoint.tokenizer.encode(data.read_text(data.EVALUATION[0])[:20000])
    full, total = load_llama(checkpoint, CONTEXT), 0.0
    with xnnpack_numerics(model):
        for i in range(8):
            tokens = torch.tensor(ids[i * CONTEXT : (i + 1) * CONTEXT])[None]
            p, q = full(tokens).log_softmax(-1), model(tokens).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean()) / 8
    return total


def norms(model: Llama) -> list[torch.Tensor]:
    """Norm weights: the parameters of one dimension."""
    return [p for p in model.parameters() if p.dim() == 1]


def same(first: Llama, second: Llama) -> bool:
    """True for equal codes, scales and norm weights."""
    return code_hashes(first) == code_hashes(second) and all(map(torch.equal, norms(first), norms(second)))


def test_the_tuned_model_is_nearer_and_its_codes_are_the_same(
    two_layer_checkpoint: Checkpoint, make_calibrated: Callable[[], Llama], make_recovered: MakeRecovered
) -> None:
    before, after = make_calibrated(), make_recovered(QUICK, LayerStore())
    assert kl(two_layer_checkpoint, after) < 0.95 * kl(two_layer_checkpoint, before)
    moved = 0
    for (name, old), (_, new) in zip(quantized_modules(before), quantized_modules(after), strict=True):
        check_codes(name, new)
        assert torch.equal(old.values, new.values), name
        moved += not torch.equal(old.scales, new.scales)
        if name in ("lm_head", "model.embed_tokens"):
            assert torch.equal(old.scales, new.scales), name
    assert moved == 14


def test_neither_threads_nor_an_interruption_change_a_bit(
    make_recovered: MakeRecovered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    uninterrupted = make_recovered(SHORT, LayerStore())
    save, saved = distillation._Saved.save, []

    def interrupted(self: distillation._Saved, step: int, *rest: object) -> None:
        save(self, step, *rest)  # type: ignore[arg-type]
        saved.append(step)
        if saved == [2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(distillation._Saved, "save", interrupted)
    store = LayerStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make_recovered(SHORT, store)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        resumed = make_recovered(SHORT, store)
    finally:
        torch.set_num_threads(threads)
    assert saved == [2, 4]
    assert same(resumed, uninterrupted)
    make_recovered(replace(SHORT, rate=1e-3), store)  # the saved state belongs to another tuning
    assert saved == [2, 4, 2, 4]
    (tmp_path / "recovery.pt").write_bytes(b"damaged")
    assert same(make_recovered(SHORT, store), uninterrupted)


def test_a_model_without_improvement_stays_unchanged(
    make_calibrated: Callable[[], Llama], make_recovered: MakeRecovered
) -> None:
    assert same(make_recovered(replace(SHORT, rate=0.5), LayerStore()), make_calibrated())


def test_a_tunable_model_computes_as_the_artifact_does(make_calibrated: Callable[[], Llama]) -> None:
    model, tokens = make_calibrated(), torch.arange(40)[None] + 60
    with torch.no_grad():
        with xnnpack_numerics(model):
            expected = model(tokens)
        with tunable(model) as parameters:
            assert sum(isinstance(m, TunedLinear) for m in model.modules()) == 15
            assert len(parameters) == 14 + 5
            actual = model(tokens)
    assert float((actual.log_softmax(-1) - expected.log_softmax(-1)).abs().mean()) < 2e-3


def test_gradients_of_scales_are_those_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = round_to_grid(torch.randn(6, 64, generator=generator), Scheme(4, PerGroup(32), False))
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    linear = TunedLinear(codes, None, tuned=True)
    assert linear.scale_change is not None
    slope = torch.randn(5, 6, generator=generator)
    actual = torch.autograd.grad(linear(x), (x, linear.scale_change), slope)
    change = torch.zeros_like(codes.scales, requires_grad=True)
    weight = codes.values.float().reshape(6, 2, 32) * (codes.scales * (1 + change))[..., None]
    expected = torch.autograd.grad(x @ weight.reshape(6, 64).T, (x, change), slope)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_the_model_writes_the_same_text_with_any_number_of_threads(
    two_layer_checkpoint: Checkpoint, calibration: Calibration
) -> None:
    full, threads = load_llama(two_layer_checkpoint, 32), torch.get_num_threads()
    with workers() as pool:
        texts = sampled(full, calibration.windows, 20, 24, pool)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        with workers() as pool:
            repeated = sampled(full, calibration.windows, 20, 24, pool)
    finally:
        torch.set_num_threads(threads)
    assert texts == repeated and len(set(texts)) == 20
    assert {len(text) for text in texts} == {24}
    assert {text[:8] for text in texts} <= {window[:8] for window in calibration.windows}
    # The model finds its own text likelier than the same tokens in another order.
    ids = torch.tensor(texts)
    mixed = ids[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))]

    def mean_log_likelihood(tokens: torch.Tensor) -> float:
        rows = [full(row[None]).log_softmax(-1)[0, :-1].gather(1, row[1:, None]) for row in tokens]
        return float(torch.stack(rows).mean())

    with torch.no_grad():
        assert mean_log_likelihood(ids) > mean_log_likelihood(mixed) + 0.5


def test_held_out_text_is_not_tuned_on(calibration: Calibration) -> None:
    held_out, tuned_on = distillation._split(calibration)
    assert held_out == list(calibration.held_out) and tuned_on == list(calibration.windows)
    short = replace(calibration, held_out=calibration.windows[:8])
    held_out, tuned_on = distillation._split(short)
    assert not set(held_out) & set(tuned_on) and sorted((*held_out, *tuned_on)) == sorted(calibration.windows)
    assert len(tuned_on) >= 2 * len(held_out)


def test_a_bundle_of_int4_best_is_restored_and_validated(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quantize, "recover", lambda *a, **k: recover(*a, **k, tuning=SHORT))
    checkpoint = tiny_checkpoint.first_layers(1)
    bundle = export(checkpoint, tmp_path / "best.edgellama", recipe=RECIPE, context=CONTEXT, max_kl=5)
    restored = restored_llama(bundle, find_target("xnnpack"))
    repeated, _ = quantized_llama(checkpoint, RECIPE, CONTEXT)
    assert same(restored, repeated)
    report = validate(bundle, reference=checkpoint, target="xnnpack", tokens=1024, max_kl=5)
    assert report.verdict == "pass", report.to_text()


def test_a_model_beyond_free_memory_is_refused_before_the_slow_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distillation, "free_memory", lambda: 10_000_000)
    output = tmp_path / "out.edgellama"
    assert main(["export", str(TINY), "-r", "int4-best", "--context", "128", "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert "GB are free" in error and "calibrate …" not in error
    assert not output.exists()


def test_memory_of_a_recovery_grows_with_the_model(tiny_checkpoint: Checkpoint) -> None:
    small = tiny_checkpoint.config
    large: LlamaConfig = replace(small, num_hidden_layers=16, hidden_size=2048, intermediate_size=8192)
    assert distillation.needed_bytes(small) < 1e9 < distillation.needed_bytes(large)
