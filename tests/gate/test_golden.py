"""Tests of golden vectors: the vectors in a bundle, the coarse KL, and the checks of a device's log."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST, write_manifest
from edgellama.bundle.golden import FILE, Expectation, Golden, GoldenSequence, Rows, read_golden, write_golden
from edgellama.bundle.schema import CHECKED, DESCRIBING, published
from edgellama.checkpoints import Checkpoint
from edgellama.cli.dispatch import main
from edgellama.errors import BundleError, InputError
from edgellama.files import to_json
from edgellama.gate.device import judge, read_device_logs
from edgellama.gate.golden import feed
from edgellama.gate.golden_sequences import MIDDLE, SCORED, choose_sequences, top_k
from edgellama.gate.metrics import kl_divergence
from edgellama.gate.replay import replay
from edgellama.runtimes.load import load
from edgellama.targets import TARGETS
from edgellama.text.tokenizer import Tokenizer
from edgellama.text.windows import default_texts
from tests.helpers.schemas import keywords


def test_the_best_tokens_are_those_of_a_stable_sort() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 500)).astype(np.float32)
    logits[1] = logits[1].round(1)  # ties, also at the last kept token
    logits[2, 7], logits[3] = np.nan, np.nan
    logits[4], logits[5, 20:] = 0, -np.inf
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :64]
    assert np.array_equal(Expectation.of(logits, 64).ids, expected)


@pytest.fixture(scope="module")
def golden(tiny_bundle: Bundle) -> Golden:
    return read_golden(tiny_bundle)


@pytest.fixture(scope="module")
def device_log(tiny_bundle: Bundle) -> dict[str, Any]:
    """Log of this machine as a device."""
    return replay(tiny_bundle)


def random_logits(positions: int, vocab: int, seed: int = 0) -> Rows:
    """Logits [positions, vocab], float32."""
    rows: Rows = np.random.default_rng(seed).normal(0, 3, (positions, vocab)).astype(np.float32)
    return rows


@pytest.mark.parametrize("name", ["golden", "device"])
def test_the_schemas_are_valid_and_files_conform_to_them(
    name: str, golden: Golden, device_log: dict[str, Any]
) -> None:
    schema = published(name)
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(
        {"golden": dict(golden.data), "device": json.loads(to_json(device_log))}[name]
    )
    assert keywords(schema) <= CHECKED | DESCRIBING


def test_sequences_are_encoded_by_the_tokenizer_of_the_bundle(tiny_bundle: Bundle, golden: Golden) -> None:
    expected = 9 + (tiny_bundle.context_length > MIDDLE)
    assert len(golden.sequences) == len({s.name for s in golden.sequences}) == expected
    for sequence in golden.sequences:
        ids = tiny_bundle.tokenizer.encode(sequence.text, add_special_tokens=sequence.add_special_tokens)
        assert ids == list(sequence.tokens)
        assert 0 < len(sequence.tokens) <= tiny_bundle.context_length
        assert sequence.scored == min(SCORED, len(sequence.tokens))
    assert sum(s.messages is not None for s in golden.sequences) >= 1
    assert {0} < {s.score_from for s in golden.sequences}, "the beginning of a text is scored, and the middle"


@pytest.mark.parametrize("context", [8, 20, 2048])
def test_sequences_fit_the_context(context: int, tiny_checkpoint: Checkpoint) -> None:
    sequences = choose_sequences(tiny_checkpoint.tokenizer, None, default_texts(), context)
    assert all(1 < len(s.tokens) <= context for s in sequences)
    assert all(s.messages is None for s in sequences), "without a format no phone can render a conversation"
    assert len(sequences[-1].tokens) >= context - 8, "one sequence is as long as the context"
    if context == 2048:
        assert MIDDLE - 8 <= len(sequences[-2].tokens) <= MIDDLE, "deep enough, and short enough to emulate"
        assert max(len(s.tokens) for s in sequences[:-2]) > 120


def test_the_coarse_kl_is_a_lower_bound_and_exact_with_all_logits() -> None:
    reference, candidate = random_logits(12, 300), random_logits(12, 300, seed=1)
    exact = kl_divergence(torch.from_numpy(reference), torch.from_numpy(candidate))
    assert Expectation.of(reference, 299).kl(candidate) == pytest.approx(exact, rel=1e-5)
    previous = np.zeros(12)
    for k in (1, 4, 32, 256, 299):
        kl = Expectation.of(reference, k).kl(candidate)
        assert (kl <= exact + 1e-6).all() and (kl >= previous - 1e-6).all()
        previous = kl
    expectation = Expectation.of(reference, 32)
    assert expectation.kl(reference) == pytest.approx(0, abs=1e-6)
    assert expectation.kl(reference + 7) == pytest.approx(0, abs=1e-6), "a constant is no difference"


def test_equal_logits_are_ranked_by_id() -> None:
    expectation = Expectation.of(np.array([[1.0, 3.0, 3.0, 2.0]], np.float32), 3)
    assert expectation.ids.tolist() == [[1, 2, 3]]
    assert expectation.top1(np.array([[0.0, 5.0, 5.0, 1.0]], np.float32)).tolist() == [True]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_logits_fail(broken: float) -> None:
    logits = random_logits(1, 20)
    expected = Expectation.of(logits, 4)
    logits[0, expected.ids[0, 0]] = broken
    kl = expected.kl(logits)[0]
    assert not kl <= 1.0


def test_expectations_belong_to_the_models_that_they_name(tiny_bundle: Bundle, golden: Golden) -> None:
    with load(tiny_bundle) as runtime:
        for i, sequence in enumerate(golden.sequences):
            logits = feed(runtime, sequence)
            rows = golden.rows(i)
            assert golden.expected["xnnpack"][rows].kl(logits) == pytest.approx(0, abs=1e-6)
    entry = golden.data["artifacts"]["xnnpack"]
    accuracy = tiny_bundle.manifest["accuracy"]["xnnpack"]
    assert entry["kl_mean"] == pytest.approx(accuracy["kl_mean"], rel=0.6)
    assert entry["sha256"] == tiny_bundle.artifact_sha256("xnnpack")
    assert 0 < entry["noise_floor_kl_mean"] < entry["kl_mean"]
    assert golden.limits("xnnpack")["parity_kl_mean"] == pytest.approx(
        max(1e-4, 3 * entry["noise_floor_kl_mean"])
    )


def test_vectors_of_a_large_vocabulary_are_small_for_every_target(tmp_path: Path) -> None:
    sequences = [
        GoldenSequence(f"s{i}", "x" * 600, True, None, tuple(range(1000, 1192)), 192 - SCORED)
        for i in range(8)
    ]
    k = top_k(128256)
    logits = random_logits(SCORED, 4096)
    expected = Expectation.joined(Expectation.of(logits, k) for _ in sequences)
    names = ("reference", *TARGETS)
    write_golden(tmp_path, sequences, dict.fromkeys(names, expected), {}, {})
    assert sum(f.stat().st_size for f in tmp_path.rglob("*")) < 0.3e6 * len(names)
    assert len(names) <= 7, "a further target needs fewer positions for each"


def test_directories_are_hashed_by_their_files(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "b.edgellama"
    shutil.copytree(tiny_bundle.path, path)
    (path / "xnnpack/model.pte").rename(path / "moved")
    (path / "xnnpack/model.pte/Data").mkdir(parents=True)
    (path / "moved").rename(path / "xnnpack/model.pte/Data/weights")
    (path / "xnnpack/model.pte/A").write_bytes(b"a")
    shutil.rmtree(path / "golden")
    manifest = json.loads((path / MANIFEST).read_text())
    bundle = write_manifest(path, manifest)
    lines = "".join(
        f"{bundle.manifest['files'][f'xnnpack/model.pte/{name}']['sha256']}  {name}\n"
        for name in ("A", "Data/weights")
    )
    assert bundle.artifact_sha256("xnnpack") == hashlib.sha256(lines.encode()).hexdigest()
    with pytest.raises(BundleError, match="no golden vectors"):
        read_golden(bundle)


def _set(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Edit that sets the value at a place such as `sequences.0.kl`."""

    def edit(data: dict[str, Any]) -> None:
        *path, last = place.split(".")
        for step in path:
            data = data[int(step)] if isinstance(data, list) else data[step]
        data[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("schema", "edgellama.golden/2"), "not of the schema"),
        (_set("top_k", 255), "have shapes"),
        (_set("limits", {}), "targets are not"),
        (
            lambda data: data["arrays"].update(
                {"xnnpack.ids": {**data["arrays"]["xnnpack.ids"], "file": "../x"}}
            ),
            "file",
        ),
        (lambda data: data["arrays"]["xnnpack.ids"].update(sha256="0" * 64), "is not the array"),
        (lambda data: data["arrays"]["xnnpack.ids"].update(shape=[3, 3]), "bytes, which are not"),
        (lambda data: data["arrays"].pop("xnnpack.rest"), "no array xnnpack.rest"),
        (lambda data: data["arrays"]["xnnpack.ids"].update(file="other.bin"), "not among the bundle's files"),
        (lambda data: data["sequences"].pop(), "have shapes"),
    ],
)
def test_damaged_golden_vectors_are_refused(
    edit: Callable[[dict[str, Any]], None], message: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "b.edgellama"
    shutil.copytree(tiny_bundle.path, path)
    data = json.loads((path / FILE).read_text())
    edit(data)
    (path / FILE).write_text(to_json(data), encoding="utf-8")
    with pytest.raises(BundleError, match=r"not the file that was exported|bytes, the manifest says"):
        read_golden(Bundle.open(path))
    bundle = write_manifest(path, json.loads((path / MANIFEST).read_text()))
    with pytest.raises(BundleError, match=message):
        read_golden(bundle)


def validate_log(bundle: Bundle, log: Any, tmp_path: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `edgellama validate` with a device log, given as data or as text."""
    file, out = tmp_path / "log.json", tmp_path / "report.json"
    file.write_text(json.dumps(log) if not isinstance(log, str) else log)
    code = main(["validate", str(bundle.path), "--device-log", str(file), "--json", str(out)])
    return code, json.loads(out.read_text()) if out.exists() else {}


def test_a_good_log_joins_the_report(
    tiny_bundle: Bundle, device_log: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device_log["verdict"] == "pass" and all(c["verdict"] == "pass" for c in device_log["checks"])
    code, report = validate_log(tiny_bundle, device_log, tmp_path)
    assert code == 0 and report["verdict"] == "pass"
    assert [c["name"] for c in report["checks"] if c["name"].startswith("device.")] == [
        *(f"device.{name}" for name in ("artifact", "golden", "sequences", "tokenizer")),
        *(f"device.{name}" for name in ("parity_kl", "parity_kl_sequence", "verdict")),
        *(f"device.{name}" for name in ("runtime", "system", "figures", "summary", "finite", "rounding")),
        *(f"device.{name}" for name in ("repeated", "top1", "top1_kl", "reference_kl", "name", "copied")),
    ]
    (device,) = report["device"]
    assert device["kl_mean"] == pytest.approx(device_log["kl_mean"])
    assert device["parity_top1_agreement"] == 1.0
    assert "from the host's artifact" in capsys.readouterr().out


def test_a_bad_log_fails_the_command(tiny_bundle: Bundle, device_log: dict[str, Any], tmp_path: Path) -> None:
    code, report = validate_log(tiny_bundle, device_log | {"verdict": "fail"}, tmp_path)
    assert code == 1 and report["verdict"] == "fail"


def _shift(log: dict[str, Any]) -> None:
    for sequence in log["sequences"]:
        sequence["parity_kl"] = [kl + 0.01 for kl in sequence["parity_kl"]]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (_set("artifact_sha256", "0" * 64), ["device.artifact", "device.verdict"]),
        (_set("golden_sha256", "0" * 64), ["device.golden", "device.verdict"]),
        (_set("verdict", "fail"), ["device.verdict", "device.summary"]),
        (_set("sequences.3.tokens_match", False), ["device.tokenizer", "device.verdict"]),
        (lambda log: log["sequences"].pop(), ["device.sequences", "device.verdict"]),
        (lambda log: log["sequences"][0]["kl"].pop(), ["device.sequences", "device.verdict"]),
        (
            _shift,
            [
                *("device.parity_kl", "device.parity_kl_sequence"),
                *("device.verdict", "device.summary", "device.repeated"),
            ],
        ),
        (
            lambda log: log["sequences"][2]["parity_kl"].__setitem__(1, None),
            ["device.parity_kl", "device.parity_kl_sequence", "device.verdict", "device.summary"],
        ),
    ],
)
def test_a_bad_log_fails_despite_the_verdict_of_the_phone(
    edit: Callable[[dict[str, Any]], None],
    expected: list[str],
    tiny_bundle: Bundle,
    golden: Golden,
    device_log: dict[str, Any],
) -> None:
    altered = copy.deepcopy(device_log)
    edit(altered)
    assert [c.name for c in judge(tiny_bundle, golden, altered) if c.verdict != "pass"] == expected


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("schema", "edgellama.report/1"), "schema is 'edgellama.report/1'"),
        (_set("artifact_sha256", "xyz"), "log.artifact_sha256 is 'xyz'"),
        (_set("sequences.0.kl", [-1.0]), "out of bounds"),
        (lambda log: log.pop("verdict"), "log has no verdict"),
        (_set("target", "coreml"), "is about target 'coreml'"),
    ],
)
def test_a_log_of_another_bundle_is_refused(
    edit: Callable[[dict[str, Any]], None],
    message: str,
    tiny_bundle: Bundle,
    device_log: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    altered = copy.deepcopy(device_log)
    edit(altered)
    assert validate_log(tiny_bundle, altered, tmp_path)[0] == 2
    assert message in capsys.readouterr().err


def test_unreadable_files_are_refused(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, message in (
        ("{", "not readable as JSON"),
        ("[NaN]", "not readable as JSON"),
        ("[]", "schema is None"),
    ):
        assert validate_log(tiny_bundle, content, tmp_path)[0] == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="No such file"):
        read_device_logs([tmp_path / "nowhere.json"], ["xnnpack"])


def test_another_tokenizer_is_detected(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "b.edgellama"
    shutil.copytree(tiny_bundle.path, path)
    file = path / "tokenizer/tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["merges"] = data["model"]["merges"][:100]
    file.write_text(json.dumps(data))
    Tokenizer.from_directory(path / "tokenizer")
    log = replay(write_manifest(path, json.loads((path / MANIFEST).read_text())))
    assert log["verdict"] == "fail"
    assert [c["name"] for c in log["checks"] if c["verdict"] == "fail"] == ["tokenizer"]
