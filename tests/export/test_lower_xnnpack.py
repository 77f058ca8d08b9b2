"""Lowering to a .pte: equal to upstream's, complete, for any length, and close to the torch model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor

from edgellama.checkpoints import Checkpoint
from edgellama.errors import BundleError, ContextLengthError, LoweringError, UsageError
from edgellama.export.plan import make_plan
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.export.xnnpack.blocks import blocks
from edgellama.export.xnnpack.lower import RunnerMethod, lower_to_xnnpack, traced
from edgellama.formats.pte import PteLinear, read_pte
from edgellama.gate import parity
from edgellama.gate.metrics import kl_divergence
from edgellama.host.log_filters import ignored_deprecations
from edgellama.host.progress import Progress
from edgellama.model.llama import Llama
from edgellama.model.quantized import codes_of
from edgellama.recipe import BUDGETED, GIVEN, RECIPES, PerChannel, PerGroup, Recipe, Rule, Scheme
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.runtimes.xnnpack import PteRuntime
from edgellama.targets import find_target
from edgellama.targets.xnnpack import interface
from edgellama.targets.xnnpack.describe import describe_artifact
from edgellama.targets.xnnpack.numerics import xnnpack_numerics
from edgellama.targets.xnnpack.structure import check_structure
from edgellama.text.windows import Window, default_texts, windows
from tests.helpers.tiny_models import CONTEXT, Cut, lower, provenance, random_checkpoint, weight_of

TOKENS = [(37 * i + 11) % 512 for i in range(CONTEXT)]

PROVENANCE = provenance(RECIPES["int4-fast"])
MakeCut = Callable[[int, str], Cut]


def failures(path: Path, model: Llama) -> dict[str, str]:
    """Name and detail of every structure check that does not pass."""
    return {c.name: c.detail for c in check_structure(path, model, PROVENANCE) if c.verdict != "pass"}


def lower_as_upstream(model: Llama) -> bytes:
    """Lowers the same modules with ExecuTorch's own decompositions, partitioner and preprocessing."""
    with ignored_deprecations(), torch.no_grad():
        edge = to_edge_transform_and_lower(
            traced(RunnerMethod(model, list(blocks(model)))),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        config = ExecutorchBackendConfig(
            extract_delegate_segments=True, memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)
        )
        return bytes(edge.to_executorch(config).buffer)


@pytest.mark.parametrize("recipe", ["int4-fast", "fp32"])
@pytest.mark.slow
def test_our_lowering_computes_the_same_bits_as_upstreams(recipe: str, cut: MakeCut, tmp_path: Path) -> None:
    lowered, path = cut(2, recipe), tmp_path / "upstream.pte"
    content = lower_as_upstream(lowered.model)
    path.write_bytes(content)
    ours, theirs = read_pte(lowered.path), read_pte(path)
    assert len(ours.linears) == 9
    assert sorted(ours.linears, key=shape_and_data) == sorted(theirs.linears, key=shape_and_data)
    # From memory: the norm weights that XNNPACK reads from a file are freed once the file is loaded.
    assert torch.equal(_PlainProgram(lowered.path)(TOKENS[:48]), _PlainProgram(content)(TOKENS[:48]))
    assert torch.equal(
        _PlainProgram(lowered.path).prefill(TOKENS[:48]), _PlainProgram(content).prefill(TOKENS[:48])
    )


