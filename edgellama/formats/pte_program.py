"""Program of a .pte: the flatbuffer at its beginning, as data that can be changed and written again.

Weights and delegates lie in segments behind the flatbuffer. They are copied byte for byte, so a changed
program runs the parts of the original file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.exir._serialize._flatbuffer import (
    _get_flatc_path,
    _prepare_schema,
    _program_flatbuffer_to_json,
)
from executorch.exir._serialize._program import (
    _ExtendedHeader,
    _get_extended_header,
    _insert_flatbuffer_header,
    aligned_size,
    pad_to,
)

from edgellama.formats.pte import readable
from edgellama.host.log_filters import ignored_deprecations

_SEGMENTS = 128  # bytes; alignment of the first segment


@dataclass(frozen=True)
class PteProgram:
    """Program of the .pte at `path`.

    Attributes:
        data: the flatbuffer as JSON data, in the names of ExecuTorch's schema.
        segments: (offset of the first segment in the file, bytes of all segments).
    """

    path: Path
    data: dict[str, Any]
    segments: tuple[int, int]

    @classmethod
    def read(cls, path: Path) -> PteProgram:
        """Reads the program. Raises BundleError if it is not readable."""
        with readable(path), path.open("rb") as file:
            head = file.read(_ExtendedHeader.NUM_HEAD_BYTES)
            header = _get_extended_header(head)
            if head[4:6] != b"ET" or header is None or not header.is_valid():
                raise ValueError("no ExecuTorch header with segments")
            file.seek(0)
            flatbuffer = file.read(header.program_size)
            with ignored_deprecations():
                data = json.loads(_program_flatbuffer_to_json(flatbuffer))
        return cls(path, data, (header.segment_base_offset, header.segment_data_size))

    def method(self, name: str) -> dict[str, Any]:
        """The execution plan called `name`. Raises LookupError if there is none."""
        for plan in self.data["execution_plan"]:
            if plan["name"] == name:
                return dict(plan)
        raise LookupError(name)

    def write(self, path: Path) -> None:
        """Writes a .pte of this program with the segments of the file that it was read from."""
        flatbuffer, alignment = self._flatbuffer()
        header_bytes = aligned_size(_ExtendedHeader.EXPECTED_LENGTH, alignment)
        program_bytes = header_bytes + len(flatbuffer)
        base = aligned_size(program_bytes, _SEGMENTS)
        header = _ExtendedHeader(program_bytes, base, self.segments[1]).to_bytes()
        program = _insert_flatbuffer_header(
            flatbuffer, r"ET[0-9a-zA-Z][0-9a-zA-Z]", pad_to(header, header_bytes)
        )
        with path.open("wb") as file, self.path.open("rb") as source:
            file.write(pad_to(program, base))
            source.seek(self.segments[0])
            shutil.copyfileobj(source, file, 1 << 20)

    def _flatbuffer(self) -> tuple[bytes, int]:
        """(flatbuffer without header, its alignment)."""
        with tempfile.TemporaryDirectory() as directory, ignored_deprecations():
            schema = _prepare_schema(directory)
            source = Path(directory) / "program.json"
            source.write_text(json.dumps(self.data), encoding="utf-8")
            command = [_get_flatc_path(), "--binary", "-o", directory, schema.root_path, str(source)]
            subprocess.run(command, capture_output=True, check=True)
            (output,) = (p for p in Path(directory).iterdir() if p.suffix in (".pte", ".bin"))
            return output.read_bytes(), schema.max_alignment
