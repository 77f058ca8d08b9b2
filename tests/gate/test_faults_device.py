"""Faults of device logs and of answers to challenges: invented, contradictory, replayed, of another phone.

A sound log is that of a phone whose kernels round otherwise. Each case alters one thing, makes means, checks and
verdict fit again, and names all the checks that fail.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama.bundle import Bundle
from edgellama.bundle.golden import REFERENCE, Golden, Rows, read_golden
from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.commands.challenge import Pair, make, with_response
from edgellama.commands.export import export
from edgellama.errors import InputError, UsageError
from edgellama.gate.challenge import make_challenge, read_challenge, sequences_of
from edgellama.gate.device import with_device_logs
from edgellama.gate.possible_kl import least_kl_of_change
from edgellama.gate.replay import replay
from edgellama.report import Report, check
from tests.helpers.device_logs import device_log, finished, logits_of, noisy, response

Log = dict[str, Any]
NOISE = 1e-4  # relative, of the sound phone's logits
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
TARGETS = ("xnnpack", "coreml", "coreml-pte", "onnx")


@dataclass(frozen=True)
class Device:
    """A bundle with its golden vectors and the logits of its artifact on them."""

    bundle: Bundle
    golden: Golden
    logits: list[Rows]

    def log(self, noise: float = NOISE) -> Log:
        return device_log(self.bundle, "xnnpack", noisy(self.logits, noise))


@pytest.fixture(scope="module")
def device(tiny_bundle: Bundle) -> Device:
    golden = read_golden(tiny_bundle)
    return Device(tiny_bundle, golden, logits_of(tiny_bundle, "xnnpack", golden.sequences))


def report(target: str = "xnnpack") -> Report:
    """The report of a bundle whose files are sound."""
    files = check("structure.files", True)
    return Report(target, "any", None, 0, 0, {"files": "pass"}, {}, {}, {}, (files,))


def failures(bundle: Bundle, *logs: Log, name: str | None = None) -> list[str]:
    """Names of the failed checks about the last of the logs, without `device.`."""
    target = logs[-1]["target"]
    (judged,) = with_device_logs(bundle, [report(target)], logs, name)
    last = judged.checks[-(len(judged.checks) - 1) // len(logs) :]
    return [c.name.removeprefix("device.") for c in last if c.verdict == "fail"]


def positions(log: Log, key: str) -> list[Any]:
    return [x for sequence in log["sequences"] for x in sequence[key]]


def put(log: Log, key: str, values: list[Any]) -> None:
    """Replaces the figures of all positions."""
    first = 0
    for sequence in log["sequences"]:
        count = len(sequence[key])
        sequence[key] = list(values[first : first + count])
        first += count


def clear_lead(device: Device) -> int:
    """A position at which reference and artifact have the same best token, far ahead of the second."""
    reference, host = device.golden.expected[REFERENCE], device.golden.expected["xnnpack"]
    leads = [
        min(least_kl_of_change(x, i, None) for x in (reference, host))
        if reference.ids[i, 0] == host.ids[i, 0]
        else 0.0
        for i in range(len(host.rest))
    ]
    return int(np.argmax(leads))


def other_best(device: Device) -> int:
    """A position at which reference and artifact have different best tokens."""
    reference, host = device.golden.expected[REFERENCE], device.golden.expected["xnnpack"]
    return int(np.flatnonzero(reference.ids[:, 0] != host.ids[:, 0])[0])


def zeros(device: Device, log: Log) -> None:
    put(log, "parity_kl", [0.0] * len(positions(log, "parity_kl")))


def all_zeros(device: Device, log: Log) -> None:
    for key in ("kl", "parity_kl"):
        put(log, key, [0.0] * len(positions(log, key)))
    for key in ("top1", "parity_top1"):
        put(log, key, [True] * len(positions(log, key)))


def below_rounding(device: Device, log: Log) -> None:
    put(log, "parity_kl", [1e-13 * (1 + i) for i in range(len(positions(log, "parity_kl")))])


def constant_parity(device: Device, log: Log) -> None:
    put(log, "parity_kl", [2e-5] * len(positions(log, "parity_kl")))


def few_figures_in_turn(device: Device, log: Log) -> None:
    put(log, "parity_kl", [1e-5 * (1 + i % 7) for i in range(len(positions(log, "parity_kl")))])


def goldens_mean(device: Device, log: Log) -> None:
    mean = device.golden.data["artifacts"]["xnnpack"]["kl_mean"]
    put(log, "kl", [mean + 1e-9 * i for i in range(len(positions(log, "kl")))])


def shuffled_kl(device: Device, log: Log) -> None:
    put(log, "kl", np.random.default_rng(1).permutation(positions(log, "kl")).tolist())


def scaled_kl(factor: float) -> Callable[[Device, Log], None]:
    return lambda device, log: put(log, "kl", [factor * x for x in positions(log, "kl")])


def invented(device: Device, log: Log) -> None:
    draw, count = np.random.default_rng(2), len(positions(log, "kl"))
    put(log, "kl", draw.exponential(0.02, count).tolist())
    put(log, "parity_kl", draw.exponential(2e-5, count).tolist())


def change_that_costs_more(device: Device, log: Log) -> None:
    for key in ("top1", "parity_top1"):
        flags = positions(log, key)
        flags[clear_lead(device)] = False
        put(log, key, flags)


def two_best_tokens(device: Device, log: Log) -> None:
    for key in ("top1", "parity_top1"):
        flags = positions(log, key)
        flags[other_best(device)] = True
        put(log, key, flags)


def one_worst_sequence(device: Device, log: Log) -> None:
    limit = device.golden.limits("xnnpack")
    sequence = log["sequences"][0]
    share = 1.05 * limit["parity_kl_sequence"] / float(np.mean(sequence["parity_kl"]))
    sequence["parity_kl"] = [share * x for x in sequence["parity_kl"]]


def noise_beyond_the_limit(device: Device, log: Log) -> None:
    log.update(device.log(0.03))


def set_fields(**fields: Any) -> Callable[[Device, Log], None]:
    return lambda device, log: log.update(fields)


def lost_numbers(device: Device, log: Log) -> None:
    log["sequences"][3]["kl"][2] = None


# Alterations after which means, checks and verdict are made to fit.
CONSISTENT: dict[str, tuple[Callable[[Device, Log], None], list[str]]] = {
    "every figure is zero": (all_zeros, ["rounding", "top1", "reference_kl"]),
    "the KL to the host's run is exactly zero": (zeros, ["rounding"]),
    "the KL to the host's run is less than its rounding": (below_rounding, ["rounding"]),
    "one KL for all positions": (constant_parity, ["repeated"]),
    "seven figures in turn": (few_figures_in_turn, ["repeated"]),
    "golden's mean at every position": (goldens_mean, ["reference_kl"]),
    "the KL of other positions": (shuffled_kl, ["reference_kl"]),
    "a KL to the reference half of golden's": (scaled_kl(0.5), ["reference_kl"]),
    "a KL to the reference twice golden's": (scaled_kl(2), ["reference_kl"]),
    "random figures": (invented, ["reference_kl"]),
    "another best token at no cost": (change_that_costs_more, ["top1_kl"]),
    "two best tokens at once": (two_best_tokens, ["top1"]),
    "a KL that is no number": (lost_numbers, ["finite"]),
    "one sequence beyond its limit": (one_worst_sequence, ["parity_kl_sequence", "verdict"]),
    "noise beyond the limit": (noise_beyond_the_limit, ["parity_kl", "parity_kl_sequence", "verdict"]),
}

# Alterations of a finished log.
FINISHED: dict[str, tuple[Callable[[Device, Log], Any], list[str]]] = {
    "computed by torch": (set_fields(runtime="torch-reference"), ["runtime"]),
    "computed by the interpreter": (set_fields(runtime="mil-reference"), ["runtime"]),
    "computed by Core ML": (
        set_fields(runtime="executorch 1.5.1 coreml", os="iOS 18.1", device="iPhone17,1"),
        ["runtime"],
    ),
    "computed by portable kernels": (set_fields(runtime="executorch-portable"), ["runtime"]),
    "computed by another engine": (set_fields(runtime="llama.cpp b4100"), ["runtime"]),
    "Android on an iPhone": (set_fields(device="Apple iPhone17,1"), ["system"]),
    "iOS on a Pixel": (set_fields(os="iOS 18.1", runtime="executorch 1.5.1 xnnpack"), ["system"]),
    "Android's runtime on a Mac": (set_fields(device="arm64", os="Darwin"), ["system"]),
    "two systems": (set_fields(device="x", os="Android on macOS", runtime="executorch"), ["system"]),
    "loaded in no time": (set_fields(load_ms=0.0), ["figures"]),
    "no tokens a second": (set_fields(prefill_tok_s=0.0), ["figures"]),
    "more tokens a second than memory gives": (set_fields(decode_tok_s=9e5 * 100), ["figures"]),
    "no memory": (set_fields(peak_bytes=0), ["figures"]),
    "a mean that its positions do not give": (set_fields(kl_mean=1e-3), ["summary"]),
    "an agreement that its positions do not give": (set_fields(top1_agreement=1.0), ["summary"]),
    "a limit of its own": (lambda device, log: log["checks"][4].update(limit=1.0), ["summary"]),
    "a failed check and a passed verdict": (
        lambda device, log: log["checks"][3].update(verdict="fail"),
        ["summary"],
    ),
}


def test_a_phone_with_other_kernels_passes(device: Device) -> None:
    for noise in (0.0, 1e-7, 1e-5, NOISE, 1e-3):
        assert failures(device.bundle, device.log(noise)) == [], noise


@pytest.mark.parametrize("fault", CONSISTENT)
def test_a_log_that_contradicts_the_golden_vectors(fault: str, device: Device) -> None:
    alter, expected = CONSISTENT[fault]
    log = device.log()
    alter(device, log)
    found = failures(device.bundle, finished(device.bundle, log))
    if "reference_kl" in expected:  # So false a KL may contradict the best token at some position as well.
        found, expected = ([x for x in names if x != "top1_kl"] for names in (found, expected))
    assert found == expected


@pytest.mark.parametrize("fault", FINISHED)
def test_a_log_that_contradicts_itself(fault: str, device: Device) -> None:
    alter, expected = FINISHED[fault]
    log = device.log()
    alter(device, log)
    assert failures(device.bundle, log) == expected


def test_a_log_of_another_phone(device: Device) -> None:
    log = device.log()
    assert failures(device.bundle, log, name="pixel 9") == []
    assert failures(device.bundle, log, name="Pixel 8") == ["name"]


def test_a_log_that_is_given_for_two_phones(device: Device) -> None:
    log = device.log()
    assert failures(device.bundle, log, log | {"device": "Google Pixel 8"}) == ["copied"]
    assert failures(device.bundle, log, log) == [], "the same file twice claims nothing"
    other = device.log(2 * NOISE) | {"device": "Google Pixel 8", "load_ms": 251.5}
    assert failures(device.bundle, log, other) == []


def test_the_replay_on_this_machine_passes(device: Device) -> None:
    assert failures(device.bundle, replay(device.bundle)) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_phones_of_every_target_pass(
    target: str, tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Other kernels, half precision and the same bits. The interpreter of Core ML is no phone."""
    path = tmp_path_factory.mktemp("targets") / "tiny.edgellama"
    cut = tiny_checkpoint.first_layers(1)
    bundle = export(cut, path, recipe="int4-fast", targets=[target], context=64, validate=False)
    logits = logits_of(bundle, target, read_golden(bundle).sequences)
    halves = [rows.astype(np.float16).astype(np.float32) for rows in logits]
    for computed in (logits, halves, noisy(logits, 1e-5), noisy(logits, NOISE, 1)):
        assert failures(bundle, device_log(bundle, target, computed)) == []
    interpreted = device_log(bundle, target, logits, runtime="mil-reference", os="Linux", device="x86_64")
    assert "runtime" in failures(bundle, interpreted)
    asked = challenge_for(bundle, target)
    sound = noisy(logits_of(bundle, target, sequences_of(asked)), 1e-5)
    assert answer_failures(bundle, asked, response(bundle, asked, sound)) == []


