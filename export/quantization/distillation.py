"""Recovery by self-distillation: tunes the quantized model, with frozen codes, to the full-precision one.

Trains scales and norm weights (distilled_model.py) to lower the KL to the full-precision model. The training
text is calibration text and text sampled from the full-precision model, as in LLM-QAT's "data-free"
calibration. The KL on held-out calibration text is measured after every round, and the model with the lowest
KL is kept. That is the initial model if no round improves it.

One thread computes each window, and gradients are added in order, so the number of threads changes no bit. A
GPU is used if torch sees one; it rounds differently. Of the full-precision model, only the last hidden states
and the lm_head stay in memory.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellama.checkpoints import Checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.errors import RecipeError
from edgellama.export.quantization.calibration_cache import LayerStore
from edgellama.export.quantization.distilled_model import apply_tuned, stateless, tunable, tuned_values
from edgellama.export.quantization.generated_text import BATCH, sampled
from edgellama.host.memory import free_memory
from edgellama.host.progress import Progress
from edgellama.host.threads import Workers, workers
from edgellama.model.config import LlamaConfig
from edgellama.model.llama import Llama
from edgellama.text.calibration import LENGTH, Calibration

Run = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]


@dataclass(frozen=True)
class Tuning:
    """Training schedule of a recovery.

    steps: optimizer steps of `batch` windows each.
    rounds: measurements of the held-out KL.
    sampled: windows of text sampled from the full-precision model.
    rate: Adam's learning rate, for relative changes of scales and norm weights.
    warm_up: steps until the full rate.
    """

    steps: int = 96
    batch: int = 4
    rounds: int = 6
    sampled: int = 32
    rate: float = 1e-3
    warm_up: int = 8


TUNING = Tuning()


@dataclass
class _Text:
    """Windows of tokens, with the full-precision model's last hidden states after the final norm.

    tokens: int64 [T]. states: float32 [T, hidden_size].
    """

    tokens: list[Tensor]
    states: list[Tensor]

    def to(self, device: torch.device) -> _Text:
        return _Text([t.to(device) for t in self.tokens], [s.to(device) for s in self.states])


@dataclass
class _Best:
    """Best model so far.

    kl: its KL on held-out text.
    first: KL of the initial model.
    step: number of its steps; 0 for the initial model.
    tuned: its scales and norm weights, by module; empty for the initial model.
    """

    kl: float
    first: float
    step: int = 0
    tuned: dict[str, Tensor] = field(default_factory=dict)

    def describe(self) -> str:
        if not self.step:
            return f"nothing better than KL {self.kl:.4f} was found; the model stays as calibrated"
        return f"KL on held-out text {self.first:.4f} -> {self.kl:.4f}, of step {self.step}"


def needed_bytes(config: LlamaConfig) -> int:
    """Peak memory of a recovery in bytes, the larger of its two phases.

    Sampling holds the float model, and KV caches for each thread. Training holds the quantized model, and
    activations of one window for each thread.
    """
    threads = torch.get_num_threads()
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = LENGTH * (24 * hidden + 10 * inner + 3 * LENGTH * config.num_attention_heads)
    window = 4 * (config.num_hidden_layers * layer + 6 * LENGTH * config.vocab_size)
    cache = 8 * BATCH * LENGTH * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    head = 4 * config.vocab_size * hidden  # of the full-precision model
    return max(4 * config.parameters + threads * cache, 3 * config.parameters // 2 + head + threads * window)


def check_memory(config: LlamaConfig) -> None:
    """Raises RecipeError, before any slow step, if a recovery does not fit into free memory."""
    needed, free = needed_bytes(config), free_memory()
    if free is not None and needed > free:
        raise RecipeError(
            f"recovery: tuning this model takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
            remedy="Use recipe int4, which keeps one layer in memory, or a machine with more.",
        )


@torch.no_grad()
def recover(
    model: Llama,
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    store: LayerStore,
    progress: Progress,
    tuning: Tuning = TUNING,
) -> None:
    """Tunes a calibrated `model` in place. The model is unchanged if the held-out KL does not improve.

    Args:
        model: the calibrated model.
        checkpoint: its full-precision checkpoint, with the same rotation.
        calibration: text to train on, and held-out text.
        store: cache of the calibration. The state of the run is saved in it, so that it can be resumed.
        progress: reports to the user.
        tuning: training schedule.
    """
    held_out, training = _split(calibration)
    key = hashlib.sha256(repr((asdict(tuning), held_out, training)).encode()).hexdigest()
    saved = _Saved(store, key, progress)
    best = saved.finished(tuning.steps) or _recovered(
        model, checkpoint, held_out, training, saved, progress, tuning
    )
    progress.say(f"recovery: {best.describe()}")
    apply_tuned(model, best.tuned)


def _recovered(
    model: Llama,
    checkpoint: Checkpoint,
    held: list[tuple[int, ...]],
    used: list[tuple[int, ...]],
    saved: _Saved,
    progress: Progress,
    tuning: Tuning,
) -> _Best:
    """Samples text, reads all windows with the full-precision model, and trains."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with workers() as pool:
        full = load_llama(checkpoint, len(held[0]))
        progress.say("recovery: sampling text from the full-precision model")
        generated = sampled(full, used, tuning.sampled, len(held[0]), pool)
        progress.say(
            f"recovery: {len(used)} windows of calibration text, {len(generated)} sampled, "
            f"{len(held)} held out"
        )
        training = _spread([*used, *generated], tuning.steps * tuning.batch)
        held_out_text, training_text = (_read(full, windows, pool).to(device) for windows in (held, training))
        head = full.lm_head.weight.detach().to(device)
        del full
        run: Run = pool.map if device.type == "cpu" else map
        with tunable(model) as parameters:
            model.to(device)
            best = _tune(model, parameters, training_text, held_out_text, head, run, saved, progress, tuning)
        model.to("cpu")
    return best


