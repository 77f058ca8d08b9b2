"""False alarms of the gate: sound exports of random configurations, and every check that does not pass.

    python -m tests.benchmarks.gate_false_alarms --count 100 --seed 0
    python -m tests.benchmarks.gate_false_alarms --count 1 --seed 0 --first 17

Each configuration is a small Llama with random shape, biases, RoPE, vocabulary, context, recipe and targets
(tests/helpers/random_models.py). It is exported with the gate, and each target is validated again with its
reference. The limit of the KL is 100 nats, because random models lose much. All other limits are those of the
gate. A configuration that edgellama refuses before its slow part is drawn again. A refusal after that is an
alarm too. `-t` draws other configurations, of these targets alone. Prints a table of alarms; the exit code is 1 if there are any.

One process, about ten processor seconds for a configuration on average.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgellama.bundle import Bundle
from edgellama.checkpoints import Checkpoint
from edgellama.commands.export import export
from edgellama.commands.validate import validate
from edgellama.errors import EdgellamaError
from edgellama.export.plan import make_plan
from edgellama.report import Report
from edgellama.targets import TARGETS, find_target
from tests.helpers.random_models import Configuration, draw

MAX_KL = 100.0  # nats per token, the loosest limit that the gate accepts
TOKENS = 256  # scored in each run, the fewest that the gate accepts
ATTEMPTS = 50  # drawn for one configuration, until one is not refused


@dataclass(frozen=True)
class Alarm:
    """A check of a sound artifact that does not pass, or an error of its export or validation.

    Attributes:
        index: number of the configuration (`--first`).
        target: name of the target; empty for an error of the export.
        step: `export` or `validate`.
        check: name of the check, or of the error's class.
        detail: value, limit and detail of the check, or the message of the error.
    """

    index: int
    target: str
    step: str
    check: str
    detail: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="number of configurations (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all configurations (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first configuration (default: 0)")
    parser.add_argument("-t", "--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--json", type=Path, help="also write the alarms to this file")
    options = parser.parse_args(arguments)
    alarms: list[Alarm] = []
    for index in range(options.first, options.first + options.count):
        start = time.process_time()
        with tempfile.TemporaryDirectory(prefix="edgellama-") as folder:
            configuration, checkpoint = accepted(options.seed, index, options.targets, Path(folder))
            new = alarms_of(configuration, checkpoint, index, Path(folder) / "b.edgellama")
        alarms += new
        verdict = ", ".join(dict.fromkeys(alarm.check for alarm in new)) or "pass"
        print(f"{index:>4} {time.process_time() - start:6.1f} s  {configuration}  {verdict}", flush=True)
    print(table(alarms, options.seed, options.count, options.targets))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(alarm) for alarm in alarms], indent=1), encoding="utf-8")
    return 1 if alarms else 0


def accepted(seed: int, index: int, targets: Sequence[str], folder: Path) -> tuple[Configuration, Checkpoint]:
    """The first drawn configuration that edgellama accepts, and its checkpoint."""
    refusals = []
    for attempt in range(ATTEMPTS):
        configuration = draw(f"{seed} {index} {attempt}", tuple(targets))
        checkpoint = configuration.write(folder / str(attempt))
        chosen = [find_target(name) for name in configuration.targets]
        try:
            make_plan(checkpoint, configuration.recipe, chosen, configuration.context)
        except EdgellamaError as error:
            refusals.append(error.message)
            continue
        return configuration, checkpoint
    raise SystemExit(f"configuration {index}: {ATTEMPTS} drawn, all refused; the last: {refusals[-1]}")


def alarms_of(configuration: Configuration, checkpoint: Checkpoint, index: int, output: Path) -> list[Alarm]:
    """Exports a configuration with the gate, validates each target, and returns the alarms of both."""
    alarms: list[Alarm] = []

    def collect(bundle: Bundle, reports: Sequence[Report]) -> None:
        alarms.extend(failed_checks(index, "export", reports))

    try:
        bundle = export(
            checkpoint,
            output,
            targets=configuration.targets,
            recipe=configuration.recipe,
            context=configuration.context,
            max_kl=MAX_KL,
            validation_tokens=TOKENS,
            on_reports=collect,
        )
    except Exception as error:  # noqa: BLE001 - any error of a sound export is an alarm
        return alarms or [Alarm(index, "", "export", type(error).__name__, described(error))]
    for target in configuration.targets:
        try:
            report = validate(bundle, reference=checkpoint, target=target, tokens=TOKENS, max_kl=MAX_KL)
        except Exception as error:  # noqa: BLE001
            alarms.append(Alarm(index, target, "validate", type(error).__name__, described(error)))
        else:
            alarms += failed_checks(index, "validate", [report])
    return alarms


def failed_checks(index: int, step: str, reports: Sequence[Report]) -> list[Alarm]:
    return [
        Alarm(
            index,
            report.target,
            step,
            check.name,
            f"{check.value}, limit {check.limit}, {check.verdict} {check.detail}".strip(),
        )
        for report in reports
        for check in report.checks
        if check.verdict != "pass"
    ]


def described(error: Exception) -> str:
    """Message of an error; for one that is not edgellama's, also its place."""
    if isinstance(error, EdgellamaError):
        return error.message
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({Path(place.filename).name}:{place.lineno})"


def table(alarms: Sequence[Alarm], seed: int, count: int, targets: Sequence[str]) -> str:
    """Alarms as a table, with the command that repeats one configuration."""
    lines = [f"\n{len({alarm.index for alarm in alarms})} of {count} configurations raised an alarm"]
    if not alarms:
        return lines[0]
    width = max(len(alarm.check) for alarm in alarms)
    lines += [f"{'index':>5} {'target':<11} {'step':<8} {'check':<{width}} value"]
    lines += [
        f"{alarm.index:>5} {alarm.target:<11} {alarm.step:<8} {alarm.check:<{width}} {alarm.detail[:200]}"
        for alarm in alarms
    ]
    command = f"python -m tests.benchmarks.gate_false_alarms --seed {seed} --count 1 --first INDEX"
    return "\n".join([*lines, f"one alone: {command} -t {' '.join(targets)}"])


if __name__ == "__main__":
    sys.exit(main())
