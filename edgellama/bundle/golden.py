"""Golden vectors: token sequences, with the output of the reference and of every artifact at export.

A phone feeds the same tokens to the same artifact and compares its logits with those of the host. For each
scored position the host records the `top_k` most probable tokens with their log-probabilities. It also
records the log of the total probability of all other tokens. The KL over these top_k + 1 buckets is a lower
bound of the full KL, because merging outcomes never raises it. Every machine computes the same number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellama.bundle.bundle import Bundle
from edgellama.bundle.schema import published, violations
from edgellama.errors import BundleError
from edgellama.files import read_json, to_json

SCHEMA = "edgellama.golden/1"
FILE = "golden/golden.json"
TOP_K = 256
_VALUES = 1 << 20  # logits that are turned into buckets at a time
REFERENCE = "reference"  # name of the full-precision model among `arrays`

Float = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GoldenSequence:
    """Tokens to feed. Positions from `score_from` on are scored; position i has the logits after tokens[i].

    Attributes:
        text: text that encodes to `tokens`.
        add_special_tokens: the encoding includes the tokenizer's special tokens.
        messages: conversation that `chat.format` renders as `text`, up to the start of the assistant's
            answer. None for plain text.
    """

    name: str
    text: str
    add_special_tokens: bool
    messages: tuple[Mapping[str, str], ...] | None
    tokens: tuple[int, ...]
    score_from: int

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return len(self.tokens) - self.score_from


@dataclass(frozen=True)
class Expectation:
    """Output of a model at P scored positions.

    Attributes:
        ids: uint32 [P, k], the most probable tokens, best first. Ties are in the order of the ids.
        logp: float32 [P, k], their log-probabilities.
        rest: float32 [P], log of the total probability of all other tokens.
    """

    ids: npt.NDArray[np.uint32]
    logp: Rows
    rest: Rows

    def __getitem__(self, rows: slice) -> Expectation:
        """The expectation at the positions `rows`."""
        return Expectation(self.ids[rows], self.logp[rows], self.rest[rows])

    @classmethod
    def joined(cls, parts: Iterable[Expectation]) -> Expectation:
        """Concatenates the positions of several sequences."""
        ids, logp, rest = zip(*((p.ids, p.logp, p.rest) for p in parts), strict=True)
        return cls(np.concatenate(ids), np.concatenate(logp), np.concatenate(rest))

    @classmethod
    def of(cls, logits: Rows, top_k: int) -> Expectation:
        """The expectation of logits float32 [P, vocab_size]."""
        ids = np.array([_best(row, top_k) for row in logits], np.int64).reshape(len(logits), -1)
        return cls.of_ids(logits, ids)

    @classmethod
    def of_ids(cls, logits: Rows, ids: npt.NDArray[Any]) -> Expectation:
        """The buckets of the tokens `ids` [P, k] in logits float32 [P, vocab_size]."""
        logp, rest = buckets(logits, ids)
        return cls(ids.astype(np.uint32), logp.astype(np.float32), rest.astype(np.float32))

    def kl(self, logits: Rows) -> Float:
        """KL D(this || logits) over k + 1 buckets, nats: logits float32 [P, vocab_size] -> float64 [P]."""
        logp, rest = buckets(logits, self.ids)
        ours = np.concatenate([self.logp, self.rest[:, None]], axis=-1).astype(np.float64)
        theirs = np.concatenate([logp, rest[:, None]], axis=-1)
        with np.errstate(invalid="ignore"):
            terms = np.where(ours == -np.inf, 0.0, np.exp(ours) * (ours - theirs))
        kl: Float = np.maximum(terms.sum(-1), 0.0)
        return kl

    def top1(self, logits: Rows) -> npt.NDArray[np.bool_]:
        """Agreement of the most probable token: logits float32 [P, vocab_size] -> bool [P]."""
        same: npt.NDArray[np.bool_] = logits.argmax(-1) == self.ids[:, 0]
        return same


def nullable_floats(values: Iterable[float | None]) -> Float:
    """float64 array of JSON numbers, NaN for null."""
    return np.array([math.nan if x is None else x for x in values], np.float64)


def _best(row: Rows, count: int) -> npt.NDArray[np.int64]:
    """Ids of the largest of the logits float32 [vocab_size], as a stable sort orders them."""
    if count < len(row):
        least = -np.partition(-row, count - 1)[count - 1]
        ids = np.flatnonzero(row >= least)
        if len(ids) >= count:  # else some are NaN
            best: npt.NDArray[np.int64] = ids[np.argsort(-row[ids], kind="stable")[:count]]
            return best
    return np.argsort(-row, kind="stable")[:count]


def buckets(logits: Rows, ids: npt.NDArray[Any]) -> tuple[Float, Float]:
    """Log-probabilities of `ids`, float64 [P, k], and of all other tokens together, float64 [P].

    logits: float32 [P, vocab_size]. ids: token ids [P, k].

    The others are summed on their own: one minus the rest would lose precision.
    """
    # In pieces: float64 copies of all positions would take gigabytes.
    count = max(1, _VALUES // logits.shape[-1])
    pieces = [slice(start, start + count) for start in range(0, len(logits), count)] or [slice(None)]
    logp, rest = zip(*(_buckets(logits[rows], ids[rows]) for rows in pieces), strict=True)
    return np.concatenate(logp), np.concatenate(rest)


def _buckets(logits: Rows, ids: npt.NDArray[Any]) -> tuple[Float, Float]:
    x = logits.astype(np.float64)
    # Broken logits give NaN, which fails every limit.
    with np.errstate(invalid="ignore", divide="ignore"):
        x = x - x.max(-1, keepdims=True)
        exp = np.exp(x)
        total = np.log(exp.sum(-1))
        logp = np.take_along_axis(x, ids.astype(np.int64), -1) - total[:, None]
        np.put_along_axis(exp, ids.astype(np.int64), 0.0, -1)
        return logp, np.log(exp.sum(-1)) - total


@dataclass(frozen=True)
class Golden:
    """Content of golden.json and its arrays.

    Attributes:
        data: golden.json.
        sequences: the sequences, in order.
        expected: `REFERENCE`, target, or `rows_of` a family -> output at all scored positions.
        sha256: hash of golden.json.
    """

    data: Mapping[str, Any]
    sequences: tuple[GoldenSequence, ...]
    expected: Mapping[str, Expectation]
    sha256: str

    @property
    def top_k(self) -> int:
        return int(self.data["top_k"])

    def limits(self, target: str) -> Mapping[str, float]:
        """Limits `parity_kl_mean` and `parity_kl_sequence` of a target, nats (golden.schema.json)."""
        limits: Mapping[str, float] = self.data["limits"][target]
        return limits

    def family(self, target: str) -> str | None:
        """Family of processors that the target's rows belong to; None if all processors round alike."""
        family: str | None = self.data["artifacts"][target].get("family")
        return family

    def other_families(self, target: str) -> Mapping[str, Mapping[str, Any]]:
        """Families that have rows of their own, by name (`families` in golden.schema.json)."""
        families: Mapping[str, Mapping[str, Any]] = self.data["artifacts"][target].get("families", {})
        return families

    def family_of(self, target: str, processor: str) -> str | None:
        """Family of a kind of processor (edgellama.targets.families); None if all processors round alike."""
        found = (
            name for name, entry in self.other_families(target).items() if processor in entry["processors"]
        )
        return next(found, self.family(target))

    def for_family(self, target: str, family: str | None) -> Golden:
        """Golden vectors whose rows, figures and limits of `target` are those of a family.

        family: a name among `family` and `other_families`; None for the former.
        """
        if family is None or family == self.family(target):
            return self
        entry = self.other_families(target)[family]
        artifacts = {**self.data["artifacts"], target: {**self.data["artifacts"][target], **entry}}
        limits = {**self.data["limits"], target: entry["limits"]}
        expected = {**self.expected, target: self.expected[rows_of(target, family)]}
        data = {**self.data, "artifacts": artifacts, "limits": limits}
        return Golden(data, self.sequences, expected, self.sha256)

    def rows(self, sequence: int) -> slice:
        """Rows of the arrays for sequence number `sequence`."""
        start = sum(s.scored for s in self.sequences[:sequence])
        return slice(start, start + self.sequences[sequence].scored)


