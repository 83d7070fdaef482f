"""Shows what plugins there are, and one component with its options, inputs and knobs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kdx.components import OPTIONAL, REQUIRED, Knob, Many, Node
from kdx.errors import PluginError, did_you_mean
from kdx.options import type_text
from kdx.plugins import KINDS, Entry, Registry


def plugin_table(registry: Registry) -> Table:
    """Every plugin with its origin and what it supplies; those that failed to load are shown with the reason."""
    table = Table(title="plugins", title_justify="left", show_lines=True)
    for column in ("plugin", "origin", "supplies"):
        table.add_column(column, overflow="fold")
    for plugin in registry.plugins:
        supplied = [
            f"{kind}: {', '.join(names)}"
            for kind in KINDS
            if (
                names := sorted(
                    name for (at, name), entry in registry.entries.items() if at == kind and entry.plugin == plugin
                )
            )
        ]
        table.add_row(plugin.name, plugin.origin, "\n".join(supplied) or "watches runs")
    for name, problem in registry.failures.items():
        table.add_row(name, Text("not loaded", style="red"), Text(problem, style="red"))
    return table


def component_view(registry: Registry, name: str) -> Iterator[RenderableType]:
    """What a component does, its options with types and defaults, its inputs and its knobs."""
    entries = [entry for (_, known), entry in registry.entries.items() if known == name]
    if not entries:
        raise PluginError(
            f"no component is named {name!r}; {did_you_mean(name, {known for _, known in registry.entries})}"
        )
    for entry in entries:
        component = entry.component
        yield Text(f"{entry.kind}: {component.name}  ({entry.plugin.name}, {entry.plugin.origin})", style="bold")
        yield Text(inspect.getdoc(component) or "")
        table = Table(show_header=True)
        for column in ("what", "name", "type", "default"):
            table.add_column(column, overflow="fold")
        for row in component_rows(entry):
            table.add_row(*row)
        if table.row_count:
            yield table


def component_rows(entry: Entry) -> Iterator[tuple[str, str, str, str]]:
    """One row per input, knob, borrowed part and option: what it is, name, type or range, default."""
    component: type[Any] = entry.component
    if issubclass(component, Node):
        for name, spec in component.inputs.items():
            yield "input", name, "refs" if isinstance(spec, Many) else "ref", _input_default(spec)
        for name, knob in component.knobs.items():
            yield "knob", name, f"number, schedule or ref{_range(knob)}", f"{knob.default:g}"
        if entry.kind == "losses":
            yield "knob", "weight", "number, schedule or ref", "1"
        for name, part in component.borrows.items():
            yield ("part", name, "parts of models", ", ".join(part.default)) if isinstance(part, Many) else (
                "part", name, "part of a model", part
            )  # fmt: skip
    for item in fields(component.Config):
        yield "option", item.name, type_text(item.type), default_text(item)


def _input_default(spec: Any) -> str:
    if isinstance(spec, Many):
        return ", ".join(spec.default) or "required"
    return "required" if spec is REQUIRED else "none" if spec is OPTIONAL else str(spec)


def _range(knob: Knob) -> str:
    parts = [
        f"above {knob.above:g}" if knob.above is not None else "",
        f"at least {knob.at_least:g}" if knob.at_least is not None else "",
        f"at most {knob.at_most:g}" if knob.at_most is not None else "",
    ]
    return "".join(f", {part}" for part in parts if part)


def default_text(item: Field[Any]) -> str:
    """The default of an option, or `required`."""
    if item.default is not MISSING:
        return "none" if item.default is None else str(item.default)
    if item.default_factory is not MISSING:
        return str(item.default_factory())
    return "required"
