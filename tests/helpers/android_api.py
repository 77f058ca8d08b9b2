"""Finds android.* members that class files use and that API 36 does not have.

The source is type stubs of API 36's android.jar (PyPI `chaquopy-stubs-android`). Members are compared by name and
number of arguments, through superclasses, and include those that the app's own classes inherit. Types of arguments
and the lowest API that has a member are not checked.
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
class ApiClass:
    """A class of the API: `members` maps a name to its numbers of arguments, or to FIELD.

    Names of `bases` are looked up in `scopes`: the package and the enclosing classes.
    """

    members: dict[str, set[int]] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    scopes: tuple[str, ...] = ()


class Api:
    """Classes of the stubs in a directory."""

    def __init__(self, stubs: Path) -> None:
        self.classes: dict[str, ApiClass] = {}
        for file in sorted(stubs.rglob("*.pyi")):
            package = ".".join(p.removesuffix("-stubs") for p in file.relative_to(stubs).parts[:-1])
            self._add(ast.parse(file.read_text(encoding="utf-8")).body, (package,))

    def has(self, owner: str, name: str, arguments: int) -> bool:
        """True if `owner` (with dots between nested classes) or a base of it has the member.

        `arguments` is the number of arguments, or FIELD.
        """
        api_class = self.classes.get(owner)
        if api_class is None:
            return False
        numbers = api_class.members.get(name, set())
        if arguments in numbers or (arguments != FIELD and ANY_NUMBER in numbers):
            return True
        return any(
            self.has(candidate, name, arguments)
            for base in api_class.bases
            for candidate in (base, *(f"{scope}.{base}" for scope in api_class.scopes))
            if candidate in self.classes and candidate != owner
        )

    def _add(self, body: Iterable[ast.stmt], scopes: tuple[str, ...]) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef):
                continue
            name = f"{scopes[-1]}.{node.name}"
            api_class = ApiClass(bases=[ast.unparse(b).partition("[")[0] for b in node.bases], scopes=scopes)
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    static = any(getattr(d, "id", "") == "staticmethod" for d in item.decorator_list)
                    count = len(item.args.posonlyargs) + len(item.args.args) - (not static)
                    numbers = api_class.members.setdefault(item.name, set())
                    numbers.add(count)
                    if item.args.vararg:
                        numbers.add(ANY_NUMBER)
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    api_class.members.setdefault(item.target.id, set()).add(FIELD)
            self.classes[name] = api_class
            self._add(node.body, (*scopes, name))


@dataclass(frozen=True, order=True)
class Reference:
    """Use of a member: the class named in the bytecode, and `arguments` as in `Api.has`."""

    owner: str
    name: str
    arguments: int


def unknown(api: Api, files: Sequence[Path]) -> tuple[int, list[Reference]]:
    """Returns the number of references to android.* and those that API 36 does not have."""
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
    missing = [
        r
        for r, owners in android.items()
        if not any(api.has(owner.replace("$", "."), r.name, r.arguments) for owner in owners)
    ]
    return len(android), sorted(missing)


def _references(text: str, own_class: str) -> Iterator[Reference]:
    pattern = r'// (Method|InterfaceMethod|Field) (?:([\w/$]+)\.)?"?([\w<>$]+)"?:(\S+)'
    for kind, owner, name, descriptor in re.findall(pattern, text):
        arguments = FIELD
        if kind != "Field":
            inside = descriptor[1 : descriptor.index(")")]
            arguments = len(re.findall(r"\[*(?:L[^;]+;|[ZBCSIJFD])", inside))
        method = "__init__" if name == "<init>" else name
        yield Reference((owner or own_class).replace("/", "."), method, arguments)


def _android_owners(owner: str, name: str, own: dict[str, tuple[list[str], set[str]]]) -> Iterator[str]:
    """Candidate android.* classes of a member: the owner, or the bases of an own class that lacks the member."""
    if owner.startswith("android."):
        yield owner
    elif owner in own and name not in own[owner][1] and name != "__init__":
        for base in own[owner][0]:
            yield from _android_owners(base, name, own)
