"""False alarms about device logs: perturbed runs of a bundle's artifacts, judged as logs of phones.

    python -m tests.benchmarks.device_noise model.edgellama [TARGET ...]

The noise is normal, heavy-tailed, of low rank, a temperature, or half precision, of many sizes. Other artifacts of the
bundle stand for kernels that round in other ways. Prints each alarm, and the share of the allowed spread of the KL to
the reference that the worst log needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from edgellama.bundle import Bundle
from edgellama.bundle.golden import REFERENCE, Rows, read_golden
from edgellama.gate import limits
from edgellama.gate.device import judge
from edgellama.gate.possible_kl import Pair
from tests.helpers.device_logs import device_log, logits_of

SIZES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2)  # of the standard deviation of the logits
SEEDS = 3
# Parity and the device's own verdict may fail: large noise is a fault.
NOISY = ("device.parity_kl", "device.parity_kl_sequence", "device.verdict")


def perturbed(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """Logits of other kernels, float32 [P, vocab_size], by name."""
    yield "same bits", rows
    yield "half precision", rows.astype(np.float16).astype(np.float32)
    draw, spread, (count, vocab) = np.random.default_rng(0), rows.std(), rows.shape
    for size in SIZES:
        for _ in range(SEEDS):
            normal = draw.normal(size=rows.shape)
            heavy = np.exp(2 * draw.normal(size=(count, 1))).clip(0, 8)
            low_rank = draw.normal(size=(count, 4)) @ draw.normal(size=(4, vocab)) / 2
            tails = draw.standard_t(3, size=rows.shape).clip(-20, 20)
            for name, noise in (
                ("normal", spread * normal),
                ("heavy positions", spread * heavy * normal),
                ("heavy tails", spread * tails),
                ("low rank", spread * low_rank),
                ("temperature", rows * draw.normal(size=(count, 1))),
            ):
                yield f"{name} {size:g}", (rows + size * noise).astype(np.float32)


def main(path: str, *names: str) -> int:
    """Judges every perturbed run. Returns the number of false alarms."""
    bundle = Bundle.open(path)
    golden, targets = read_golden(bundle), names or bundle.targets
    logits = {name: np.concatenate(logits_of(bundle, name, golden.sequences)) for name in targets}
    spans = [golden.rows(i) for i in range(len(golden.sequences))]
    logs = alarms = 0
    worst = 0.0
    for target in targets:
        others = [(f"the artifact {name}", rows) for name, rows in logits.items() if name != target]
        reference, host = golden.expected[REFERENCE], golden.expected[target]
        pairs = [Pair.of(reference, host, i) for i in range(len(host.rest))]
        for name, rows in [*perturbed(logits[target]), *others]:
            log = device_log(bundle, target, [rows[span] for span in spans])
            failed = [c for c in judge(bundle, golden, log) if c.verdict == "fail" and c.name not in NOISY]
            logs, alarms = logs + 1, alarms + bool(failed)
            for alarm in failed:
                print(f"{target}, {name}: {alarm.name} {alarm.detail}")
            for pair, kl, parity in zip(pairs, reference.kl(rows), host.kl(rows), strict=True):
                needed = kl - pair.kl - limits.DEVICE_HIDDEN_NATS * pair.hidden - limits.DEVICE_KL_ZERO
                if parity > 0:
                    worst = max(worst, needed / pair.spread(float(parity)))
    print(f"{logs} logs, {alarms} false alarms; at most {worst:.0%} of the allowed spread")
    return alarms


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
