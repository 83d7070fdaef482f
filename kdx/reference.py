"""Writes the reference pages of the docs from the code: the config's sections, every component, every method.

`python -m kdx.reference docs` writes them, `python -m kdx.reference --check docs` tells whether they are up to date.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kdx.catalogue import component_rows, default_text, option_rows
from kdx.components import OPTIONAL, REQUIRED, Given, Many, Node
from kdx.data import SplitOptions
from kdx.errors import KdxError, PluginError
from kdx.plugins import KINDS, Entry, Registry, discover
from kdx.sections import ModelOptions, NodeOptions, RootOptions, RuntimeOptions, TrainOptions
from kdx.spec import METRICS, OPTIMIZER, UPDATER
from kdx.trial import CLASSES, FACTS, default_refs
from kdx.types import Shape

_NOTE = "<!-- Written by `python -m kdx.reference docs`; change the docstrings instead. -->\n"
_CONFIG_INTRODUCTION = """\
Each section of a config, with its options. What a section says besides these are options of the component that it
names with `use:`; see [components](components.md)."""
_COMPONENTS_INTRODUCTION = """\
What a config can name with `use:`. `kdx plugins NAME` shows the same for one component, also for your own."""
_METHODS_INTRODUCTION = """\
The losses and targets that come as plugins: where they are from, what they read, what they are set to, and what they
train besides the student. What they read is a default that `inputs` changes; *both* stands for student and teacher. A
method's name leads to its config, a short run on the shipped images; [components](components.md) says more of each.

*Held by* says how sure it is that a method computes what its source says: *values*, numbers made with public code (of
the authors or of a benchmark) are met; *code*, it was written after public code; *paper*, after the description
alone."""
_RECIPES = """\
Configs of methods that need no component of their own: what is new in them is how parts are put together."""
_SOURCE = re.compile(r"\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")
"""Authors, venue and year in a docstring."""
_OWN = "A rule of kdx itself"
_BOTH = ("student", "teacher")
SHOWN = ("methods", "multi", "balance", "chains")
"""The folders of configs that the page of methods leads to; the first one that has a method's name is its config."""
TEACHERS = 2
"""How many a component for several teachers is tried with."""
_OPTION = re.compile(r"[a-z_][a-z0-9_]*(?:, [a-z_][a-z0-9_]*)*: ")
"""A line of a docstring that explains options."""
_SECTIONS = (
    ("Sections", ("",), RootOptions),
    ("`data`, whatever the data set", ("data",), SplitOptions),
    ("`student` and each of `teachers`, whatever the component", ("student", "teachers"), ModelOptions),
    ("Each of `targets`, `align` and `losses`, whatever the component", ("losses", "targets"), NodeOptions),
    ("`train`", ("train",), TrainOptions),
    ("`runtime`", ("runtime",), RuntimeOptions),
)
_HELD = {"train.optimizer": OPTIMIZER, "train.updater": UPDATER, "metrics": METRICS}


def config_page() -> str:
    """The reference of the config: every section with its options, types and defaults."""
    lines = [_NOTE, "# Config reference", "", _CONFIG_INTRODUCTION, ""]
    for title, sections, schema in _SECTIONS:
        lines += [f"## {title}", "", _paragraphs(schema), "", "| option | type | default |", "|---|---|---|"]
        for key, kind, default in option_rows(schema, sections):
            lines.append(f"| `{key}` | {_cell(kind)} | {_cell(str(_HELD.get(key, default)))} |")
        lines.append("")
    return "\n".join(lines)


def components_page(registry: Registry) -> str:
    """The reference of all components that kdx brings, by kind."""
    lines = [_NOTE, "# Components", "", _COMPONENTS_INTRODUCTION, ""]
    for kind in KINDS:
        lines += [f"## {kind}", ""]
        for entry in _shipped(registry, kind):
            lines += _component(entry)
    return "\n".join(lines)