# Challenges


def challenge_for(
    bundle: Bundle, target: str = "xnnpack", device: str | None = None, nonce: str = "a5"
) -> Log:
    return make_challenge(
        bundle, target, nonce=nonce * 32, now=NOW, lifetime=timedelta(days=1), device=device
    )


def answer_failures(bundle: Bundle, asked: Log, given: Log, **options: Any) -> list[str]:
    """Names of the failed checks of an answer, without `challenge.`."""
    pair = Pair(asked, given)
    options = {"now": NOW + timedelta(hours=1), "checkpoint": None, **options}
    (judged,) = with_response(bundle, [report(asked["target"])], pair, **options)
    return [c.name.removeprefix("challenge.") for c in judged.checks if c.verdict == "fail"]


@dataclass(frozen=True)
class Asked:
    """A challenge and the logits of the artifact on its sequences."""

    challenge: Log
    logits: list[Rows]


@pytest.fixture(scope="module")
def asked(tiny_bundle: Bundle) -> Asked:
    challenge = challenge_for(tiny_bundle, device="Pixel")
    return Asked(challenge, logits_of(tiny_bundle, "xnnpack", sequences_of(challenge)))


def edit_position(**fields: Any) -> Callable[[Log], None]:
    """Replaces figures of one position."""

    def edit(given: Log) -> None:
        for key, value in fields.items():
            given["sequences"][2][key][5] = value

    return edit


