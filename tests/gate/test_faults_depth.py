"""Planted faults at depth and in calls of certain lengths. Each must fail the check that is named for it.

The file on disk is sound, so the structure passes. Its runtime misbehaves, or a torch model with the target's
arithmetic and one fault takes its place, as if a compiler or a kernel had made the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.commands import validate_phases
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.gate.references import QuantizedReference
from edgellama.model import layer_pass
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import DecoderLayer, KVCache, Llama, rope_tables
from edgellama.runtimes.base import Logits, Runtime
from edgellama.runtimes.load import load
from edgellama.runtimes.reference import ReferenceRuntime
from edgellama.targets import find_target
from tests.helpers.one_layer_bundle import Sound

pytestmark = pytest.mark.slow

CONTEXT = 512


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    checkpoint = tiny_checkpoint.first_layers(2)
    output = tmp_path_factory.mktemp("depth") / "sound.edgellama"
    targets = ("xnnpack", "onnx", "coreml")
    bundle = export(checkpoint, output, recipe="int4-fast", context=CONTEXT, targets=targets, validate=False)
    return Sound(checkpoint, bundle)


def failed(sound: Sound, target: str, **options: Any) -> dict[str, str]:
    """Name and detail of the checks that do not pass. The KL's limit is too high to matter.

    The file is sound, so it is not lowered again.
    """
    report = validate(
        sound.bundle,
        reference=sound.checkpoint,
        target=target,
        tokens=512,
        max_kl=100.0,
        relower=False,
        **options,
    )
    return {c.name: c.detail for c in report.checks if c.verdict != "pass"}


@pytest.mark.parametrize("target", ["xnnpack", "onnx", "coreml"])
def test_the_sound_bundle_passes(target: str, sound: Sound) -> None:
    assert failed(sound, target) == {}
    report = validate(sound.bundle, target=target)
    assert {c.verdict for c in report.checks} == {"pass"}


# Faults of calls. `call(tokens, position)` runs the sound artifact.
Call = Callable[[Sequence[int], int], Logits]
CallFault = Callable[[Call, Sequence[int], int], Logits]


def loses_its_last(low: int, high: int) -> CallFault:
    def fault(call: Call, tokens: Sequence[int], position: int) -> Logits:
        return call(tokens[:-1] if low <= len(tokens) <= high and position == 0 else tokens, position)

    return fault


def loses_its_first(low: int, high: int) -> CallFault:
    def fault(call: Call, tokens: Sequence[int], position: int) -> Logits:
        return call(tokens[1:] if low <= len(tokens) <= high and position == 0 else tokens, position)

    return fault


def loses_its_middle(call: Call, tokens: Sequence[int], position: int) -> Logits:
    if 128 <= len(tokens) <= 256 and position == 0:
        tokens = [*tokens[:60], *tokens[61:]]
    return call(tokens, position)


def written_early(least: int) -> CallFault:
    def fault(call: Call, tokens: Sequence[int], position: int) -> Logits:
        return call(tokens, position - 1 if position and len(tokens) >= least else position)

    return fault


def row_before_the_last(call: Call, tokens: Sequence[int], position: int) -> Logits:
    if len(tokens) <= 256:
        return call(tokens, position)
    row = call(tokens[:-1], position).copy()
    call(tokens[-1:], position + len(tokens) - 1)
    return row


def earlier_row_of_pieces(call: Call, tokens: Sequence[int], position: int) -> Logits:
    if not position or len(tokens) != 10:
        return call(tokens, position)
    row = call(tokens[:-1], position).copy()
    call(tokens[-1:], position + len(tokens) - 1)
    return row


def last_key_lost(low: int, high: int) -> CallFault:
    """The call's own row is right. Its last token is another one in the KV cache."""

    def fault(call: Call, tokens: Sequence[int], position: int) -> Logits:
        row = call(tokens, position).copy()
        if low <= len(tokens) <= high:
            call([7], position + len(tokens) - 1)
        return row

    return fault


def first_key_lost_at_an_odd_offset(call: Call, tokens: Sequence[int], position: int) -> Logits:
    row = call(tokens, position).copy()
    if position % 2 and len(tokens) == 128:
        call([7, 8], position)
    return row


def starts_over(call: Call, tokens: Sequence[int], position: int) -> Logits:
    return call(tokens, 0 if position and len(tokens) == 100 else position)


def loses_a_token(length: int) -> CallFault:
    def fault(call: Call, tokens: Sequence[int], position: int) -> Logits:
        return call(tokens[:-1] if len(tokens) == length else tokens, position)

    return fault


def frozen_steps(call: Call, tokens: Sequence[int], position: int) -> Logits:
    """Single steps from position 300 on are computed at position 299."""
    return call(tokens, min(position, 299) if len(tokens) == 1 else position)


def beyond_half_another_token(call: Call, tokens: Sequence[int], position: int) -> Logits:
    return call([5] if len(tokens) == 1 and position >= CONTEXT - 20 else tokens, position)


