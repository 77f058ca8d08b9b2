"""Tests of downloads from a hub on the loopback, each in a process of its own as a user starts it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.hub_server import Hub, Repository, hub_server
from tests.helpers.paths import ROOT

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
pytestmark = pytest.mark.slow

COMMIT = "a" * 40
WEIGHTS = bytes(range(256)) * 1000
READ = {"config.json": b"{}", "tokenizer.json": b"{ }", "README.md": b"card", "LICENSE": b"terms"}
UNREAD = {"training_args.bin": b"x", "pytorch_model.bin": b"x", "original/params.json": b"[]", "a.py": b"y"}
# Prints the place of the checkpoint, as the verbs find it, without importing torch.
FIND = """
import sys
from edgellama.cli.arguments import checkpoint_path
from argparse import Namespace
from edgellama.errors import EdgellamaError
try:
    print(checkpoint_path(sys.argv[1], Namespace(download="--download" in sys.argv), weights="--plan" not in sys.argv))
except EdgellamaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@dataclass(frozen=True)
class Machine:
    """A machine with an empty cache, and the hub that it reaches."""

    hub: Hub
    home: Path

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING", "XDG_"))}
        own = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home / "hf"), "PYTHONPATH": str(ROOT)}
        return {**kept, **own, **variables}

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", FIND, *arguments],
            cwd=self.home,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def find(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=120)
        return process.returncode, out.strip(), err

    @property
    def snapshot(self) -> Path:
        return self.home / "hf/hub/models--org--tiny/snapshots" / COMMIT


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with hub_server() as hub:
        hub.repositories["org/tiny"] = Repository({**READ, **UNREAD, "model.safetensors": WEIGHTS})
        yield Machine(hub, tmp_path)


def test_only_the_files_that_are_read_are_fetched_and_only_once(machine: Machine) -> None:
    code, out, err = machine.find("org/tiny")
    assert code == 2 and "add --download" in err and machine.hub.requests == []
    code, out, err = machine.find("org/tiny", "--download")
    assert (code, out) == (0, str(machine.snapshot)), err
    assert sorted(machine.hub.fetched()) == sorted([*READ, "model.safetensors"])
    assert "download 5 of 5: model.safetensors (0.3 MB)" in err
    assert (machine.snapshot / "model.safetensors").read_bytes() == WEIGHTS
    machine.hub.requests.clear()
    assert machine.find("org/tiny", "--download")[1] == str(machine.snapshot) and not machine.hub.fetched()
    machine.hub.requests.clear()
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert machine.find("org/tiny", **variables)[1] == str(machine.snapshot)
    assert machine.hub.requests == []


def test_a_description_needs_no_weights(machine: Machine) -> None:
    assert machine.find("org/tiny", "--download", "--plan")[0] == 0
    assert sorted(machine.hub.fetched()) == sorted(READ)
    assert machine.find("org/tiny", "--plan")[1] == str(machine.snapshot)
    code, _, err = machine.find("org/tiny")
    assert code == 2 and "its weights are not there" in err


