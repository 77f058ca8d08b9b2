"""Tests of reproducibility: equal checkpoints and versions give equal bytes for every target, reports included."""

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
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import write_hf

pytestmark = pytest.mark.slow

# Every target, both forms of ONNX, codes with and without calibration.
TARGETS_OF_RECIPE: dict[Recipe, tuple[str, ...]] = {
    replace(RECIPES["int4"], name="calibrated", calibration_tokens=2048): tuple(TARGETS),
    replace(RECIPES["int4-fast"], name="rounded", onnx_form="portable"): ("onnx",),
}
# Conditions that must not change the bytes: folder, threads of torch, processors, hash seed, time zone, day.
CONDITIONS = (
    {"folder": "one", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "DAYS": "-2000"},
    {"folder": "two/deeper", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "2", "TZ": "UTC", "DAYS": "3000"},
)

# Shifts the system's clock by DAYS, for Python and for native code.
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
# argv: number of processors for the process, then commands of edgellama, separated by `--`.
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
def test_two_exports_have_equal_bytes(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without a C compiler both exports run on the same day."""
    clock = {}
    if shutil.which("cc"):
        library = tmp_path / "clock.so"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=CLOCK.encode(), check=True)
        clock = {"LD_PRELOAD": str(library)}
    processes = [start_exports(tmp_path / c["folder"], {**c, **clock}, tiny_checkpoint) for c in CONDITIONS]
    codes = [process.wait() for process in processes]
    first, second = (tmp_path / c["folder"] for c in CONDITIONS)
    assert codes == [0, 0], (first / "log").read_text() + (second / "log").read_text()
    for recipe, targets in TARGETS_OF_RECIPE.items():
        bundle = first / f"{recipe.name}.edgellama"
        hashes = file_hashes(bundle)
        assert hashes == file_hashes(second / f"{recipe.name}.edgellama")
        folders = {name.partition("/")[0] for name in hashes}
        assert folders >= {*targets, "golden", "reports", "tokenizer"}
        assert {f"reports/validate-{target}.json" for target in targets} <= set(hashes)
        for name in hashes:
            if name.endswith(".json") and "tokenizer" not in name and "generation" not in name:
                keys = list(json.loads((bundle / name).read_text(encoding="utf-8")))
                assert keys == sorted(keys), name


def start_exports(
    folder: Path, environment: dict[str, str], checkpoint: Checkpoint
) -> subprocess.Popen[bytes]:
    """Starts a process that exports by all recipes in `folder`."""
    folder.mkdir(parents=True)
    write_hf(checkpoint.first_layers(1), folder / "model")
    commands = []
    for recipe, targets in TARGETS_OF_RECIPE.items():
        (folder / f"{recipe.name}.json").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        commands += ["--", "export", "model", "-o", f"{recipe.name}.edgellama", "-r", f"{recipe.name}.json"]
        commands += ["--context", "64", *(option for target in targets for option in ("-t", target))]
    own = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "EDGELLAMA_CACHE": str(folder)}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, environment["OMP_NUM_THREADS"], *commands],
            cwd=folder,
            env={**os.environ, **environment, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def file_hashes(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file, by path in the bundle."""
    return {f.relative_to(bundle).as_posix(): file_sha256(f) for f in bundle.rglob("*") if f.is_file()}
