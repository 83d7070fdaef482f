"""`docs/promises.md` names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<promise>.+?) \| `(?P<file>tests/\w+\.py)::(?P<name>\w+)` \|$")


def table() -> list[str]:
    """The rows of the last table of the page."""
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    return text[text.index("| promise | test |") :].splitlines()[2:]


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_there_are_promises_and_none_is_made_twice() -> None:
    assert len(table()) > 10
    assert len(set(table())) == len(table())


@pytest.mark.parametrize("row", table())
def test_a_promise_has_a_test_that_exists(row: str) -> None:
    found = ROW.match(row)
    assert found, f"expected `| promise | tests/FILE.py::NAME |`: {row}"
    assert found["name"].startswith("test_")
    assert (ROOT / found["file"]).is_file(), found["file"]
    assert found["name"] in names_in(found["file"])