def methods_page(registry: Registry, configs: Mapping[str, str], results: str = "") -> str:
    """One row for each loss and target of the shipped plugins, then the recipes, then `results` as Markdown.

    `configs` maps the paths of configs, as `methods/kd`, to the comments at their heads.
    """
    lines = [_NOTE, "# Methods", "", _METHODS_INTRODUCTION, ""]
    entries = [
        entry
        for kind in ("targets", "losses")
        for entry in _shipped(registry, kind)
        if entry.component.__module__.startswith("kdx_plugins.")
    ]
    entries.sort(key=lambda entry: entry.component.__module__)
    for module, group in itertools.groupby(entries, key=lambda entry: str(entry.component.__module__)):
        lines += [f"## {module.partition('.')[2]}", "", inspect.cleandoc(sys.modules[module].__doc__ or ""), ""]
        lines += ["| method | what | source | held by | reads | defaults | trains |", "|---|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join(map(_cell, _method(entry, configs))) + " |" for entry in group]
        lines.append("")
    names = {entry.component.name for entry in entries}
    recipes = sorted(path for path in configs if _stem(path) not in names)
    lines += ["## Recipes", "", _RECIPES, "", "| config | what |", "|---|---|"]
    lines += [f"| [{_stem(path)}](../configs/{path}.yaml) | {_cell(configs[path])} |" for path in recipes]
    lines.append("")
    return "\n".join(lines) + (f"\n{results}" if results else "")


def pages(docs: Path) -> dict[str, str]:
    """File name in the folder `docs` -> content.

    Beside it lies `configs`, whose folders `SHOWN` have a config for each method; `docs/results/methods.md` is what
    they found.
    """
    registry = discover()
    files = [path for folder in SHOWN for path in (docs.parent / "configs" / folder).glob("*.yaml")]
    shown = {f"{path.parent.name}/{path.stem}": _head(path) for path in files if path.stem != "base"}
    return {
        "config.md": config_page(),
        "components.md": components_page(registry),
        "methods.md": methods_page(registry, shown, _read(docs / "results" / "methods.md")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or check them; the exit code is 1 where a page is not up to date."""
    parser = argparse.ArgumentParser(prog="python -m kdx.reference", description="Write or check the reference pages.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    found = pages(options.folder)
    stale = [name for name, text in found.items() if _read(options.folder / name) != text]
    if options.check:
        for name in stale:
            sys.stderr.write(f"{options.folder / name} is not up to date: python -m kdx.reference {options.folder}\n")
        return 1 if stale else 0
    for name, text in found.items():
        (options.folder / name).write_text(text, encoding="utf-8")
    return 0


def _shipped(registry: Registry, kind: str) -> list[Entry]:
    """The components of one kind that come with kdx, by name; what else is installed here is not for the docs."""
    entries = [registry.find(kind, name, "reference") for name in registry.names(kind)]
    return [entry for entry in entries if entry.component.__module__.partition(".")[0] in ("kdx", "kdx_plugins")]


def _component(entry: Entry) -> Iterator[str]:
    component: type[Any] = entry.component
    yield from (f"### {component.name}", "", f"*{entry.plugin.name}*", "", _paragraphs(component), "")
    rows = list(component_rows(entry))
    if rows:
        yield from ("| what | name | type | default |", "|---|---|---|---|")
        for row in rows:
            yield "| " + " | ".join(_cell(cell) for cell in row) + " |"
        yield ""


def _head(path: Path) -> str:
    """The comment at the head of a config, on one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), _read(path).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _stem(path: str) -> str:
    return path.rpartition("/")[2]


def _method(entry: Entry, configs: Collection[str]) -> tuple[str, ...]:
    """The cells of one method's row."""
    component: type[Node] = entry.component
    name = component.name
    shown = next((path for path in configs if _stem(path) == name), None)
    title = inspect.cleandoc(component.__doc__ or "").partition("\n")[0]
    source = _SOURCE.search(component.__doc__ or "")
    knobs = [f"`{key}` {knob.default:g}" for key, knob in component.knobs.items()]
    options = [f"`{item.name}` {default_text(item) or 'empty'}" for item in fields(component.Config)]
    return (
        f"[{name}](../configs/{shown}.yaml)" if shown else name,
        re.split(r" \(|[.:;](?: |$)", title)[0],
        " ".join(source[1].split()) if source else "kdx" if _OWN in (component.__doc__ or "") else "",
        component.confidence,
        "; ".join(f"{who}: {', '.join(f'`{what}`' for what in names)}" for who, names in _reads(component).items()),
        ", ".join([*knobs, *options]),
        ", ".join(f"`{part}`" for part in _learnt(component)),
    )


def _reads(component: type[Node]) -> dict[str, list[str]]:
    """Whose tensors a node reads by default -> which ones, then what the config names, and borrowed parts."""
    found: dict[str, list[str]] = {}
    for key, spec in component.inputs.items():
        for ref in default_refs(spec):
            owner, _, inner = ref.partition(".")
            found.setdefault("each teacher" if owner == "*" else owner, []).append(inner)
        if spec is REQUIRED or (isinstance(spec, Many) and not spec.default):
            found.setdefault("named in the config", []).append(key)
        if spec is OPTIONAL:
            found.setdefault("may be named", []).append(key)
    if "student" in found and found["student"] == found.get("teacher"):
        found = {"both": found["student"], **{who: names for who, names in found.items() if who not in _BOTH}}
    if component.borrows:
        for part in component.borrows.values():
            found.setdefault("part", []).extend(default_refs(part))
    return found


def _learnt(component: type[Node]) -> list[str]:
    """The attributes of a node that hold parameters, found by building it for shapes that it accepts."""
    problem: Exception | None = None
    for widths in ((6, 10), (8, 8)):
        inputs = {key: spec for key, spec in component.inputs.items() if spec is not OPTIONAL}
        for layouts in _layouts([key for key, spec in inputs.items() if not isinstance(spec, str)]):
            shapes = {key: _example(key, spec, widths, layouts.get(key)) for key, spec in inputs.items()}
            try:
                node = component(component.Config(), Given(shapes, FACTS))
            except KdxError as error:
                problem = error
                continue
            names = (name.partition(".")[0] for name, weight in node.named_parameters() if weight.requires_grad)
            return list(dict.fromkeys(names))
    raise PluginError(f"{component.name} can be built for none of the shapes that the reference tries: {problem}")


def _layouts(keys: list[str]) -> Iterator[dict[str, Shape | None]]:
    """What follows the channels of inputs of any layout: the same for all, then every mixture; None for logits."""
    kinds: tuple[Shape | None, ...] = ((8, 8), (), (9,), None)
    yield from ({key: kind for key in keys} for kind in kinds)  # noqa: C420  (of the type that is said)
    yield from (dict(zip(keys, mixture, strict=True)) for mixture in itertools.product(kinds, repeat=len(keys)))


def _example(key: str, spec: Any, widths: tuple[int, int], free: Shape | None) -> Any:
    """A shape of one sample, or a list of them, for an input that reads `spec`."""
    if isinstance(spec, Many):
        refs: list[str | None] = [ref.replace("*", "teacher") for ref in spec.default] or [None]
        several = not spec.default or any("*" in ref for ref in spec.default)
        return [_example(key, ref, widths, free) for ref in refs] * (TEACHERS if several else 1)
    if key == "weights":  # of teachers, as every target of weights names it
        return (TEACHERS,)
    ref = spec if isinstance(spec, str) else key
    width = widths[ref.startswith("teacher")]
    if ref == "batch.mel":
        return (1, 8, 8)
    if ref.startswith("batch."):
        return ()
    if ref.endswith("logits"):
        return (CLASSES,)
    if ref.endswith(".embedding"):
        return (width,)
    if not isinstance(spec, str):
        if free is None:
            return (CLASSES,)
        return (width, *free) if len(free) != 1 else (*free, width)
    return (width, 8, 8)


def _paragraphs(component: type[Any]) -> str:
    """The docstring, with its indented option lists as Markdown lists."""
    lines: list[str] = []
    for line in inspect.cleandoc(component.__doc__ or "").splitlines():
        option = _OPTION.match(line)
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
