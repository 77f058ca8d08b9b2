"""The same checkpoint and the same versions give the same bytes: every target, the gate's figures included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgellama.checkpoints import Checkpoint
from edgellama.files import file_sha256
from edgellama.recipe import RECIPES, Recipe
from edgellama.targets import TARGETS
from tests.helpers.tiny_models import write_hf

# Every target, both forms of ONNX, codes with and without calibration.
MADE: dict[Recipe, tuple[str, ...]] = {
    replace(RECIPES["int4"], name="calibrated", calibration_tokens=2048): tuple(TARGETS),
    replace(RECIPES["int4-fast"], name="rounded", onnx_form="portable"): ("onnx",),
}
# What must leave no trace: threads of torch, processors for the runtimes, the order of sets, the day, the place.
ELSEWHERE = (
    {"folder": "one", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "DAYS": "-2000"},
    {"folder": "two/deeper", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "2", "TZ": "UTC", "DAYS": "3000"},
)

# The system's clock, DAYS later; for Python and for native code.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += 86400L * atol(getenv("DAYS"));
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec; now->tv_usec = precise.tv_nsec / 1000;
    return result;
}
time_t time(time_t *to) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (to) *to = precise.tv_sec;
    return precise.tv_sec;
}
"""
# argv: how many processors are left to the process, then commands of edgellama, separated by `--`.
PROCESS = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
from itertools import groupby
from edgellama.cli.dispatch import main
for separator, command in groupby(sys.argv[2:], lambda argument: argument == "--"):
    if not separator and main(list(command)):
        sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors cannot be taken away here")
def test_two_exports_are_the_same_bytes(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """On a machine without a C compiler both run on the same day."""
    clock = {}
    if shutil.which("cc"):
        library = tmp_path / "clock.so"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=CLOCK.encode(), check=True)
        clock = {"LD_PRELOAD": str(library)}
    processes = [
        start(tmp_path / place["folder"], {**place, **clock}, tiny_checkpoint) for place in ELSEWHERE
    ]
    codes = [process.wait() for process in processes]
    one, other = (tmp_path / place["folder"] for place in ELSEWHERE)
    assert codes == [0, 0], (one / "log").read_text() + (other / "log").read_text()
    for recipe, targets in MADE.items():
        made, again = (hashes(folder / f"{recipe.name}.edgellama") for folder in (one, other))
        assert made == again
        assert {name.partition("/")[0] for name in made} >= {*targets, "golden", "reports", "tokenizer"}
        assert {f"reports/validate-{target}.json" for target in targets} <= set(made)
        for name in made:
            if name.endswith(".json") and "tokenizer" not in name and "generation" not in name:
                keys = list(json.loads((one / f"{recipe.name}.edgellama" / name).read_text(encoding="utf-8")))
                assert keys == sorted(keys), name


def start(folder: Path, environment: dict[str, str], checkpoint: Checkpoint) -> subprocess.Popen[bytes]:
    """A process that exports by all recipes, in `folder`."""
    folder.mkdir(parents=True)
    write_hf(checkpoint.first_layers(1), folder / "model")
    commands = []
    for recipe, targets in MADE.items():
        (folder / f"{recipe.name}.json").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        commands += ["--", "export", "model", "-o", f"{recipe.name}.edgellama", "-r", f"{recipe.name}.json"]
        commands += ["--context", "64", *(option for target in targets for option in ("-t", target))]
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(folder), "EDGELLAMA_CACHE": str(folder)}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, environment["OMP_NUM_THREADS"], *commands],
            cwd=folder,
            env={**os.environ, **environment, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def hashes(bundle: Path) -> dict[str, str]:
    """Hash of every file, by path in the bundle."""
    return {f.relative_to(bundle).as_posix(): file_sha256(f) for f in bundle.rglob("*") if f.is_file()}