def swap_two_tokens(given: Log) -> None:
    row = given["sequences"][2]["ids"][5]
    row[0], row[-1] = row[-1], row[0]


def unlikely_tokens(given: Log) -> None:
    """All probability is `the others'`, which is true of the tokens that the answer names."""
    for sequence in given["sequences"]:
        for ids, logp in zip(sequence["ids"], sequence["logp"], strict=True):
            chosen = set(ids)
            ids[:] = [i for i in range(512) if i not in chosen][: len(ids)]
            logp[:] = [-20.0] * len(logp)
        sequence["rest"] = [float(np.log1p(-64 * np.exp(-20.0)))] * len(sequence["rest"])


def uniform(given: Log) -> None:
    for sequence in given["sequences"]:
        sequence["ids"] = [list(range(64)) for _ in sequence["ids"]]
        sequence["logp"] = [[float(-np.log(512))] * 64 for _ in sequence["logp"]]
        sequence["rest"] = [float(np.log(448 / 512))] * len(sequence["rest"])


def sharpen(given: Log, sequences: slice, by: float) -> None:
    """Makes the best token of each position likelier, and all others less likely."""
    for sequence in given["sequences"][sequences]:
        for i, logp in enumerate(sequence["logp"]):
            logits = np.array([*logp, sequence["rest"][i]])
            logits[0] += by
            logits -= np.log(np.exp(logits).sum())
            sequence["logp"][i], sequence["rest"][i] = logits[:-1].tolist(), float(logits[-1])