def test_weights_that_wait_in_a_file_give_the_same_bytes(
    cut: MakeCut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, path = cut(1, "int4-fast"), tmp_path / "model.pte"
    monkeypatch.setattr("edgellama.export.xnnpack.spool.SMALL", 0)
    lower_to_xnnpack(lowered.model, path, PROVENANCE, progress=Progress())
    assert path.read_bytes() == lowered.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["model.pte"]


def shape_and_data(linear: PteLinear) -> tuple[tuple[int, int], bytes]:
    """Sort key of a linear: shape, then packed data."""
    return linear.shape, bytes(linear.data)


@pytest.mark.slow
def test_the_lowering_for_other_versions_passes_the_structure_checks(
    cut: MakeCut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, path = cut(1, "int4-fast"), tmp_path / "model.pte"
    monkeypatch.setattr("edgellama.host.executorch_versions.PROVEN", ("1.3.0",))
    lower_to_xnnpack(lowered.model, path, PROVENANCE, progress=Progress())
    assert failures(path, lowered.model) == {}
    logits, expected = _PlainProgram(path)(TOKENS[:16]), _PlainProgram(lowered.path)(TOKENS[:16])
    assert kl_divergence(expected, logits).max() < 1e-3
    monkeypatch.undo()
    assert "unknown operator" in failures(path, lowered.model)["structure.operators"]


class _PlainProgram:
    """Logits of a .pte in ExecuTorch. `PteRuntime` reads metadata that upstream's file lacks."""

    def __init__(self, program: Path | bytes) -> None:
        from edgellama.host import executorch_libraries

        self.program = executorch_libraries.runtime().load_program(program)
        self.method = self.program.load_method("forward")

    def __call__(self, tokens: list[int]) -> Tensor:
        rows = [
            self.method.execute([torch.tensor([[t]]), torch.tensor([i])])[0][0] for i, t in enumerate(tokens)
        ]
        return torch.stack(rows)

    def prefill(self, tokens: list[int]) -> Tensor:
        logits: Tensor = self.method.execute([torch.tensor([tokens]), torch.tensor([0])])[0]
        return logits


@pytest.mark.parametrize(
    "recipe", [n for n, r in RECIPES.items() if r.algorithm not in (*BUDGETED, GIVEN, "recover")]
)
def test_every_recipe_lowers_completely(recipe: str, cut: MakeCut) -> None:
    lowered = cut(1, recipe)
    assert failures(lowered.path, lowered.model) == {}
    pte = read_pte(lowered.path)
    assert len(pte.linears) == 5
    assert set(pte.backends) == {"XnnpackBackend"}
    kinds = {(linear.weight, linear.group_size, linear.int8_activations) for linear in pte.linears}
    assert (
        kinds
        == {
            "fp32": {("float32", None, False)},
            "int8": {("int8", None, True)},
            "int8-ane": {("int8", None, True)},
            "int4": {("int4", 32, True), ("int8", None, True)},
            "int4-fast": {("int4", 32, True), ("int8", None, True)},
        }[recipe]
    )


def test_methods_for_runners(cut: MakeCut) -> None:
    methods = read_pte(cut(1, "int4-fast").path).methods
    assert methods == {
        "forward": None,
        "get_max_seq_len": 128,
        "get_max_context_len": 128,
        "get_n_layers": 1,
        "get_vocab_size": 512,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_bos_id": 0,
        "get_eos_ids": [2, 0],
        "edgellama_manifest_sha256": "b" * 64,
    }


def test_calls_are_shorter_than_a_long_context(
    cut: MakeCut, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's buffers hold the longest call, and the runtime feeds a longer prompt in pieces."""
    whole = cut(1, "int4-fast")
    monkeypatch.setattr(interface, "LONGEST_CALL", 16)
    lowered = lower(tiny_checkpoint.first_layers(1), whole.recipe, tmp_path / "model.pte")
    assert failures(lowered.path, lowered.model) == {}
    pte, other = read_pte(lowered.path), read_pte(whole.path)
    assert (pte.methods["get_max_seq_len"], pte.methods["get_max_context_len"]) == (16, CONTEXT)
    (tokens, _) = describe_artifact(lowered.path, lowered.model)["inputs"]
    assert tokens["range"] == [1, 16]
    width = 3 * tiny_checkpoint.config.hidden_size  # q and residual, and k with v
    assert other.planned_bytes - pte.planned_bytes >= 4 * width * (CONTEXT - 16)
    with PteRuntime(lowered.path) as runtime, PteRuntime(whole.path) as at_once:
        kl = kl_divergence(
            torch.from_numpy(at_once.forward(TOKENS[:50]))[None],
            torch.from_numpy(runtime.forward(TOKENS[:50]))[None],
        )
        assert kl[0] < 1e-4 and runtime.position == 50
        with pytest.raises(BundleError, match="failed while running"):
            runtime._execute(TOKENS[:17], 0)
    monkeypatch.undo()
    assert list(failures(lowered.path, lowered.model)) == ["structure.metadata"]


def test_a_model_with_features_that_the_tiny_one_lacks(tmp_path: Path) -> None:
    """Biases, an untied head, as many key/value heads as query heads, stretched RoPE, no bos, one eos."""
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    changes = {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "rope_theta": None,
        "rope_parameters": llama3,
        "bos_token_id": None,
    }
    checkpoint = random_checkpoint(tmp_path / "model", changes)
    assert checkpoint.config.rope_scaling is not None
    lowered = lower(checkpoint, RECIPES["int4-fast"], tmp_path / "model.pte", context=64)
    assert failures(lowered.path, lowered.model) == {}
    pte = read_pte(lowered.path)
    assert [bool(linear.bias_data) for linear in pte.linears] == [True] * 4 + [False]
    assert "get_bos_id" not in pte.methods and pte.methods["get_eos_ids"] == 2
    window = Window("random", tuple(TOKENS[:64]), tuple(TOKENS[1:65]))
    with PteRuntime(lowered.path) as runtime:
        logits = parity.steps(runtime, window.tokens)
    assert logits.std() > 0.5
    compared, floor = parity.measure_parity(logits, lowered.exact_reference, window)
    assert compared.kl.mean() <= max(1e-5, 3 * floor.kl.mean())
    assert compared.kl[:8].mean() <= 1e-10


MIXED = Recipe(
    "mixed",
    "every kind of linear, side by side on the same input",
    (
        Rule("model.embed_tokens", None),
        Rule("lm_head", Scheme(4, PerGroup(64))),
        Rule("*.q_proj", Scheme(4, PerChannel())),
        Rule("*.k_proj", None),
        Rule("*.v_proj", Scheme(8, PerChannel())),
        Rule("*.gate_proj", Scheme(8, PerChannel())),
        Rule("*", Scheme(4, PerGroup(32))),
    ),
    max_kl=1.0,
    max_kl_small=1.0,
)


@pytest.mark.slow
def test_constants_that_the_file_aligns_are_read_without_padding(tmp_path: Path) -> None:
    """An int8 table of 513 x 72 bytes ends 8 bytes before the next multiple of 16."""
    checkpoint = random_checkpoint(tmp_path / "model", {"hidden_size": 72, "vocab_size": 513})
    lowered = lower(checkpoint, RECIPES["int8"], tmp_path / "model.pte", context=16)
    checks = check_structure(lowered.path, lowered.model, provenance(RECIPES["int8"]))
    assert [c for c in checks if c.verdict != "pass"] == []
    table = next(c for c in read_pte(lowered.path).constants if c.shape == (513, 72))
    assert len(table.data) == 513 * 72


def test_mixed_precision_lowers_completely(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    lowered = lower(tiny_checkpoint.first_layers(1), MIXED, tmp_path / "model.pte", context=32)
    assert failures(lowered.path, lowered.model) == {}
    logits = _reference(lowered.model, TOKENS[:32])
    with PteRuntime(lowered.path) as runtime:
        assert np.median(kl_divergence(logits, parity.steps(runtime, TOKENS[:32]))) <= 1e-5


@pytest.mark.slow
def test_layers_with_different_schemes_pass_the_structure_checks(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers have their own schemes, and one group is as long as its row. Only a removed norm fails."""
    int4, wide, row = (Scheme(4, PerGroup(size)) for size in (32, 64, 128))
    recipe = replace(
        RECIPES["int4-fast"],
        rules=(
            Rule("model.layers.1.self_attn.*", row),
            Rule("model.layers.0.mlp.gate_proj", row),
            Rule("model.layers.1.mlp.*", Scheme(8, PerChannel())),
            Rule("model.layers.2.mlp.up_proj", wide),
            Rule("model.layers.2.mlp.down_proj", None),
            Rule("model.layers.*", int4),
            *RECIPES["int4-fast"].rules[:2],
        ),
    )
    lowered = lower(tiny_checkpoint, recipe, tmp_path / "model.pte", context=32)
    assert failures(lowered.path, lowered.model) == {}
    gate = codes_of(lowered.model.get_submodule("model.layers.0.mlp.gate_proj"))
    assert gate is not None and gate.scheme == Scheme(4, PerChannel()) and gate.scales.shape[1] == 1
    logits = _reference(lowered.model, TOKENS[:32])
    with PteRuntime(lowered.path) as runtime:
        kl = kl_divergence(logits, parity.steps(runtime, TOKENS[:32]))
    # Equal until the first rounding that flips, and close after it. Its position depends on the processor.
    assert np.quantile(kl, 0.05) <= 1e-10 and np.median(kl) <= 2e-4 and kl.max() <= 1e-3
    plain = lower(tiny_checkpoint, RECIPES["int4-fast"], tmp_path / "plain.pte", context=32)
    pte = read_pte(plain.path)
    graph = json.loads(pte.graphs[2])
    graph["xnodes"].pop()
    broken = replace(pte, graphs=(*pte.graphs[:2], json.dumps(graph, sort_keys=True), *pte.graphs[3:]))
    monkeypatch.setattr("edgellama.targets.xnnpack.structure.read_pte", lambda path: broken)
    assert list(failures(plain.path, plain.model)) == ["structure.graphs"]


@torch.inference_mode()
def _reference(model: Llama, tokens: list[int]) -> Tensor:
    with xnnpack_numerics(model):
        return ReferenceRuntime(model).forward_all(tokens)


def test_prompts_of_every_length_up_to_the_context(cut: MakeCut) -> None:
    lowered = cut(1, "fp32")  # no int8 activations, so every length agrees to float32 rounding
    expected = _reference(lowered.model, TOKENS)
    with PteRuntime(lowered.path) as runtime:
        for length in range(1, CONTEXT + 1):
            runtime.reset()
            logits = torch.from_numpy(runtime.forward(TOKENS[:length]))
            torch.testing.assert_close(
                logits, expected[length - 1], rtol=0, atol=1e-4, msg=f"{length} tokens"
            )
            assert runtime.position == length
        with pytest.raises(ContextLengthError, match="128 tokens in the KV cache and 1 more"):
            runtime.forward([1])
        runtime.reset()
        with pytest.raises(ContextLengthError, match="0 tokens in the KV cache and 129 more"):
            runtime.forward([*TOKENS, 1])
        assert runtime.position == 0
        runtime.forward(TOKENS[:100])
        with pytest.raises(ContextLengthError):
            runtime.forward(TOKENS[:29])
        runtime.forward(TOKENS[100:])
        assert runtime.position == CONTEXT


def test_logits_stay_as_they_were_when_more_tokens_are_fed(cut: MakeCut) -> None:
    with PteRuntime(cut(1, "int4-fast").path) as runtime:
        logits = runtime.forward([5, 6, 7])
        kept = logits.copy()
        runtime.forward([8])
        assert np.array_equal(logits, kept)


@pytest.mark.parametrize("tokens", [[], [512], [3, -1]])
def test_empty_prompts_and_unknown_tokens_are_refused(tokens: list[int], cut: MakeCut) -> None:
    with PteRuntime(cut(1, "int4-fast").path) as runtime, pytest.raises(UsageError):
        runtime.forward(tokens)


@pytest.mark.parametrize("context", [8])
def test_the_smallest_contexts(context: int, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    lowered = lower(tiny_checkpoint.first_layers(1), RECIPES["fp32"], tmp_path / "model.pte", context=context)
    expected = _reference(lowered.model, TOKENS[:context])
    with PteRuntime(lowered.path) as runtime:
        torch.testing.assert_close(parity.steps(runtime, TOKENS[:context]), expected, rtol=0, atol=1e-4)
        runtime.reset()
        last = torch.from_numpy(runtime.forward(TOKENS[:context]))
    torch.testing.assert_close(last, expected[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("context", [1, 2, 7, 513])
def test_contexts_that_cannot_be_lowered_are_refused(context: int, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match=f"a context of {context} tokens .* 8 to 512"):
        make_plan(tiny_checkpoint, RECIPES["fp32"], [find_target("xnnpack")], context)


def test_the_model_that_was_lowered_is_left_as_it_was(cut: MakeCut) -> None:
    lowered = cut(1, "int4-fast")
    fresh, _ = quantized_llama(lowered.checkpoint, lowered.recipe, CONTEXT)
    assert repr(lowered.model) == repr(fresh)
    with torch.no_grad():
        assert torch.equal(lowered.model(torch.tensor([TOKENS[:9]])), fresh(torch.tensor([TOKENS[:9]])))


def test_a_weight_zero_point_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, _ = quantized_llama(tiny_checkpoint.first_layers(1), RECIPES["int4-fast"], 16)
    weight_of(model, "model.layers.0.mlp.up_proj").zero_point[3, 1] = 1
    with pytest.raises(LoweringError, match=r"structure\.zero_points: .*model\.layers\.0\.mlp\.up_proj"):
        lower_to_xnnpack(model, tmp_path / "model.pte", PROVENANCE, progress=Progress())
    assert not (tmp_path / "model.pte").exists()


@pytest.mark.parametrize("content", [b"", b"not a pte at all, but long enough", b"\0\0\0\0ET12" + bytes(100)])
def test_a_file_that_is_no_pte_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="ExecuTorch cannot load it"):
        PteRuntime(path)
    with pytest.raises(BundleError, match="not a readable"):
        read_pte(path)
    with pytest.raises(BundleError, match="no such file"):
        PteRuntime(tmp_path / "nowhere.pte")


def text_windows(checkpoint: Checkpoint, count: int) -> list[Window]:
    """First windows of the evaluation texts, CONTEXT tokens each."""
    return list(islice(windows(default_texts(), checkpoint.tokenizer, CONTEXT), count))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("recipe", ["int4-fast", "int8"])
@pytest.mark.slow
def test_a_cut_matches_the_quantized_model(layers: int, recipe: str, cut: MakeCut) -> None:
    """Most windows agree to float32 rounding. In a few, an int8 rounding flips and moves the later positions.

    Attention causes the flips: only its order of sums differs. The first token of a text attends to itself
    alone, so it gives the same bits. Measured over 12 windows of 128 tokens: mean KL below 1e-6 with one
    layer and 5e-6 with two, a tenth of the noise floor. Windows without a flip have 1e-14.
    """
    lowered = cut(layers, recipe)
    expected = lowered.exact_reference
    means, floors, first = [], [], []
    with PteRuntime(lowered.path) as runtime:
        for window in text_windows(lowered.checkpoint, 12):
            compared, floor = parity.measure_parity(parity.steps(runtime, window.tokens), expected, window)
            means.append(compared.kl.mean())
            floors.append(floor.kl.mean())
            first.append(compared.kl[:8].mean())
    assert np.mean(means) <= 1e-5
    assert np.median(means) <= 1e-6
    assert np.mean(first) <= 1e-4
    assert np.median(first) <= 1e-10
    assert min(means) <= 1e-12
    # The gate's limit lies above these means, and far below the KL of any fault.
    assert np.mean(means) < np.mean(floors) < 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("recipe", ["int4-fast", "int8"])
def test_the_first_token_gives_the_same_bits(recipe: str, cut: MakeCut) -> None:
    lowered = cut(2, recipe)
    with PteRuntime(lowered.path) as runtime, xnnpack_numerics(lowered.model):
        reference = ReferenceRuntime(lowered.model)
        for token in range(0, 512, 8):
            runtime.reset()
            reference.reset()
            assert np.array_equal(runtime.forward([token]), reference.forward([token])), token


@pytest.mark.parametrize("layers", [1, 2])
def test_a_float_cut_matches_the_checkpoint(layers: int, cut: MakeCut) -> None:
    lowered = cut(layers, "fp32")
    with PteRuntime(lowered.path) as runtime:
        for window in text_windows(lowered.checkpoint, 6):
            expected = _reference(lowered.model, list(window.tokens))
            assert kl_divergence(expected, parity.steps(runtime, window.tokens)).max() <= 1e-8


def test_a_model_runs_while_torch_has_one_thread(cut: MakeCut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention uses torch's BLAS, whose order of sums depends on its threads (executorch_libraries)."""
    runtime, thread_counts = PteRuntime(cut(1, "int4-fast").path), []
    method = runtime._method

    def execute(inputs: Any) -> Any:
        thread_counts.append(torch.get_num_threads())
        return method.execute(inputs)

    monkeypatch.setattr(runtime, "_method", SimpleNamespace(execute=execute))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runtime.forward(TOKENS[:3])
        assert (thread_counts, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)