def _split(calibration: Calibration) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(held-out windows, training windows).

    A short text has no unused windows. Then about a quarter or less is held out, although the codes were
    calibrated on it.
    """
    held_out = list(calibration.held_out)
    windows = list(calibration.windows)
    if not set(held_out) & set(windows):
        return held_out, windows
    held_out = windows[:: max(4, len(windows) // len(held_out))]
    return held_out, [w for w in windows if w not in set(held_out)]


def _read(full: Llama, windows: Sequence[tuple[int, ...]], pool: Workers) -> _Text:
    """Windows with the hidden states of the full-precision model."""
    tokens = [torch.tensor(window) for window in windows]
    with stateless(full):
        return _Text(tokens, list(pool.map(lambda t: full.model.norm(full.model(t[None], 0))[0], tokens)))


def _tune(
    model: Llama,
    parameters: dict[str, nn.Parameter],
    read: _Text,
    judged: _Text,
    head: Tensor,
    run: Run,
    saved: _Saved,
    progress: Progress,
    tuning: Tuning,
) -> _Best:
    """Trains all rounds, or the rest of them after an interruption.

    Args:
        model: the quantized model with tunable modules.
        parameters: tunable parameters by name.
        read: text to train on.
        judged: held-out text.
        head: lm_head of the full-precision model, float32 [vocab_size, hidden_size].
        run: maps a function over window indices, in order.
        saved: state of the run on disk.
        progress: reports to the user.
        tuning: training schedule.
    """
    trained = list(parameters.values())
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.95), eps=1e-12)

    def window_gradients(index: int) -> tuple[float, tuple[Tensor, ...]]:
        tokens, states = read.tokens[index], read.states[index]
        with torch.enable_grad():
            logits = model(tokens[None])[0]
        loss, slope = _kl(F.linear(states, head), logits.detach())
        return loss, torch.autograd.grad(logits, trained, slope)

    def held_out_kl() -> float:
        def window_kl(index: int) -> float:
            logits = model(judged.tokens[index][None])[0]
            return _kl(F.linear(judged.states[index], head), logits)[0]

        return sum(run(window_kl, range(len(judged.tokens)))) / len(judged.tokens)

    resumed = saved.load(parameters, optimizer)
    if resumed is None:
        start_kl = held_out_kl()
        resumed = 0, _Best(start_kl, start_kl)
    start, best = resumed
    with progress.bar("recover", tuning.steps, "step") as bar:
        bar.update(start)
        for step in range(start, tuning.steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, tuning)
            optimizer.zero_grad()
            total = 0.0
            for loss, gradients in run(window_gradients, _batch(step, len(read.tokens), tuning)):
                total += loss
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            optimizer.step()
            bar.update(1)
            if (step + 1) % max(1, tuning.steps // tuning.rounds) == 0 or step + 1 == tuning.steps:
                kl = held_out_kl()
                if kl < best.kl:
                    best = _Best(kl, best.first, step + 1, tuned_values(model))
                saved.save(step + 1, parameters, optimizer, best)
                progress.tick(
                    f"recovery: step {step + 1} of {tuning.steps}, KL {total / tuning.batch:.4f} on its training text, "
                    f"{kl:.4f} held out"
                )
    return best


_HASH = 32  # bytes of SHA-256, before the content of the file


class _Saved:
    """Checkpoint of a training run, in its calibration's directory. Write errors end the saving."""

    def __init__(self, store: LayerStore, key: str, progress: Progress) -> None:
        self.path = store.directory and store.directory / "recovery.pt"
        self.key = hashlib.sha256(f"{store.key} {key}".encode()).hexdigest()
        self.store = store
        self.progress = progress

    def save(
        self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Adam, best: _Best
    ) -> None:
        if self.path is None:
            return
        state = {
            "key": self.key,
            "step": step,
            "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
            "optimizer": optimizer.state_dict(),
            "best": (best.kl, best.first, best.step, best.tuned),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            content = io.BytesIO()
            torch.save(state, content)
            partial.write_bytes(hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())
            partial.rename(self.path)
        except OSError:
            self.path = None

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Adam
    ) -> tuple[int, _Best] | None:
        """Restores parameters and optimizer. Returns (next step, best so far), or None if not usable."""
        state = self._state()
        if state is None:
            return None
        for name, parameter in parameters.items():
            parameter.data.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], _Best(*state["best"])

    def finished(self, steps: int) -> _Best | None:
        """Result of a finished run of `steps` steps. None if it is not finished."""
        state = self._state()
        return _Best(*state["best"]) if state is not None and state["step"] == steps else None

    def _state(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            content = self.path.read_bytes()
            if hashlib.sha256(content[_HASH:]).digest() != content[:_HASH]:
                raise ValueError("its content does not have the hash that it was saved with")
            state: dict[str, Any] = torch.load(
                io.BytesIO(content[_HASH:]), map_location="cpu", weights_only=True
            )
            if state["key"] != self.key:
                raise ValueError("it belongs to another checkpoint, text, recipe or version")
            return state
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError) as error:
            self.progress.say(f"note: the cached run is not used, it starts again ({error})")
            self.store.reject(self.path)
            return None


def _kl(reference: Tensor, logits: Tensor) -> tuple[float, Tensor]:
    """Mean KL of a window in nats, and its gradient with respect to the logits [T, vocab_size]."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    weights = p.exp()
    loss = float((weights * (p - q)).sum(-1).mean())
    return loss, (q.exp_() - weights) / len(logits)


def _rate(step: int, tuning: Tuning) -> float:
    """Adam's learning rate: linear warm-up, then cosine decay to a twentieth."""
    warm = min(1.0, (step + 1) / tuning.warm_up)
    return tuning.rate * warm * (0.525 + 0.475 * math.cos(math.pi * step / tuning.steps))


def _spread(windows: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """At most `count` windows, evenly spaced."""
    return windows if len(windows) <= count else [windows[i * len(windows) // count] for i in range(count)]


def _batch(step: int, count: int, tuning: Tuning) -> list[int]:
    """Indices of a step's windows. Each epoch goes through all windows in its own random order."""
    indices = []
    for position in range(step * tuning.batch, (step + 1) * tuning.batch):
        epoch, index = divmod(position, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        indices.append(int(order[index]))
    return indices
