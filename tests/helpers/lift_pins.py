"""Removes pins and upper bounds of the dependencies from pyproject.toml, to try the newest versions.

python -m tests.helpers.lift_pins
"""

from __future__ import annotations

import re

from tests.helpers.paths import ROOT

# A version after the name of a package or its extras: `==1.2`, `>=1.2` or `>=1.2,<1.4`.
_VERSION = re.compile(r'(?<=[A-Za-z0-9_\]])(?:==|>=)([0-9][0-9.]*)(?:,<=?[0-9.]+)?(?=[";])')


def lifted(text: str) -> str:
    """The text of pyproject.toml, each requirement with its lower bound alone.

    >>> lifted('"torch==2.13.0", "executorch>=1.4.0,<=1.5.1"')
    '"torch>=2.13.0", "executorch>=1.4.0"'
    """
    return _VERSION.sub(r">=\1", text)


def main() -> None:
    file = ROOT / "pyproject.toml"
    file.write_text(lifted(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