def rows_of(target: str, family: str) -> str:
    """Name of a family's rows among `Golden.expected` and, before `.ids`, among the arrays."""
    return f"{target}.{family}"


def read_golden(bundle: Bundle) -> Golden:
    """Reads and verifies the bundle's golden vectors. Raises BundleError if they are missing or damaged."""
    if FILE not in bundle.manifest["files"]:
        raise BundleError(
            f"{bundle.path}: no golden vectors in this bundle ({FILE})",
            remedy="Export it again with this version of edgellama.",
        )
    bundle.verify("golden")
    file = bundle.path / FILE
    remedy = "Export the bundle again."
    try:
        data = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: not readable as JSON ({error})", remedy=remedy) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BundleError(f"{file}: not of the schema {SCHEMA}", remedy=remedy)
    schema = published("golden")
    for violation in violations(data, schema, schema, "golden"):
        raise BundleError(f"{file}: {violation}", remedy=remedy)
    sequences = tuple(
        GoldenSequence(
            s["name"],
            s["text"],
            s["add_special_tokens"],
            None if s["messages"] is None else tuple(s["messages"]),
            tuple(s["tokens"]),
            s["score_from"],
        )
        for s in data["sequences"]
    )
    kept = {REFERENCE: data["top_k"]}  # tokens of a position, by name of the rows
    for target, entry in data["artifacts"].items():
        kept[target] = data["top_k"]
        kept |= {rows_of(target, name): family["top_k"] for name, family in entry.get("families", {}).items()}
    expected = {
        name: Expectation(*(_array(bundle, data, f"{name}.{part}") for part in ("ids", "logp", "rest")))
        for name in kept
    }
    positions = sum(s.scored for s in sequences)
    for name, expectation in expected.items():
        shapes = [a.shape for a in (expectation.ids, expectation.logp, expectation.rest)]
        if shapes != [(positions, kept[name]), (positions, kept[name]), (positions,)]:
            raise BundleError(
                f"{file}: the arrays of {name} have shapes {shapes} for {positions} scored positions",
                remedy=remedy,
            )
    if not set(data["limits"]) == set(data["artifacts"]) == set(bundle.targets):
        raise BundleError(f"{file}: its targets are not those of the bundle", remedy=remedy)
    return Golden(data, sequences, expected, bundle.manifest["files"][FILE]["sha256"])


