"""Writes the reference pages of the docs from the code: the config's sections, and every component.

`python -m kdx.reference docs` writes them, `python -m kdx.reference --check docs` tells whether they are up to date.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kdx.catalogue import component_rows, default_text
from kdx.data import SplitOptions
from kdx.options import type_text
from kdx.plugins import KINDS, Registry, discover
from kdx.spec import METRICS, OPTIMIZER, UPDATER, ModelOptions, NodeOptions, RootOptions, RuntimeOptions, TrainOptions

_NOTE = "<!-- Written by `python -m kdx.reference docs`; change the docstrings instead. -->\n"
_CONFIG_INTRODUCTION = """\
Each section of a config, with its options. What a section says besides these are options of the component that it
names with `use:`; see [components](components.md)."""
_COMPONENTS_INTRODUCTION = """\
What a config can name with `use:`. `kdx plugins NAME` shows the same for one component, also for your own."""
_SECTIONS = (
    ("Sections", "", RootOptions),
    ("`data`, whatever the data set", "data.", SplitOptions),
    ("`student` and each of `teachers`, whatever the component", "student.", ModelOptions),
    ("Each of `targets`, `align` and `losses`, whatever the component", "losses.NAME.", NodeOptions),
    ("`train`", "train.", TrainOptions),
    ("`runtime`", "runtime.", RuntimeOptions),
)
_HELD = {"train.optimizer": OPTIMIZER, "train.updater": UPDATER, "metrics": METRICS}


def config_page() -> str:
    """The reference of the config: every section with its options, types and defaults."""
    lines = [_NOTE, "# Config reference", "", _CONFIG_INTRODUCTION, ""]
    for title, prefix, schema in _SECTIONS:
        lines += [f"## {title}", "", _paragraphs(schema), "", "| option | type | default |", "|---|---|---|"]
        for item in fields(schema):
            key = f"{prefix}{item.name}"
            held = _HELD.get(key)
            lines.append(
                f"| `{key}` | {_cell(type_text(item.type))} | {_cell(str(held) if held else default_text(item))} |"
            )
        lines.append("")
    return "\n".join(lines)


def components_page(registry: Registry) -> str:
    """The reference of all components that kdx brings, by kind."""
    lines = [_NOTE, "# Components", "", _COMPONENTS_INTRODUCTION, ""]
    for kind in KINDS:
        names = registry.names(kind)
        lines += [f"## {kind}", ""]
        for name in names:
            lines += _component(registry, kind, name)
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """File name in the docs -> content."""
    registry = discover()
    return {"config.md": config_page(), "components.md": components_page(registry)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or check them; the exit code is 1 where a page is not up to date."""
    parser = argparse.ArgumentParser(prog="python -m kdx.reference", description="Write or check the reference pages.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    stale = [name for name, text in pages().items() if _read(options.folder / name) != text]
    if options.check:
        for name in stale:
            sys.stderr.write(f"{options.folder / name} is not up to date: python -m kdx.reference {options.folder}\n")
        return 1 if stale else 0
    for name, text in pages().items():
        (options.folder / name).write_text(text, encoding="utf-8")
    return 0


def _component(registry: Registry, kind: str, name: str) -> Iterator[str]:
    entry = registry.find(kind, name, "reference")
    component: type[Any] = entry.component
    yield from (f"### {name}", "", f"*{entry.plugin.name}*", "", _paragraphs(component), "")
    rows = list(component_rows(entry))
    if rows:
        yield from ("| what | name | type | default |", "|---|---|---|---|")
        for row in rows:
            yield "| " + " | ".join(_cell(cell) for cell in row) + " |"
        yield ""


def _paragraphs(component: type[Any]) -> str:
    """The docstring, with its indented option lists as Markdown lists."""
    lines: list[str] = []
    for line in inspect.cleandoc(component.__doc__ or "").splitlines():
        head, colon, _ = line.partition(": ")
        option = colon and head.replace("_", "").isalnum() and head.islower() and not line.startswith(" ")
        if option and lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(f"- {line}" if option else f"  {line.strip()}" if line.startswith("    ") else line)
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
