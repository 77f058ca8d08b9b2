"""Reports as JUnit XML (`--junit`).

Names and texts come from untrusted files. They are escaped, and letters that XML 1.0 forbids are written as
escapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from edgellama.report.metrics import HEADLINE
from edgellama.report.numbers import limit, number
from edgellama.report.tables import printable


def to_junit(name: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns JUnit XML: a suite for each target, a case for each check.

    An inconclusive check is an error, not a failure: the job is as red, and says that the answer is missing.
    """
    root = ElementTree.Element("testsuites", {"name": "edgellama", **_counts(reports)})
    for report in reports:
        suite = ElementTree.SubElement(
            root, "testsuite", {"name": _xml(f"{name}:{report['target']}"), **_counts([report])}
        )
        properties = ElementTree.SubElement(suite, "properties")
        for key in (key for key in HEADLINE if not key.endswith("_ci95")):
            if report["quality"].get(key) is not None:
                ElementTree.SubElement(properties, "property", name=key, value=repr(report["quality"][key]))
        for key in ("tokens", "windows", "runtime", "verdict"):
            ElementTree.SubElement(properties, "property", name=key, value=_xml(str(report[key])))
        for check in report["checks"]:
            group = check["name"].partition(".")[0]
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=_xml(f"edgellama.{report['target']}.{group}"),
                name=_xml(check["name"]),
                time="0",
            )
            if check["verdict"] != "pass":
                message = f"{check['name']} is {number(check['value'])}, limit {limit(check['limit'])}"
                problem = ElementTree.SubElement(
                    case,
                    "failure" if check["verdict"] == "fail" else "error",
                    message=_xml(message),
                    type=check["verdict"],
                )
                problem.text = _xml(f"{message}\n{check['detail']}".strip())
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Numbers of checks by verdict. Times are 0, because a gate measures once and then answers all checks."""
    verdicts = [check["verdict"] for report in reports for check in report["checks"]]
    return {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count("fail")),
        "errors": str(verdicts.count("inconclusive")),
        "time": "0",
    }


def _xml(text: str) -> str:
    """Escapes the characters that XML 1.0 forbids (controls, surrogates, U+FFFE and U+FFFF)."""
    return "\n".join(printable(line) for line in text.split("\n"))
