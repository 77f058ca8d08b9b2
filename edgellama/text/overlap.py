"""Overlap of texts: passages that occur twice, and fingerprints of a text that is not kept.

A passage is a run of PASSAGE letters and digits, in lower case. Spaces, line breaks and punctuation do not
count. A copy with other line ends or in another order therefore has the same passages. Each position of a
text begins a passage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# About six words. Of the texts that ship with edgellama, 0.1 % of the passages occur in another one.
PASSAGE = 32
# Fingerprints kept of a text are 512 to 1,024, whatever its size.
MOST_PRINTS = 1024
LEAST_SAMPLING = 8  # one passage in 8 is kept even of a short text
_CHUNK = 1 << 20  # characters hashed at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Letters:
    """Letters and digits of a text.

    Attributes:
        codes: lower-case code points, uint64 [n].
        places: index in the text of each, int64 [n].
    """

    codes: Hashes
    places: Places

    @classmethod
    def of(cls, text: str) -> Letters:
        """The letters and digits of `text`."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        distinct, index = np.unique(points, return_inverse=True)
        lower = [ord(c.lower()[0]) if c.isalnum() else 0 for c in map(chr, distinct)]
        codes = np.array(lower, np.uint64)[index]
        places = np.flatnonzero(codes)
        return cls(codes[places], places)

    def passages(self) -> Hashes:
        """Hash of the passage at each position, uint64 [n - PASSAGE + 1]. Equal passages have equal hashes."""
        count = max(0, len(self.codes) - PASSAGE + 1)
        hashes = np.zeros(count, np.uint64)
        for i in range(PASSAGE):
            hashes = hashes * _FACTOR + self.codes[i : i + count]
        # The low bits of a polynomial depend on the low bits of its terms only. Sampling needs all bits.
        hashes = (hashes ^ (hashes >> np.uint64(32))) * _FACTOR
        return hashes ^ (hashes >> np.uint64(29))


def repeated_letters(texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    """Letters up to each place, and those of them in a passage that occurred before: int64 [2, len(text) + 1].

    A passage occurred before if it is in an earlier text or further up in the same one. The first occurrence
    is not counted.

    >>> line = "It is a truth universally acknowledged, that it rains. "
    >>> (counts,) = repeated_letters([line + line])
    >>> counts[:, -1].tolist()
    [88, 44]
    """
    letters = [Letters.of(text) for text in texts]
    hashes = [part.passages() for part in letters]
    _, first = np.unique(np.concatenate(hashes), return_index=True)
    repeated = np.ones(sum(map(len, hashes)), bool)
    repeated[first] = False
    counts, start = [], 0
    for text, part, own in zip(texts, letters, hashes, strict=True):
        edges = np.zeros(len(part.codes) + 1, np.int64)
        begins = np.flatnonzero(repeated[start : start + len(own)])
        np.add.at(edges, begins, 1)
        np.add.at(edges, begins + PASSAGE, -1)
        marks = np.zeros((2, len(text) + 1), np.int64)
        marks[0, part.places + 1] = 1
        marks[1, part.places + 1] = np.cumsum(edges)[:-1] > 0
        counts.append(np.cumsum(marks, axis=1))
        start += len(own)
    return counts


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of a sample of a text's passages. They recognise an excerpt, and do not hold the text.

    Attributes:
        sha256: hash of the text in UTF-8. It is the key of the prints, so that two texts share no print.
        sampling: one passage in this many is kept, chosen by its hash. A power of two.
        prints: 64-bit hashes in hexadecimal digits, sorted.
    """

    sha256: str
    sampling: int
    prints: frozenset[str]

    @classmethod
    def of(cls, content: str) -> Fingerprints:
        """Fingerprints of a text."""
        sampling = LEAST_SAMPLING
        while len(content) > sampling * MOST_PRINTS:
            sampling *= 2
        sha256 = text_sha256(content)
        return cls(sha256, sampling, frozenset(_prints(content, sampling, sha256)))

    @classmethod
    def from_dict(cls, data: Any) -> Fingerprints:
        """Fingerprints as `to_dict` wrote them. Raises ValueError, TypeError or KeyError for other data."""
        row, size = data["fingerprints"], 16
        sampling, joined = int(row["sampling"]), str(row["prints"])
        sha256 = str(data["sha256"])
        if (
            sampling < 1
            or sampling & (sampling - 1)
            or len(joined) % size
            or len(bytes.fromhex(sha256)) != 32
        ):
            raise ValueError("fingerprints of another form")
        return cls(sha256, sampling, frozenset(joined[i : i + size] for i in range(0, len(joined), size)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "fingerprints": {"sampling": self.sampling, "prints": "".join(sorted(self.prints))},
        }

    def share_of(self, content: str) -> float:
        """Estimated share of another text's passages that occur in this text. Two prints at least count."""
        if not self.prints:
            return 0.0
        sampled = set(_prints(content, self.sampling, self.sha256))
        known = len(sampled & self.prints)
        return known / len(sampled) if known > 1 else 0.0


def text_sha256(content: str) -> str:
    """Hash of a text in UTF-8."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _prints(content: str, sampling: int, key: str) -> Iterator[str]:
    """Keyed hashes of the sampled passages, the same passage as often as it occurs."""
    mask = np.uint64(sampling - 1)
    for start in range(0, len(content), _CHUNK):
        # Passages that begin near the end of a chunk are lost: one in some ten thousand.
        letters = Letters.of(content[start : start + _CHUNK])
        codes = letters.codes.astype("<u4")
        for i in np.flatnonzero((letters.passages() & mask) == 0).tolist():
            passage = codes[i : i + PASSAGE].tobytes()
            yield hashlib.blake2b(passage, key=bytes.fromhex(key), digest_size=8).hexdigest()