def later_pieces_lose_a_token(call: Call, tokens: Sequence[int], position: int) -> Logits:
    return call(tokens[:-1] if position >= 256 and len(tokens) > 1 else tokens, position)


@pytest.mark.parametrize(
    ("target", "fault", "check"),
    [
        pytest.param(*case[1:], id=case[0])
        for case in (
            ("prompts of 65 to 110 lose their last token", "xnnpack", loses_its_last(65, 110), "consistency.prefill_decode"),
            ("prompts of 65 to 110 lose their last token, ONNX", "onnx", loses_its_last(65, 110), "consistency.prefill_decode"),
            ("prompts of 65 to 110 lose their last token, Core ML", "coreml", loses_its_last(65, 110), "consistency.prefill_decode"),
            ("prompts of 120 to 127 lose their first token", "xnnpack", loses_its_first(120, 127), "consistency.after_calls"),
            ("prompts of 128 to 256 lose token 60", "onnx", loses_its_middle, "consistency.after_calls"),
            ("later pieces of 64 and more are written early", "xnnpack", written_early(64), "consistency.after_calls"),
            ("later pieces of 64 and more are written early, Core ML", "coreml", written_early(64), "consistency.chunked_prefill"),
            ("later pieces of 128 are written early", "onnx", written_early(128), "consistency.after_calls"),
            ("calls of 257 and more give the row before the last", "xnnpack", row_before_the_last, "consistency.prefill_decode"),
            ("prompts of 100 to 128 leave a wrong last key", "xnnpack", last_key_lost(100, 128), "consistency.after_calls"),
            ("calls of 129 leave a wrong last key", "onnx", last_key_lost(129, 129), "consistency.after_calls"),
            ("pieces of 128 at odd offsets leave a wrong first key", "xnnpack", first_key_lost_at_an_odd_offset, "parity.kl_long"),
            ("pieces of 100 start over", "coreml", starts_over, "consistency.after_calls"),
            ("later pieces of 10 give the row before the last", "xnnpack", earlier_row_of_pieces, "consistency.chunked_prefill"),
            ("a prompt of the context less one loses a token", "xnnpack", loses_a_token(CONTEXT - 1), "consistency.last_position"),
            ("a prompt as long as the context loses a token", "onnx", loses_a_token(CONTEXT), "consistency.last_position"),
            ("steps beyond position 300 stay there", "xnnpack", frozen_steps, "parity.kl_long"),
            ("the last twenty steps read another token", "onnx", beyond_half_another_token, "parity.kl_long"),
            ("pieces beyond position 256 lose a token", "xnnpack", later_pieces_lose_a_token, "parity.depths"),
        )
    ],
)  # fmt: skip
def test_a_fault_of_calls(
    target: str, fault: CallFault, check: str, sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, sound, target, fault)
    failures = failed(sound, target)
    assert check in failures, failures
    assert not [name for name in failures if name.startswith("structure.")], "the file is sound"


def plant(monkeypatch: pytest.MonkeyPatch, sound: Sound, target: str, fault: CallFault) -> None:
    """Makes the runtime of the target compute with the fault."""
    with load(sound.bundle, target) as runtime:
        kind = type(runtime)
    forward = kind._forward

    def faulty(self: Runtime, tokens: Sequence[int], position: int) -> Logits:
        return fault(lambda fed, start: forward(self, fed, start), list(tokens), position)

    monkeypatch.setattr(kind, "_forward", faulty)


# Faults of the model at depth.
Damage = Callable[[Llama], None]


# These compare with the rows that the artifact itself gave at export. A model that stands in gives others.
GOLDEN_ROWS = {"golden.accuracy", "golden.xnnpack", "golden.onnx", "golden.coreml"}


def rope_frozen(position: int) -> Damage:
    def damage(model: Llama) -> None:
        model.model.cos[position:] = model.model.cos[position - 1]
        model.model.sin[position:] = model.model.sin[position - 1]

    return damage


def rope_restarts(model: Llama) -> None:
    model.model.cos[256:] = model.model.cos[:256].clone()
    model.model.sin[256:] = model.model.sin[:256].clone()