def test_the_token_goes_to_the_hub_and_not_to_its_storage(machine: Machine) -> None:
    machine.hub.repositories["org/tiny"].token = "hf_secret"
    code, _, err = machine.find("org/tiny", "--download")
    assert code == 2 and "a private one" in err and f"{machine.hub.endpoint}/org/tiny" in err
    machine.hub.requests.clear()
    assert machine.find("org/tiny", "--download", HF_TOKEN="hf_secret")[0] == 0
    tokens = {r.path.split("/")[1]: r.token for r in machine.hub.requests if "agent" not in r.path}
    assert tokens == {"api": "hf_secret", "org": "hf_secret", "storage": None}
    assert {r.host for r in machine.hub.requests if r.path.startswith("/storage")} == {"localhost"}


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_other"}], ids=["no token", "a token"])
@pytest.mark.parametrize("info", [True, False], ids=["of the model", "of a file"])
def test_a_gated_model(token: dict[str, str], info: bool, machine: Machine) -> None:
    """The hub describes a gated model to everyone, and refuses its files."""
    repository = machine.hub.repositories["org/tiny"]
    repository.gated, repository.open_info = True, not info
    code, _, err = machine.find("org/tiny", "--download", **token)
    assert code == 2 and f"its terms have to be accepted at {machine.hub.endpoint}/org/tiny" in err
    assert "HF_TOKEN" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (["org/none"], {}, "org/none: no such model at {}/org/none"),
        (["org/tiny@v9"], {}, "no revision v9 at {}/org/tiny"),
        (["org/tiny:x.gguf"], {}, "no such file at {}/org/tiny (GGUF files there: none)"),
        (["org/tiny"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to ask {}/org/tiny"),
        (
            ["org/tiny"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "no answer from the hub at http://127.0.0.1:9/org",
        ),
    ],
)
def test_refusals_have_the_address(
    arguments: list[str], variables: dict[str, str], sentence: str, machine: Machine
) -> None:
    code, _, err = machine.find(*arguments, "--download", **variables)
    assert code == 2 and sentence.format(machine.hub.endpoint) in err and "Traceback" not in err


def test_the_cache_answers_if_the_hub_does_not(machine: Machine) -> None:
    assert machine.find("org/tiny", "--download")[0] == 0
    code, out, err = machine.find("org/tiny", "--download", HF_HUB_OFFLINE="1")
    assert (code, out) == (0, str(machine.snapshot)) and f"snapshot {COMMIT}" in err


def test_a_new_commit_is_fetched_on_request_only(machine: Machine) -> None:
    assert machine.find("org/tiny", "--download")[0] == 0
    machine.hub.repositories["org/tiny"].commit = "b" * 40
    assert machine.find("org/tiny")[1] == str(machine.snapshot)
    machine.hub.requests.clear()
    assert machine.find("org/tiny", "--download")[1] == str(machine.snapshot.with_name("b" * 40))
    assert machine.hub.fetched() == [], "equal files are linked"
    assert machine.find(f"org/tiny@{COMMIT}")[1] == str(machine.snapshot)


def test_a_connection_that_breaks_is_taken_up_again(machine: Machine) -> None:
    machine.hub.cut.append(100_000)
    assert machine.find("org/tiny", "--download")[0] == 0
    assert (machine.snapshot / "model.safetensors").read_bytes() == WEIGHTS


def test_an_interrupted_download_goes_on_where_it_stopped(machine: Machine) -> None:
    """The package reads pieces of 10 MiB, so two of them are kept."""
    content = os.urandom(1 << 20) * 24
    machine.hub.repositories["org/tiny"].files["model.safetensors"] = content
    machine.hub.stall = 21 << 20
    process = machine.start("org/tiny", "--download")
    try:
        deadline = time.monotonic() + 60
        while not _partial(machine) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert _partial(machine) == 20 << 20
    machine.hub.release.set()
    machine.hub.requests.clear()
    code, out, err = machine.find("org/tiny", "--download")
    assert code == 0 and "model.safetensors: goes on at 21.0 MB" in err, err
    assert [r.range for r in machine.hub.requests if r.path.startswith("/storage")] == [f"bytes={20 << 20}-"]
    assert (Path(out) / "model.safetensors").read_bytes() == content
    assert _partial(machine) == 0


def _partial(machine: Machine) -> int:
    """Bytes of 20 MiB or more that an unfinished download has left, else 0."""
    sizes = [f.stat().st_size for f in machine.home.rglob("*.edgellama-partial")]
    return max([size for size in sizes if size >= 20 << 20], default=0)


def test_an_altered_file_is_refused(machine: Machine) -> None:
    """The rest of a file does not fit what an earlier run has left."""
    repository = machine.hub.repositories["org/tiny"]
    repository.files["model.safetensors"] = content = bytes(9 << 20)
    blobs = machine.snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(content).hexdigest()}.edgellama-partial").write_bytes(b"x" * 1000)
    code, _, err = machine.find("org/tiny", "--download")
    assert code == 2 and "what was fetched has hash" in err
    assert machine.find("org/tiny", "--download")[0] == 0


def test_one_of_several_gguf_files(machine: Machine) -> None:
    files = {"README.md": b"card", "config.json": b"{}", "a-Q4.gguf": b"4", "a-F16.gguf": b"16"}
    machine.hub.repositories["org/tiny"] = Repository(files)
    code, _, err = machine.find("org/tiny", "--download")
    assert code == 2 and "2 GGUF models, and one is needed: a-F16.gguf, a-Q4.gguf" in err
    assert "org/tiny:FILE" in err and machine.hub.fetched() == []
    assert machine.find("org/tiny:a-F16.gguf", "--download")[1] == str(machine.snapshot / "a-F16.gguf")
    assert sorted(machine.hub.fetched()) == ["README.md", "a-F16.gguf", "config.json"]
    assert machine.find("org/tiny:a-F16.gguf")[1] == str(machine.snapshot / "a-F16.gguf")


def test_a_repository_without_weights(machine: Machine) -> None:
    machine.hub.repositories["org/tiny"] = Repository({"config.json": b"{}", "tf_model.h5": b""})
    code, _, err = machine.find("org/tiny", "--download")
    assert code == 2 and "no weights that edgellama reads" in err and "tf_model.h5" in err


def test_without_the_package(machine: Machine) -> None:
    (machine.home / "huggingface_hub.py").write_text("raise ImportError(name='huggingface_hub')")
    code, _, err = machine.find(
        "org/tiny", "--download", PYTHONPATH=os.pathsep.join([str(machine.home), str(ROOT)])
    )
    assert code == 2 and "pip install 'edgellama[hub]'" in err