def _array(bundle: Bundle, data: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    file, remedy = bundle.path / FILE, "Export the bundle again."
    if name not in data["arrays"]:
        raise BundleError(f"{file}: no array {name}", remedy=remedy)
    entry = data["arrays"][name]
    path = f"golden/{entry['file']}"
    if path not in bundle.manifest["files"]:
        raise BundleError(f"{file}: {path} is not among the bundle's files", remedy=remedy)
    content = (bundle.path / path).read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise BundleError(f"{file}: {path} is not the array that was written", remedy=remedy)
    dtype = np.dtype(entry["dtype"]).newbyteorder("<")
    if len(content) != dtype.itemsize * int(np.prod(entry["shape"])):
        raise BundleError(
            f"{file}: {path} has {len(content)} bytes, which are not {entry['dtype']} {entry['shape']}",
            remedy=remedy,
        )
    return np.frombuffer(content, dtype).reshape(entry["shape"])


def write_golden(
    directory: Path,
    sequences: list[GoldenSequence],
    expected: Mapping[str, Expectation],
    artifacts: Mapping[str, Mapping[str, Any]],
    limits: Mapping[str, Mapping[str, float]],
) -> None:
    """Writes golden/ into a bundle's directory: golden.json and its arrays.

    Args:
        directory: the bundle's directory. It has no golden/ yet.
        sequences: the sequences, in order.
        expected: `REFERENCE`, target, or `rows_of` a family -> output at all scored positions.
        artifacts: facts about each artifact, by target.
        limits: limits of the KL to the host's artifact, by target.
    """
    file = directory / FILE
    file.parent.mkdir()
    arrays: dict[str, Any] = {}
    for name, expectation in expected.items():
        for part, dtype in (("ids", "uint32"), ("logp", "float32"), ("rest", "float32")):
            array = getattr(expectation, part)
            content = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes()
            (file.parent / f"{name}.{part}.bin").write_bytes(content)
            arrays[f"{name}.{part}"] = {
                "file": f"{name}.{part}.bin",
                "dtype": dtype,
                "shape": list(array.shape),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    data = {
        "schema": SCHEMA,
        "top_k": expected[REFERENCE].ids.shape[1],
        "sequences": [
            {
                "name": s.name,
                "text": s.text,
                "add_special_tokens": s.add_special_tokens,
                "messages": None if s.messages is None else [dict(m) for m in s.messages],
                "tokens": list(s.tokens),
                "score_from": s.score_from,
            }
            for s in sequences
        ],
        "arrays": arrays,
        "artifacts": artifacts,
        "limits": limits,
    }
    file.write_text(to_json(data), encoding="utf-8")