def test_each_limit_of_the_kl_is_needed(device: Device, asked: Asked) -> None:
    """One sequence far off leaves the mean within its limit; all of them slightly off leave each within its own."""
    limit = device.golden.limits("xnnpack")
    assert limit["parity_kl_mean"] < limit["parity_kl_sequence"] < 6 * limit["parity_kl_mean"]
    outcomes = set()
    for sequences in (slice(0, 1), slice(0, None)):
        for by in (0.07, 0.08, 0.12):
            given = copy.deepcopy(response(device.bundle, asked.challenge, noisy(asked.logits, NOISE)))
            sharpen(given, sequences, float(by))
            outcomes.add(tuple(answer_failures(device.bundle, asked.challenge, given)))
    assert {("kl",), ("kl_sequence",)} <= outcomes


ANSWERS: dict[str, tuple[Callable[[Log], Any], list[str]]] = {
    "the answer to another challenge": (lambda g: g.update(nonce="b6" * 32), ["nonce"]),
    "the answer of another artifact": (lambda g: g.update(artifact_sha256="0" * 64), ["artifact"]),
    "the answer of another target": (lambda g: g.update(target="onnx"), ["artifact"]),
    "the answer of another phone": (lambda g: g.update(device="Samsung SM-S931B"), ["device"]),
    "the answer of torch": (lambda g: g.update(runtime="torch-reference"), ["runtime"]),
    "the answer of an Android iPhone": (lambda g: g.update(device="iPhone, a Pixel"), ["system"]),
    "a billion tokens a second": (lambda g: g.update(decode_tok_s=1e9), ["figures"]),
    "a position short": (lambda g: g["sequences"][1]["rest"].pop(), ["positions"]),
    "a sequence short": (lambda g: g["sequences"].pop(), ["positions"]),
    "fewer tokens than asked for": (edit_position(ids=[1, 2], logp=[-1.0, -2.0]), ["positions"]),
    "probabilities beyond one": (edit_position(rest=-0.001), ["distribution", "kl", "kl_sequence"]),
    "a token that comes twice": (edit_position(ids=[7] * 64), ["distribution", "kl", "kl_sequence"]),
    "no numbers": (edit_position(logp=[None] * 64), ["distribution", "kl", "kl_sequence"]),
    "tokens exchanged": (swap_two_tokens, ["kl", "kl_sequence"]),
    "likely tokens hidden among all others": (unlikely_tokens, ["kl", "kl_sequence"]),
    "all tokens alike": (uniform, ["kl", "kl_sequence"]),
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_a_false_answer(fault: str, device: Device, asked: Asked) -> None:
    alter, expected = ANSWERS[fault]
    given = copy.deepcopy(response(device.bundle, asked.challenge, noisy(asked.logits, NOISE)))
    assert answer_failures(device.bundle, asked.challenge, given) == []
    alter(given)
    assert answer_failures(device.bundle, asked.challenge, given) == expected


def test_an_answer_of_another_model(device: Device, asked: Asked, tiny_checkpoint: Checkpoint) -> None:
    """The full-precision model instead of the artifact, against the noise on the same tokens."""
    from edgellama.checkpoints.weights import load_llama
    from edgellama.gate.golden import feed
    from edgellama.runtimes.reference import ReferenceRuntime

    runtime = ReferenceRuntime(load_llama(tiny_checkpoint, device.bundle.context_length))
    logits = [feed(runtime, sequence) for sequence in sequences_of(asked.challenge)]
    given = response(device.bundle, asked.challenge, logits)
    expected = ["kl", "kl_sequence"]
    assert answer_failures(device.bundle, asked.challenge, given, checkpoint=tiny_checkpoint) == expected
    sound = response(device.bundle, asked.challenge, noisy(asked.logits, NOISE))
    assert answer_failures(device.bundle, asked.challenge, sound, checkpoint=tiny_checkpoint) == []


def test_the_bits_of_this_machine_on_a_phone(
    device: Device, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A phone's kernels never give the bits of an x86 processor. Two ARM processors may agree."""
    same = response(device.bundle, asked.challenge, asked.logits)
    for machine, expected in (("x86_64", ["own_bits"]), ("aarch64", [])):
        monkeypatch.setattr("edgellama.gate.response.platform.machine", lambda machine=machine: machine)
        assert answer_failures(device.bundle, asked.challenge, same) == expected
    here = same | {"os": "Linux", "runtime": "executorch-xnnpack"}
    assert answer_failures(device.bundle, asked.challenge, here) == []


CHALLENGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "expired": ({"created": "2025-12-01T00:00:00Z", "expires": "2025-12-02T00:00:00Z"}, ["age"]),
    "valid for a year": ({"expires": "2027-01-01T00:00:00Z"}, ["age"]),
    "of the future": ({"created": "2026-01-03T00:00:00Z", "expires": "2026-01-04T00:00:00Z"}, ["age"]),
    "of another bundle": ({"artifact_sha256": "0" * 64}, ["bundle"]),
}


@pytest.mark.parametrize("fault", CHALLENGES)
def test_a_challenge_that_proves_nothing(fault: str, device: Device, asked: Asked) -> None:
    changes, expected = CHALLENGES[fault]
    given = response(device.bundle, asked.challenge, noisy(asked.logits, NOISE))
    assert answer_failures(device.bundle, asked.challenge | changes, given) == expected


def test_tokens_that_somebody_chose(device: Device, asked: Asked) -> None:
    chosen = copy.deepcopy(asked.challenge)
    chosen["sequences"][4]["tokens"][0] = 5
    given = response(device.bundle, asked.challenge, noisy(asked.logits, NOISE))
    assert answer_failures(device.bundle, chosen, given) == ["tokens"]
    shorter = asked.challenge | {"sequences": asked.challenge["sequences"][:1]}
    assert "tokens" in answer_failures(device.bundle, shorter, given)


def test_challenges_differ_and_follow_from_their_nonce(tiny_bundle: Bundle) -> None:
    first, second = make(tiny_bundle), make(tiny_bundle)
    assert first["nonce"] != second["nonce"] and first["sequences"] != second["sequences"]
    seeded = make(tiny_bundle, seed=3)
    assert seeded["sequences"] == make(tiny_bundle, seed=3)["sequences"]
    for sequence in first["sequences"]:
        assert 0 <= sequence["score_from"] < len(sequence["tokens"]) <= tiny_bundle.context_length
    with pytest.raises(UsageError, match="valid for 1 to 744 hours"):
        make(tiny_bundle, hours=10_000)


def test_the_command_line_asks_answers_and_judges(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    challenge, answered, out = (str(tmp_path / name) for name in ("c.json", "r.json", "report.json"))
    bundle = str(tiny_bundle.path)
    assert main(["challenge", bundle, "-o", challenge, "--device", "x86"]) == 0
    assert main(["challenge", bundle, "--answer", challenge, "-o", answered]) == 0
    judge = ["validate", bundle, "--challenge", challenge, "--response", answered, "--json", out]
    given = json.loads(Path(answered).read_text())
    Path(answered).write_text(json.dumps(given | {"device": "x86_64"}))
    assert main(judge) == 0
    assert "challenge.kl" in {c["name"] for c in json.loads(Path(out).read_text())["checks"]}
    Path(answered).write_text(json.dumps(given | {"device": "x86_64", "nonce": "0" * 64}))
    assert main(judge) == 1
    assert main([*judge[:-4], *judge[-2:]]) == 2
    assert "--response is missing" in capsys.readouterr().err


def test_files_that_are_no_challenge_are_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    data = make(tiny_bundle)
    for changes, message in (
        ({"schema": "edgellama.device/1"}, "schema is"),
        ({"nonce": "a"}, "challenge.nonce"),
        ({"expires": "2026-02-31T00:00:00Z"}, "challenge.expires is no day"),
        ({"sequences": []}, "challenge.sequences has 0 entries"),
    ):
        file.write_text(json.dumps(data | changes))
        with pytest.raises(InputError, match=message):
            read_challenge(file)
