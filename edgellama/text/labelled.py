"""Labelled texts of a user: one JSON object a line, with the keys text, label and, if wanted, group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.errors import TextError
from edgellama.files import digest, read_json_bytes

_FORM = 'A line is {"text": TEXT, "label": NAME} or {"text": TEXT, "label": NAME, "group": NAME}, in UTF-8.'
NO_GROUP = "all"


@dataclass(frozen=True)
class LabelledText:
    """A text with its true label. group: for example its language; NO_GROUP without one."""

    text: str
    label: str
    group: str = NO_GROUP


@dataclass(frozen=True)
class LabelledTexts:
    """Labelled texts in their order. name: of the file, for messages."""

    name: str
    rows: tuple[LabelledText, ...]

    @property
    def sha256(self) -> str:
        """Hash of the rows in their order, whatever the form of the file."""
        return digest([[row.text, row.label, row.group] for row in self.rows])

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted."""
        return tuple(sorted({row.group for row in self.rows}))

    def check_labels(self, names: Sequence[str]) -> None:
        """Raises TextError for a label that is not one of `names`."""
        for number, row in enumerate(self.rows, 1):
            if row.label not in names:
                raise TextError(
                    f"{self.name}: row {number} has the label {row.label!r:.60}, and the classifier has {', '.join(names)}",
                    remedy="Correct the label; upper and lower case count.",
                )

    def truth(self, names: Sequence[str]) -> list[int]:
        """Number of each row's label in `names`."""
        return [names.index(row.label) for row in self.rows]


def read_labelled(path: Path) -> LabelledTexts:
    """Reads labelled texts. Blank lines are skipped. Raises TextError."""
    rows = tuple(_labelled(path, number, data) for number, data in json_lines(path))
    if len(rows) < 2:
        raise TextError(
            f"{path}: holds {len(rows)} labelled texts, and 2 are the least", remedy="Give more texts."
        )
    return LabelledTexts(path.name, rows)


def json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with the number of its line. Raises TextError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}", remedy="Check the path of the file.") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start})", remedy="Save it as UTF-8."
        ) from error
    return [(number, _object(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        data = read_json_bytes(line.encode())
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}: line {number} is not JSON ({error})", remedy=_FORM) from error
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise TextError(f"{path}: line {number} is no object with a text", remedy=_FORM)
    return data


def _labelled(path: Path, number: int, data: dict[str, Any]) -> LabelledText:
    label, group = data.get("label"), data.get("group", NO_GROUP)
    if not isinstance(label, str) or not isinstance(group, str) or not group.strip():
        raise TextError(f"{path}: line {number} has no label, or a group that is no text", remedy=_FORM)
    return LabelledText(data["text"], label, group)
