"""Tests of ios_demo without a Swift compiler: every file parses, and its names match the Python side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellama.bundle import Bundle
from edgellama.bundle.bundle import MANIFEST_SIGNATURE
from edgellama.bundle.golden import FILE, REFERENCE
from edgellama.bundle.golden import SCHEMA as GOLDEN_SCHEMA
from edgellama.bundle.schema import published
from edgellama.checkpoints import Checkpoint
from edgellama.export.coreml.lower import lower_to_coreml
from edgellama.export.coreml.lower_pte import lower_to_coreml_pte
from edgellama.export.quantization.quantize import quantized_llama
from edgellama.formats.mlpackage import MlPackage, read_mlpackage
from edgellama.formats.pte import read_pte
from edgellama.gate.challenge import RESPONSE_SCHEMA
from edgellama.gate.challenge import SCHEMA as CHALLENGE_SCHEMA
from edgellama.gate.device import SCHEMA as DEVICE_SCHEMA
from edgellama.host.progress import Progress
from edgellama.model.config import LlamaConfig
from edgellama.recipe import CHOICES, RECIPES
from edgellama.release.signature import SCHEMA as SIGNATURE_SCHEMA
from edgellama.runtimes.coreml import LONGEST_CALL
from edgellama.targets import TARGETS
from edgellama.targets.coreml import interface
from edgellama.targets.coreml.interface import CoremlForm, causal_mask
from edgellama.text.tokenizer_json import LLAMA3_SPLIT
from tests.helpers.paths import ROOT, VECTORS
from tests.helpers.swift_sources import CORE, DEMO, constants, errors, strings, swift_files
from tests.helpers.tiny_models import CONTEXT, provenance


def test_every_file_parses() -> None:
    files = swift_files()
    assert len(files) > 40
    errors_by_file = {f.relative_to(ROOT).as_posix(): errors(f.read_bytes()) for f in files}
    assert {name: lines for name, lines in errors_by_file.items() if lines} == {}


@pytest.mark.parametrize(
    ("old", "new"), [("{", ""), ("func ", "func 1"), ("let ", "let let "), ("\n}\n", "\n")], ids=range(4)
)
def test_a_broken_file_is_detected(old: str, new: str) -> None:
    source = (CORE / "Sampler.swift").read_text(encoding="utf-8")
    assert old in source
    assert errors(source.replace(old, new, 1).encode())


def test_names_of_the_interface() -> None:
    swift = constants(CORE / "CoreMLInterface.swift")
    python = {
        "inputIds": interface.INPUT_IDS,
        "mask": interface.MASK,
        "position": interface.POSITION,
        "keyCache": interface.KEY_CACHE,
        "valueCache": interface.VALUE_CACHE,
        "logits": interface.LOGITS,
        "newKeys": interface.NEW_KEYS,
        "newValues": interface.NEW_VALUES,
        "vocabSize": interface.VOCAB_SIZE,
        "contextLength": interface.CONTEXT_LENGTH,
        "outputSize": interface.OUTPUT_SIZE,
    }
    methods = {
        "decode": "decode",
        "prefill": "prefill",
        "forward": "forward",
        "prefillTokensMethod": "get_prefill_tokens",
    }
    assert swift == python | methods
    assert {swift["decode"], swift["prefill"]} == set(interface.PROFILES["ane"])
    assert {swift["forward"], swift["prefill"]} == set(interface.PTE_METHODS)
    source = (CORE / "CoreMLInterface.swift").read_text(encoding="utf-8")
    assert f"longestCall: Int = {LONGEST_CALL}\n" in source


@pytest.fixture(scope="module")
def one_layer(tiny_checkpoint: Checkpoint) -> Checkpoint:
    return tiny_checkpoint.first_layers(1)


@pytest.mark.parametrize("recipe", ["int4-fast", "int8-ane"])
@pytest.mark.slow
def test_a_package_has_the_interface_that_the_app_uses(
    recipe: str, one_layer: Checkpoint, tmp_path: Path
) -> None:
    model, _ = quantized_llama(one_layer, RECIPES[recipe], CONTEXT)
    path = tmp_path / "model.mlpackage"
    lower_to_coreml(model, path, provenance(RECIPES[recipe]), progress=Progress())
    package = read_mlpackage(path)
    swift = constants(CORE / "CoreMLInterface.swift")
    static = recipe == "int8-ane"
    assert [f.name for f in package.functions] == (
        [swift["decode"], swift["prefill"]] if static else ["main"]
    )
    assert package.user_defined[swift["vocabSize"]] == str(one_layer.config.vocab_size)
    assert package.user_defined[swift["contextLength"]] == str(CONTEXT)
    for function in package.functions:
        inputs = {x.name: (x.dtype, len(x.shape)) for x in function.inputs}
        expected = {swift["inputIds"]: ("int32", 2), swift["mask"]: ("float16", 4)}
        assert inputs == expected | ({swift["position"]: ("int32", 1)} if static else {})
        assert [x.name for x in function.states] == [swift["keyCache"], swift["valueCache"]]
        assert [(x.name, x.dtype) for x in function.outputs] == [(swift["logits"], "float16")]
    _shapes_of_static_calls(package, one_layer.config, static)


def _shapes_of_static_calls(package: MlPackage, config: LlamaConfig, static: bool) -> None:
    for function in package.functions:
        rows: Any = (1 if function.name == "decode" else 32) if static else (1, CONTEXT)
        width: Any = CONTEXT if static else (1, CONTEXT)
        shapes = {x.name: x.shape for x in function.inputs}
        assert (shapes["inputIds"], shapes["causalMask"]) == ((1, rows), (1, 1, rows, width))
        assert function.states[0].shape == (
            *(config.num_hidden_layers, 1, config.num_key_value_heads, CONTEXT),
            config.head_dim,
        )


@pytest.mark.slow
def test_a_pte_has_the_methods_that_the_app_calls(one_layer: Checkpoint, tmp_path: Path) -> None:
    model, _ = quantized_llama(one_layer, RECIPES["int8"], CONTEXT)
    path = tmp_path / "model.pte"
    lower_to_coreml_pte(model, path, provenance(RECIPES["int8"]), progress=Progress())
    methods = read_pte(path).methods
    swift = constants(CORE / "CoreMLInterface.swift")
    assert methods[swift["prefillTokensMethod"]] == interface.PREFILL_TOKENS
    called = {swift["forward"], swift["prefill"], swift["prefillTokensMethod"], *_getters()}
    assert called <= set(methods)


def test_the_bundles_pte_has_the_methods_that_the_app_calls(tiny_bundle: Bundle) -> None:
    (artifact,) = tiny_bundle.manifest["artifacts"]
    assert {"forward", *_getters()} <= set(artifact["methods"])


def _getters() -> set[str]:
    sources = [(DEMO / f"App/Runtimes/{name}.swift") for name in ("ExecuTorchModel", "ExecuTorchCacheModel")]
    getters = {text for source in sources for text in strings(source) if text.startswith("get_")}
    assert getters == {"get_vocab_size", "get_max_context_len"}
    return getters


@pytest.mark.parametrize(
    ("form", "tokens", "position", "context"),
    [
        (CoremlForm(None), 3, 2, 64),
        (CoremlForm(2), 2, 3, 6),
        (CoremlForm(2, stateful=False), 2, 2, 6),
        (CoremlForm(None), 1, 0, 64),
    ],
    ids=["flexible", "static", "cache as input", "first token"],
)
def test_masks_match_the_swift_tests(form: CoremlForm, tokens: int, position: int, context: int) -> None:
    """The Swift tests hold masks that were written by hand. They are compared with masks of Python."""
    mask = causal_mask(form, tokens, position, context)[0, 0]
    rows = ", ".join(f'"{"".join("0" if x == 0 else "-" for x in row)}"' for row in mask)
    own = position if form.stateful else context
    call = f"causalMask(rows: {mask.shape[0]}, width: {mask.shape[1]}, position: {position}, own: {own})"
    tests = (DEMO / "EdgeLlamaCore/Tests/EdgeLlamaCoreTests/CoreMLInterfaceTests.swift").read_text("utf-8")
    assert re.search(re.escape(call) + r", \d+\), \[" + re.escape(rows) + r"\]", tests), (call, rows)
    assert bool(torch.isinf(mask[mask != 0]).all())


def _names(schema: Any) -> set[str]:
    """Every property name in a JSON schema."""
    if isinstance(schema, list):
        return {name for part in schema for name in _names(part)}
    if not isinstance(schema, dict):
        return set()
    own = set(schema["properties"]) if isinstance(schema.get("properties"), dict) else set()
    return own | {name for part in schema.values() for name in _names(part)}


def _keys(path: Path) -> set[str]:
    """Names that a file reads from a JsonObject."""
    calls = r"\.(?:string|bool|double|int|object|array|objects|ints|doubles|isNull|(?:object|string)OrNil)"
    return set(re.findall(calls + r'\("(\w+)"', path.read_text("utf-8")))


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        ("ModelBundle", "manifest"),
        ("ChatFormat", "manifest"),
        ("Classifier", "manifest"),
        ("Guard", "manifest"),
        ("Golden", "golden"),
        ("Challenge", "challenge"),
        ("ManifestSignature", "signature"),
    ],
)
def test_keys_that_are_read_are_in_the_schema(file: str, schema: str) -> None:
    keys = _keys(CORE / f"{file}.swift")
    assert len(keys) >= (4 if file == "ManifestSignature" else 9)
    assert keys <= _names(published(schema)), keys - _names(published(schema))


def test_keys_of_the_log_are_those_of_the_schema() -> None:
    source = (CORE / "DeviceLog.swift").read_text("utf-8")
    written = set(re.findall(r'^ +"(\w+)": ', source, re.MULTILINE))
    schema = published("device")
    assert written == _names(schema)
    checks = set(re.findall(r'Check\(\s*name: "(\w+)"', (CORE / "GoldenCheck.swift").read_text("utf-8")))
    assert checks == {"artifact", "tokenizer", "parity_kl", "parity_kl_sequence"}


def test_keys_of_a_response_are_those_of_the_schema() -> None:
    source = (CORE / "Challenge.swift").read_text("utf-8")
    assert set(re.findall(r'^ +"(\w+)": ', source, re.MULTILINE)) == _names(published("response"))
    schemas = set(re.findall(r'schema: String = "(\S+)"', source))
    assert schemas == {CHALLENGE_SCHEMA, RESPONSE_SCHEMA}


def test_schemas_targets_and_profiles() -> None:
    assert (
        constants(CORE / "ModelBundle.swift")["schema"]
        == published("manifest")["properties"]["schema"]["enum"][0]
    )
    golden = constants(CORE / "Golden.swift")
    assert (golden["schema"], golden["reference"], golden["file"]) == (GOLDEN_SCHEMA, REFERENCE, FILE)
    assert constants(CORE / "DeviceLog.swift")["schema"] == DEVICE_SCHEMA
    signature = constants(CORE / "ManifestSignature.swift")
    assert (signature["schema"], signature["file"]) == (SIGNATURE_SCHEMA, MANIFEST_SIGNATURE)
    backend = strings(DEMO / "App/Runtimes/Backend.swift")
    assert set(TARGETS) & backend == {"coreml", "coreml-pte", "xnnpack"}
    assert set(CHOICES["coreml_profile"]) <= backend
    assert {f"-r {name}" for name in ("int8-ane",) if name in RECIPES} <= set(
        re.findall(r"-r [\w-]+", " ".join(backend))
    )


def test_the_pre_tokenizer_is_llama3s() -> None:
    source = (CORE / "PreTokenizer.swift").read_text("utf-8")
    pieces = re.findall(r'#"(.*?)"#', source)
    assert "".join(pieces) == LLAMA3_SPLIT


def test_the_tables_are_kotlins() -> None:
    """Tables are equal to those of Kotlin, which test_vectors compares with the tokenizers library."""
    kotlin = (ROOT / "android_demo/core/src/main/kotlin/edgellama/core/UnicodeTables.kt").read_text("utf-8")
    expected = {
        name.lower(): "".join(re.findall(r'"(.*)"', body))
        for name, body in re.findall(r"const val (\w+) =\n((?: +\".*\n)+)", kotlin)
    }
    swift = (CORE / "UnicodeTables.swift").read_text("utf-8")
    actual = {
        name: "".join(line[8:].removesuffix("\\") for line in body.splitlines())
        for name, body in re.findall(r'let (\w+): String = """\n(.*?)\n        """', swift, re.DOTALL)
    }
    assert set(actual) == {"letter", "number", "space", "digit"}
    assert actual == expected


def test_the_swift_tests_read_every_file_of_the_vectors() -> None:
    tests = DEMO / "EdgeLlamaCore/Tests/EdgeLlamaCoreTests"
    read = set().union(*(strings(path) for path in tests.glob("*.swift")))
    files = {path.name for path in VECTORS.glob("*.json")}
    assert files <= read
    assert json.loads((VECTORS / "encode.json").read_text())["tokenizers"].keys() <= read


def test_no_file_uses_a_network() -> None:
    forbidden = r"URLSession|URLRequest|NWConnection|import Network|CFSocket|WKWebView|https?://"
    for path in (DEMO / "App").rglob("*.swift"):
        assert not re.search(forbidden, path.read_text("utf-8")), path
    for path in CORE.glob("*.swift"):
        assert not re.search(forbidden, path.read_text("utf-8")), path


def test_the_core_depends_on_foundation_alone() -> None:
    imports = {
        name
        for path in CORE.glob("*.swift")
        for name in re.findall(r"^\s*(?:@\w+ )?import (\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert imports == {"Foundation", "CoreML", "CryptoKit"}
    trust = (CORE / "Trust.swift").read_text("utf-8")
    assert trust.count("import CryptoKit") == 1 and "#if canImport(CryptoKit)\nimport CryptoKit\n" in trust
    source = (CORE / "CoreMLModel.swift").read_text("utf-8")
    assert source.startswith("#if canImport(CoreML)\n") and source.rstrip().endswith("#endif")


def test_every_control_without_text_has_a_label() -> None:
    """Buttons have titles, and progress bars have accessibility labels. Images are not used."""
    for path in (DEMO / "App").rglob("*.swift"):
        source = path.read_text("utf-8")
        assert not re.search(r"Button\s*(?:\(action:|\{)", source), path
        assert "Image(" not in source, path
        for bar in re.findall(r"ProgressView\(value:.*?\n(?: +\..*\n)*", source):
            assert ".accessibilityLabel(" in bar and ".accessibilityValue(" in bar, (path, bar)
