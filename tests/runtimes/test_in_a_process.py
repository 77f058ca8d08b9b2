"""Runtimes inside a process of somebody else: its streams, its threads, torch's defaults that it has set."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import edgellama
from edgellama.bundle import Bundle
from edgellama.errors import UsageError
from edgellama.host.threads import one_thread


def run(bundle: Bundle, program: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a program in a Python of its own, with the bundle's path in the variable `B`."""
    environment = {**os.environ, "B": str(bundle.path)}
    command = [sys.executable, "-W", "error", "-c", f"import os, sys, threading, edgellama\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_threads_keep_the_output_of_the_process(tiny_bundle: Bundle) -> None:
    """Two runtimes in two threads, while a third thread prints: every line arrives."""
    done = run(
        tiny_bundle,
        """
B = os.environ["B"]
before = [os.fstat(n).st_ino for n in (1, 2)]
stop = threading.Event()
lines = [0]
def talk():
    while not stop.is_set() or lines[0] < 100:
        print("line", flush=True)
        lines[0] += 1
def work():
    runtime = edgellama.load(B, target="xnnpack")
    for _ in range(50):
        runtime.reset()
        runtime.forward(list(range(10, 40)))
talker = threading.Thread(target=talk)
talker.start()
workers = [threading.Thread(target=work) for _ in range(2)]
for thread in workers: thread.start()
for thread in workers: thread.join()
stop.set()
talker.join()
assert before == [os.fstat(n).st_ino for n in (1, 2)]
print("talked", lines[0])
""",
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == f"talked {len(lines)}" and set(lines) == {"line"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "sys.stdout = sys.stderr = None",
        "sys.stdout.close(); os.close(2); import tempfile; tempfile.tempdir = '/nowhere'",
    ],
    ids=["no streams", "closed streams and no temporary directory"],
)
def test_missing_streams_and_directories_end_nothing(program: str, tiny_bundle: Bundle) -> None:
    done = run(
        tiny_bundle,
        f"""
{program}
logits = edgellama.load(os.environ["B"], target="xnnpack").forward([1, 2, 3])
os._exit(0 if logits.shape == (512,) else 1)
""",
    )
    assert done.returncode == 0, done.stderr


def test_native_lines_stay_out_of_a_process_with_one_thread(tiny_bundle: Bundle) -> None:
    """A thread of tqdm's counts as none. Every process that has drawn a bar keeps one."""
    done = run(
        tiny_bundle,
        """
import io, tqdm
for _ in tqdm.tqdm(range(2), file=io.StringIO()): pass
assert threading.active_count() == 2
edgellama.load(os.environ["B"], target="xnnpack").forward([1, 2])
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_torch_defaults_of_a_notebook(tiny_bundle: Bundle) -> None:
    """They would change the model without a word, and they are not ours to change."""
    with edgellama.load(tiny_bundle, target="xnnpack") as runtime:
        torch.set_default_dtype(torch.bfloat16)
        try:
            for use in (lambda: runtime.forward([1]), lambda: edgellama.load(tiny_bundle)):
                with pytest.raises(UsageError, match=r"default dtype is torch\.bfloat16"):
                    use()
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"), pytest.raises(UsageError, match="default device is 'meta'"):
            runtime.forward([1])
        assert runtime.position == 0 and runtime.forward([1]).shape == (512,)


def test_token_ids_of_any_integer_sequence(tiny_bundle: Bundle) -> None:
    with edgellama.load(tiny_bundle, target="xnnpack") as runtime:
        expected = runtime.forward([5, 9, 200]).copy()
        for ids in (np.array([5, 9, 200]), torch.tensor([5, 9, 200]), (5, np.int32(9), 200)):
            runtime.reset()
            assert (runtime.forward(ids) == expected).all()  # type: ignore[arg-type]
        for wrong in ([1.5], np.array([0.5]), [[1, 2]], "12"):
            with pytest.raises(UsageError, match="integers"):
                runtime.forward(wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="no tokens"):
            runtime.forward(np.array([], dtype=int))  # type: ignore[arg-type]


def test_one_thread_is_counted_for_each_thread() -> None:
    """Torch keeps a number for each thread, so blocks of two threads may end in any order."""
    import threading

    entered, left = threading.Event(), threading.Event()
    counts: list[int] = []

    def other() -> None:
        torch.set_num_threads(3)
        with one_thread():
            entered.set()
            left.wait(10)
        counts.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=other)
    with one_thread():
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert counts == [3] and torch.get_num_threads() == before


@pytest.mark.slow
def test_a_pool_of_threads_is_not_replaced_under_a_loaded_artifact(tiny_bundle: Bundle) -> None:
    """ExecuTorch frees the old pool, and a method that holds it hangs when it runs."""
    done = run(
        tiny_bundle,
        """
import torch
from edgellama.errors import UsageError
from edgellama.runtimes.xnnpack import PteRuntime
from edgellama.targets.xnnpack.functions import sigmoid
path = edgellama.Bundle.open(os.environ["B"]).artifact("xnnpack")
values = torch.linspace(-4, 4, 100_000)
before = sigmoid(values)
with PteRuntime(path) as first:
    other = first.threads + 1
    try:
        PteRuntime(path, threads=other)
    except UsageError as error:
        print(error)
    first.forward([1, 2, 3])
with PteRuntime(path, threads=other) as second:
    second.forward([1, 2, 3])
    assert second.threads == other and torch.equal(sigmoid(values), before)
""",
    )
    assert done.returncode == 0, done.stderr
    assert "threads were asked for" in done.stdout and "Close the other runtimes" in done.stdout
