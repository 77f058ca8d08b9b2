"""The documentation, one topic a file: `edgellama help TOPIC` prints it, and a forge shows it.

A page begins with a title, an empty line, and its summary in one sentence.
"""

from __future__ import annotations

from importlib.resources import files

from edgellama.errors import UsageError, did_you_mean


def topics() -> dict[str, str]:
    """The summary sentence of each page, by topic, in alphabetical order.

    >>> "recipes" in topics()
    True
    """
    pages = (page for page in files(__name__).iterdir() if page.name.endswith(".md"))
    return {
        page.name.removesuffix(".md"): page.read_text(encoding="utf-8").split("\n")[2]
        for page in sorted(pages, key=lambda page: page.name)
    }


def read_topic(name: str) -> str:
    """The page about a topic, Markdown. Raises UsageError with the closest topics."""
    names = topics()
    if name not in names:
        raise UsageError(
            f"no help about {name!r}",
            remedy=f"{did_you_mean(name, names)}Topics: {', '.join(names)}.",
        )
    return (files(__name__) / f"{name}.md").read_text(encoding="utf-8")
