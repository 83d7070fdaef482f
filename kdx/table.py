"""Shows a plan: as text, as a table for the terminal, and as a Mermaid flow chart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from kdx.calls import Call, ModelCall, NodeCall
from kdx.components import Schedule
from kdx.options import plain_options
from kdx.plan import Plan
from kdx.reach import base_of
from kdx.spec import ModelSpec

COLUMNS = ("side", "what", "component", "reads", "gives")


def plan_rows(plan: Plan) -> Iterator[tuple[str, str, str, str, str]]:
    """One row per call: side, config path, component with plugin, what it reads, what it gives with shapes."""
    for side, calls in (("teacher", plan.teacher_calls), ("learner", plan.learner_calls), ("learner", plan.loss_calls)):
        for call in calls:
            yield (
                side,
                _title(call),
                _component(plan, call),
                "\n".join(_reads(plan, call)),
                "\n".join(_gives(plan, call)),
            )


def plan_table(plan: Plan) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=f"{plan.spec.root.name}: the plan", title_justify="left", show_lines=True)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for row in plan_rows(plan):
        table.add_row(*row)
    return table


def plan_text(plan: Plan) -> str:
    """The plan as plain text: equal plans give equal texts, so a `diff` shows what a variant changes."""
    lines: list[str] = []
    for side, where, component, reads, gives in plan_rows(plan):
        lines.append(f"[{side}] {where}: {component}")
        lines += [f"    reads {line}" for line in reads.splitlines()]
        lines += [f"    gives {line}" for line in gives.splitlines()]
    lines += remarks(plan)
    return "\n".join(lines) + "\n"


def remarks(plan: Plan) -> list[str]:
    """What a reader should know besides the calls."""
    lines = list(plan.notes)
    if plan.kept:
        lines.append(f"from the teacher side to the learner: {', '.join(plan.kept)}")
    if plan.unused:
        lines.append(f"not built, because no loss needs it: {', '.join(plan.unused)}")
    return lines


def plan_mermaid(plan: Plan) -> str:
    """The plan as a Mermaid flow chart, models and nodes as boxes and tensors as arrows."""
    lines = ["flowchart LR"]
    sides = {"teacher": plan.teacher_calls, "learner": (*plan.learner_calls, *plan.loss_calls)}
    for side, calls in sides.items():
        if calls:
            lines.append(f"  subgraph {side}[{side} side]")
            for call in calls:
                left, right = (
                    ("([", "])")
                    if isinstance(call, ModelCall)
                    else ("{{", "}}")
                    if call.kind == "losses"
                    else ("[", "]")
                )
                lines.append(f'    {_identifier(call.name)}{left}"{_title(call)}<br/>{_short(plan, call)}"{right}')
            lines.append("  end")
    makers = {key: call.name for call in plan.calls for key in call.gives}
    streams: dict[str, None] = {}
    arrows: list[str] = []
    for call in plan.calls:
        for key in dict.fromkeys(call.reads):
            if key.startswith("batch."):
                streams[key] = None
                arrows.append(f"  {_identifier(key)} --> {_identifier(call.name)}")
            elif key in makers:
                field = key.rpartition(".")[2]
                arrows.append(
                    f'  {_identifier(makers[key])} -- "{field} {_dims(plan, key)}" --> {_identifier(call.name)}'
                )
    lines += [f'  {_identifier(key)}[/"{key}"/]' for key in streams]
    return "\n".join(lines + arrows) + "\n"


def _title(call: Call) -> str:
    """The config path of a call, with the view that it runs on."""
    _, at, view = call.name.partition("@")
    return f"{call.where}{at}{view}"


def _component(plan: Plan, call: Call) -> str:
    """What a call runs: component, options that are not the default, plugin, number of parameters."""
    count = sum(parameter.numel() for parameter in call.module.parameters())
    learnt = f", {count:,} parameters" if count or isinstance(call, ModelCall) else ""
    if isinstance(call, ModelCall):
        spec = plan.spec.models[base_of(call.name)]
        return f"{_short(plan, call)}{_changed(spec.options, 'model')}{_weights(spec)}{learnt}"
    node = {**plan.spec.nodes, **{f"losses.{name}": node for name, node in plan.spec.losses.items()}}[call.name]
    return f"{_short(plan, call)}{_changed(node.options)} ({node.entry.plugin.name}){learnt}"


def _short(plan: Plan, call: Call) -> str:
    if isinstance(call, NodeCall):
        return type(call.module).name
    spec = plan.spec.models[base_of(call.name)]
    model = plain_options(spec.options).get("model")
    return f"{spec.entry.component.name} {model}" if model else str(spec.entry.component.name)


def _changed(options: Any, *hidden: str) -> str:
    """The options that a config has set to something else than the default."""
    values = plain_options(options)
    set_ = {item.name: values[item.name] for item in fields(options) if values[item.name] != _default(item)}
    listing = ", ".join(f"{name} {value}" for name, value in set_.items() if name not in hidden)
    return f"({listing})" if listing else ""


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _weights(spec: ModelSpec) -> str:
    if spec.engine.run is not None:
        return f", weights of the run {spec.engine.run.get('name')}"
    return f", weights of {Path(spec.engine.checkpoint).name}" if spec.engine.checkpoint is not None else ""


def _reads(plan: Plan, call: Call) -> Iterator[str]:
    if isinstance(call, ModelCall):
        yield from call.reads
        return
    for name, key in call.arguments.items():
        if name in call.module.knobs:
            yield f"{name} = {_knob(plan, key)}"
        elif key is not None:
            yield f"{name} = {', '.join(key) if isinstance(key, tuple) else key}"
    for name in call.parts:
        yield f"{name} (borrowed)"
    if call.weight:
        yield f"weight = {_knob(plan, call.weight)}"


def _knob(plan: Plan, key: object) -> str:
    knob = plan.knobs.get(str(key))
    if isinstance(knob, Schedule):
        return f"{knob.name}{_changed(knob.config)}"
    return str(key) if knob is None else f"{knob:g}"


def _gives(plan: Plan, call: Call) -> Iterator[str]:
    taps = plan.spec.models[base_of(call.name)].engine.taps if isinstance(call, ModelCall) else {}
    for key in call.gives:
        tap = taps.get(key.rpartition(".")[2])
        yield f"{key} {_dims(plan, key)}" + ("" if tap is None else f" at {tap}")


def _dims(plan: Plan, key: str) -> str:
    shape = plan.shapes[key]
    return f"[{', '.join(map(str, shape))}]" if shape else "number"


def _identifier(name: str) -> str:
    return "n_" + "".join(char if char.isalnum() else "_" for char in name)
