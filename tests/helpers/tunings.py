"""Short tunings of recovery (distillation), for tests on the tiny model."""

from __future__ import annotations

from dataclasses import replace

from edgellama.export.quantization.distillation import Tuning

QUICK = Tuning(steps=24, batch=4, rounds=3, sampled=8, rate=4e-3, warm_up=2)
SHORT = replace(QUICK, steps=4, batch=2, rounds=2, sampled=2)
