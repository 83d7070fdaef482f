"""Markdown: tables, and text of a user that is to be shown as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table whose columns after the first are right-aligned if they hold `numbers`."""
    rules = ["---", *(["---:" if numbers else "---"] * (len(heads) - 1))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))


def inline(text: str) -> str:
    """Text of a user that Markdown is to show as it is, in one line."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#&!~" else letter for letter in text).replace("\n", " ")


def code(text: str) -> str:
    """Text of a user as code."""
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"
