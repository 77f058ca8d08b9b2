"""Tests of offline work: every verb runs with sockets forbidden, and none tries to open one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgellama.checkpoints import Checkpoint
from tests.helpers.hub_cache import cache_model
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import write_hf

pytestmark = pytest.mark.slow

# Logs and refuses every use of the network, in each Python process, including those that a verb starts.
GUARD = """
import os, sys
_FORBIDDEN = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
def _guard(event, args):
    if event.startswith(_FORBIDDEN) or event.startswith(("urllib.Request", "http.client.", "ftplib.", "smtplib.")):
        with open(os.environ["SOCKETS"], "a") as log:
            log.write(f"{event} {args}\\n")
        raise PermissionError(f"{event}: no network here")
sys.addaudithook(_guard)
"""
# The same for native code, if there is a C compiler: sockets of IPv4 and IPv6 are refused.
NATIVE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
int socket(int family, int type, int protocol) {
    if (family != AF_INET && family != AF_INET6)
        return ((int (*)(int, int, int)) dlsym(RTLD_NEXT, "socket"))(family, type, protocol);
    FILE *log = fopen(getenv("SOCKETS"), "a");
    if (log) { fprintf(log, "socket(%d)\\n", family); fclose(log); }
    errno = EACCES;
    return -1;
}
"""
# argv: commands of edgellama, separated by `--`. One process runs them all, so that imports happen once.
PROCESS = """
import sys
from itertools import groupby
from edgellama.cli.dispatch import main
for separator, command in groupby(sys.argv[1:], lambda argument: argument == "--"):
    command = list(command)
    if not separator and main(command) not in ((0, 1) if command == ["doctor"] else (0,)):
        sys.exit(f"{command} failed")
"""


def environment_without_network(folder: Path) -> dict[str, str]:
    """Variables for a process without network. Its attempts are logged in folder/sockets."""
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {
        **inherited,
        "SOCKETS": str(folder / "sockets"),
        "EDGELLAMA_CACHE": str(folder / "cache"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "PYTHONPATH": os.pathsep.join([str(folder / "guard"), str(ROOT)]),
    }
    if sys.platform == "linux" and shutil.which("cc"):
        library = folder / "guard" / "native.so"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=NATIVE.encode(), check=True)
        environment["LD_PRELOAD"] = str(library)
    return environment


def test_the_guard_refuses_sockets(tmp_path: Path) -> None:
    environment = environment_without_network(tmp_path)
    connect = "import socket; socket.create_connection(('127.0.0.1', 9))"
    done = subprocess.run([sys.executable, "-c", connect], env=environment, capture_output=True, check=False)
    assert done.returncode == 1 and b"no network here" in done.stderr
    if "LD_PRELOAD" in environment:
        native_socket = "import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) == -1"
        subprocess.run([sys.executable, "-c", native_socket], env=environment, check=True)
        assert "socket(2)" in (tmp_path / "sockets").read_text()


def test_every_verb_works_offline(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_hf(tiny_checkpoint.first_layers(1), tmp_path / "model")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cache_model("org/tiny", {f.name: f.read_bytes() for f in model.iterdir()})
    export = ["-t", "xnnpack", "-t", "onnx", "-r", "int4-fast", "--context", "64"]
    commands = [
        ["doctor"],
        ["inspect", "model"],
        ["export", "model", "-o", "b.edgellama", *export],
        ["export", "model", "-o", "b.edgellama", *export],
        ["inspect", "org/tiny"],
        ["export", "org/tiny", "--plan", *export],
        ["validate", "b.edgellama", "--reference", "org/tiny", "-t", "xnnpack", "--tokens", "256"],
        ["inspect", "b.edgellama"],
        ["run", "b.edgellama", "-p", "Once", "-n", "4"],
        ["run", "b.edgellama", "--chat", "-t", "onnx", "-n", "4"],
        ["bench", "b.edgellama", "--repeat", "2", "--prompt-tokens", "8", "--decode-tokens", "4"],
        ["recipes"],
        ["targets"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *(word for command in commands for word in ["--", *command])],
        cwd=tmp_path,
        env=environment_without_network(tmp_path),
        input="Hello\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "b.edgellama is up to date" in done.stderr
    assert not (tmp_path / "sockets").exists(), (tmp_path / "sockets").read_text()
