"""Which android.* members do class files use that API 36 does not have?

Answered from type stubs of API 36's android.jar (PyPI `chaquopy-stubs-android`): by name and number of arguments, through
superclasses, members included that the app's own classes inherit. Types of arguments are not compared, and nothing
is said about the lowest API that has a member.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.android_tools import call

FIELD = -1
ANY_NUMBER = -2


@dataclass
class Known:
    """A class of the API: member -> numbers of arguments (or FIELD), and where its bases' names are looked up."""

    members: dict[str, set[int]] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    scopes: tuple[str, ...] = ()


class Api:
    """The classes of the stubs in a directory."""

    def __init__(self, stubs: Path) -> None:
        self.classes: dict[str, Known] = {}
        for file in sorted(stubs.rglob("*.pyi")):
            package = ".".join(p.removesuffix("-stubs") for p in file.relative_to(stubs).parts[:-1])
            self._add(ast.parse(file.read_text(encoding="utf-8")).body, (package,))

    def has(self, owner: str, name: str, arguments: int) -> bool:
        """Whether `owner` (with dots between nested classes) or a base of it has the member."""
        known = self.classes.get(owner)
        if known is None:
            return False
        found = known.members.get(name, set())
        if arguments in found or (arguments != FIELD and ANY_NUMBER in found):
            return True
        return any(
            self.has(candidate, name, arguments)
            for base in known.bases
            for candidate in (base, *(f"{scope}.{base}" for scope in known.scopes))
            if candidate in self.classes and candidate != owner
        )

    def _add(self, body: Iterable[ast.stmt], scopes: tuple[str, ...]) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef):
                continue
            name = f"{scopes[-1]}.{node.name}"
            known = Known(bases=[ast.unparse(b).partition("[")[0] for b in node.bases], scopes=scopes)
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    static = any(getattr(d, "id", "") == "staticmethod" for d in item.decorator_list)
                    count = len(item.args.posonlyargs) + len(item.args.args) - (not static)
                    numbers = known.members.setdefault(item.name, set())
                    numbers.add(count)
                    if item.args.vararg:
                        numbers.add(ANY_NUMBER)
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    known.members.setdefault(item.target.id, set()).add(FIELD)
            self.classes[name] = known
            self._add(node.body, (*scopes, name))


@dataclass(frozen=True, order=True)
class Reference:
    """A use of a member: the class that the bytecode names, and arguments as `arguments` of `Api.has`."""

    owner: str
    name: str
    arguments: int


def unknown(api: Api, files: Sequence[Path]) -> tuple[int, list[Reference]]:
    """(references to android.* that were looked up, those that API 36 does not have)."""
    own: dict[str, tuple[list[str], set[str]]] = {}
    references: set[Reference] = set()
    for text in re.split(r"^Compiled from ", call("javap", "-c", "-p", *map(str, files)), flags=re.MULTILINE):
        head = re.search(r"(?:class|interface) ([\w.$]+)[^\n]*\{", text)
        if head is None:
            continue
        line = re.sub(r"<[^<>{}]*>", "", re.sub(r"<[^<>{}]*>", "", head[0]))
        bases = re.findall(r"(?:extends|implements|,)\s*([\w.$]+)", line)
        declared = set(re.findall(r"^  \S.*?([\w$]+)(?:\(.*)?;$", text, re.MULTILINE))
        own[head[1]] = (bases, declared)
        references |= set(_references(text, head[1]))
    android = {
        reference: owners
        for reference in references
        if (owners := list(_android_owners(reference.owner, reference.name, own)))
    }
    bad = [
        r
        for r, owners in android.items()
        if not any(api.has(owner.replace("$", "."), r.name, r.arguments) for owner in owners)
    ]
    return len(android), sorted(bad)


def _references(text: str, me: str) -> Iterator[Reference]:
    pattern = r'// (Method|InterfaceMethod|Field) (?:([\w/$]+)\.)?"?([\w<>$]+)"?:(\S+)'
    for kind, owner, name, descriptor in re.findall(pattern, text):
        arguments = FIELD
        if kind != "Field":
            inside = descriptor[1 : descriptor.index(")")]
            arguments = len(re.findall(r"\[*(?:L[^;]+;|[ZBCSIJFD])", inside))
        yield Reference((owner or me).replace("/", "."), "__init__" if name == "<init>" else name, arguments)


def _android_owners(owner: str, name: str, own: dict[str, tuple[list[str], set[str]]]) -> Iterator[str]:
    """The android.* classes that a member may come from: the owner, or bases of our own class that lacks it."""
    if owner.startswith("android."):
        yield owner
    elif owner in own and name not in own[owner][1] and name != "__init__":
        for base in own[owner][0]:
            yield from _android_owners(base, name, own)
