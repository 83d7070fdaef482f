"""Shows what plugins there are, and one component with all that its section may say."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kdx.components import OPTIONAL, REQUIRED, Knob, Many, Node
from kdx.data import SplitOptions
from kdx.errors import PluginError, did_you_mean
from kdx.options import type_text
from kdx.plugins import KINDS, Entry, Registry
from kdx.sections import ONLY, ModelOptions, NodeOptions

_SECTIONS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "datasets": (SplitOptions, ("data",)),
    "models": (ModelOptions, ("student", "teachers")),
    "targets": (NodeOptions, ("targets",)),
    "aligners": (NodeOptions, ("align",)),
    "losses": (NodeOptions, ("losses",)),
}
"""What the engine reads of the sections that name a component of a kind, and these sections."""
_OF_PARTS = ("teachers", "targets", "align", "losses")
"""The sections whose keys are names that a person gives."""


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
    """What a component does, its options with types and defaults, its inputs and its knobs, and what the engine reads
    of its section whatever the component.
    """
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
        if entry.kind in _SECTIONS:
            for path, kind, default in option_rows(*_SECTIONS[entry.kind]):
                table.add_row("engine", path, kind, default)
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


def option_rows(schema: type[Any], sections: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """One row per option that the engine reads in some of these sections: path, type, default.

    The path is that of the first of them, but for what parts of another one alone may say.
    """
    for item in fields(schema):
        section = item.metadata.get(ONLY, sections[0])
        if section in sections:
            path = f"{section}.NAME." if section in _OF_PARTS else f"{section}." if section else ""
            yield f"{path}{item.name}", type_text(item.type), default_text(item)


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