class MaskedCache(nn.Module):
    """Attention that sees only what `visible(query, key)` allows besides the causal mask."""

    def __init__(self, source: KVCache, visible: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.source, self.visible = source, visible

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        end = position + q.shape[1]
        self.source.k_cache[:, position:end], self.source.v_cache[:, position:end] = k, v
        rows, columns = torch.arange(position, end)[:, None], torch.arange(end)[None]
        groups = q.shape[2] // k.shape[2]
        keys, values = (
            x[:, :end].repeat_interleave(groups, dim=2).transpose(1, 2)
            for x in (self.source.k_cache, self.source.v_cache)
        )
        mask = (columns <= rows) & self.visible(rows, columns)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
        return y.transpose(1, 2)


def masked(visible: Callable[[Tensor, Tensor], Tensor]) -> Damage:
    def damage(model: Llama) -> None:
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            cache = layer.self_attn.cache
            assert isinstance(cache, KVCache)
            layer.self_attn.cache = MaskedCache(cache, visible)

    return damage


def with_layer(index: int, wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Damage:
    """Replaces the output of a layer by `wrong(positions, input, output)`."""

    def damage(model: Llama) -> None:
        layer = model.model.layers[index]
        forward = layer.forward

        def damaged(x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
            positions = torch.arange(position, position + x.shape[1])[None, :, None]
            return wrong(positions, x, forward(x, cos, sin, position))

        layer.forward = damaged

    return damage


def skipped_from(position: int) -> Damage:
    return with_layer(1, lambda at, x, y: torch.where(at >= position, x, y))


def louder_from(position: int) -> Damage:
    return with_layer(0, lambda at, x, y: torch.where(at >= position, 1.3 * y, y))


@contextmanager
def standing_in(sound: Sound, target: str, damage: Damage) -> Iterator[None]:
    """Context in which a damaged torch model with the target's arithmetic runs instead of the artifact."""
    recipe = sound.bundle.recipe
    model, _ = quantized_llama(sound.checkpoint, recipe, CONTEXT)
    damage(model)
    with ExitStack() as stack:
        stack.enter_context(find_target(target).arithmetic(model, recipe))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(validate_phases, "load", lambda bundle, name: ReferenceRuntime(model))
        yield


@pytest.mark.parametrize(
    ("target", "damage", "check"),
    [
        pytest.param(*case[1:], id=case[0])
        for case in (
            ("RoPE frozen from position 255 on", "xnnpack", rope_frozen(255), "parity.kl_long"),
            ("RoPE frozen from position 255 on, ONNX", "onnx", rope_frozen(255), "parity.kl_long"),
            ("RoPE frozen from position 255 on, Core ML", "coreml", rope_frozen(255), "parity.kl_long"),
            ("RoPE starts over at position 256", "xnnpack", rope_restarts, "parity.kl_long"),
            ("attention sees 256 positions", "xnnpack", masked(lambda q, k: k > q - 256), "parity.kl_long"),
            ("attention sees 256 positions, Core ML", "coreml", masked(lambda q, k: k > q - 256), "parity.kl_long_typical"),
            ("the key at position 300 is hidden", "xnnpack", masked(lambda q, k: (k != 300) | (q <= 300)), "parity.kl_long_typical"),
            ("the first 128 keys are hidden beyond position 256", "onnx", masked(lambda q, k: (k >= 128) | (q <= 256)), "parity.kl_long_typical"),
            ("the keys from 256 to 287 are hidden", "xnnpack", masked(lambda q, k: (k // 32 != 8) | (q < 290)), "parity.kl_long_typical"),
            ("a layer is skipped beyond position 300", "xnnpack", skipped_from(300), "parity.kl_long"),
            ("a layer is skipped beyond position 300, ONNX", "onnx", skipped_from(300), "parity.kl_long"),
            ("a layer is louder beyond position 400", "coreml", louder_from(400), "parity.kl_long_typical"),
            ("a layer is skipped at the last eight positions", "xnnpack", skipped_from(CONTEXT - 8), "parity.depths"),
        )
    ],
)  # fmt: skip
def test_a_fault_at_depth(target: str, damage: Damage, check: str, sound: Sound) -> None:
    with standing_in(sound, target, damage):
        failures = failed(sound, target)
    assert check in failures, failures
    assert "parity.kl" not in failures, "short windows do not reach the fault"


def test_a_sound_model_standing_in_passes(sound: Sound) -> None:
    for target in ("xnnpack", "onnx", "coreml"):
        with standing_in(sound, target, lambda model: None):
            assert {*failed(sound, target)} <= GOLDEN_ROWS


def test_a_fault_of_both_the_artifact_and_the_quantized_model(
    sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RoPE is frozen in both, so they agree. The full-precision model alone shows it."""
    tables = rope_tables

    def frozen(config: LlamaConfig, length: int) -> tuple[Tensor, ...]:
        return tuple(table[torch.arange(length).clamp_max(256)] for table in tables(config, length))

    read_ahead = QuantizedReference.read_ahead

    def with_frozen_rope(self: QuantizedReference, *arguments: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_pass, "rope_tables", frozen)
            read_ahead(self, *arguments, **options)

    monkeypatch.setattr(QuantizedReference, "read_ahead", with_frozen_rope)
    with standing_in(sound, "coreml", rope_frozen(257)):
        assert {*failed(sound, "coreml")} - GOLDEN_ROWS == {"quality.kl_long"}


@pytest.mark.parametrize("target", ["xnnpack", "onnx"])
def test_faults_of_calls_need_no_reference(
    target: str, sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, sound, target, loses_its_last(65, 110))
    report = validate(sound.bundle, target=target)
    assert "consistency.prefill_decode" in {c.name for c in report.checks if c.verdict == "fail"}
