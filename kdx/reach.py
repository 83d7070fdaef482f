"""From the losses backwards to what they need: which models and nodes are live, in which order, reading what."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdx.calls import Key
from kdx.errors import PlanError, did_you_mean
from kdx.spec import NodeSpec, RunSpec
from kdx.taps import is_depth
from kdx.types import DataFacts

Part = tuple[str, str]
"""A model's name and the path of a part in it."""


@dataclass
class Reach:
    """What is live. `order` lists model names, node names and `losses.x` in dependence order; `fields` what is wanted
    of each model; `arguments` the keys that each node reads, its knobs among them; `views` those that anything reads.
    """

    order: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)
    nodes: dict[str, NodeSpec] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    borrowed: dict[str, dict[str, Part | list[Part]]] = field(default_factory=dict)
    views: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def reach(spec: RunSpec, facts: DataFacts) -> Reach:
    """Depth first from the losses. Refs are checked against all that is declared, also by parts that are not live.

    Raises `PlanError` for a ref that names nothing and for a cycle, which it spells out.
    """
    resolver = Resolver(spec, facts)
    arguments = {name: resolver.arguments(node) for name, node in spec.nodes.items()}
    losses = {f"losses.{name}": node for name, node in spec.losses.items()}
    arguments |= {name: resolver.arguments(node) for name, node in losses.items()}
    borrowed = {name: resolver.borrowed(node) for name, node in {**spec.nodes, **losses}.items()}
    everything = {**spec.nodes, **losses}
    found = Reach()
    wanted: dict[str, dict[str, None]] = {}
    done: set[str] = set()

    def visit(item: str, path: tuple[str, ...]) -> None:
        if item in path:
            circle = " -> ".join((*path[path.index(item) :], item))
            raise PlanError(f"{everything[item].where}: the nodes read each other in a circle: {circle}")
        if item in done:
            return
        for model, _ in flat(borrowed[item]):
            wanted.setdefault(model, {})
        for key in _keys(arguments[item]):
            owner, _, name = key.partition(".")
            if base_of(owner) in spec.models:
                if owner not in found.order:
                    found.order.append(owner)
                wanted.setdefault(owner, {})[name] = None
            elif owner in spec.nodes:
                visit(owner, (*path, item))
        done.add(item)
        found.order.append(item)
        found.nodes[item] = everything[item]
        found.arguments[item] = arguments[item]
        found.borrowed[item] = borrowed[item]

    for name in losses:
        visit(name, ())
    bases = {base_of(owner) for owner in wanted}
    found.models = [name for name in spec.models if name in bases]
    found.fields = {name: tuple(fields) for name, fields in wanted.items()}
    found.views = tuple(name for name in spec.views if name in set(_views(spec, found)))
    live = {*found.models, *found.nodes}
    declared = {part.name: part.where for part in spec.teachers.values()}
    declared |= {node.name: node.where for node in spec.nodes.values()}
    found.unused = tuple(where for name, where in declared.items() if name not in live)
    found.unused += tuple(f"data.views.{name}" for name in spec.views if name not in found.views)
    return found


def upstream(reached: Reach, item: str) -> list[str]:
    """A live node and all that it reads, directly or through others, in dependence order."""
    found: set[str] = set()
    waiting = [item]
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += [key.partition(".")[0] for key in _keys(reached.arguments.get(one, {}))]
    return [one for one in reached.order if one in found]


def unasked(reached: Reach, stored: Container[str]) -> frozenset[str]:
    """The models and targets that nothing but targets among `stored` reads: with these answers no batch needs them."""
    known: dict[str, dict[str, Any]] = {name: {} for name in reached.nodes if name in stored}
    cut = replace(reached, arguments={**reached.arguments, **known})
    asked = {item for name in reached.nodes if name.startswith("losses.") for item in upstream(cut, name)}
    return frozenset(reached.order) - asked


def flat(borrowed: Mapping[str, Part | list[Part]]) -> list[Part]:
    """All parts that a node borrows, one after another."""
    return [one for part in borrowed.values() for one in (part if isinstance(part, list) else [part])]


def base_of(owner: str) -> str:
    """The model behind an owner: `student` for `student@strong`."""
    return owner.partition("@")[0]


@dataclass(frozen=True)
class Resolver:
    """Turns refs into keys."""

    spec: RunSpec
    facts: DataFacts

    def arguments(self, node: NodeSpec) -> dict[str, Any]:
        """Each input and knob of a node -> key, tuple of keys, or None."""
        resolved: dict[str, Any] = {}
        for name, ref in node.inputs.items():
            where = f"{node.where}.{name}" if name in ("source", "like") else f"{node.where}.inputs.{name}"
            if isinstance(ref, tuple):
                keys = [key for one in ref for key in self.keys(one, where)]
                if not keys:
                    raise PlanError(f"{where}: {', '.join(ref)} names no teacher, for there is none")
                resolved[name] = tuple(dict.fromkeys(keys))
            else:
                resolved[name] = None if ref is None else self.key(ref, where)
        for name, knob in node.knobs.items():
            where = f"{node.where}.{name}"
            resolved[name] = self.key(knob, where) if isinstance(knob, str) else where
        return resolved

    def borrowed(self, node: NodeSpec) -> dict[str, Part | list[Part]]:
        """Each borrowed part of a node -> the model's name and the path in it; a list for any number of parts."""
        parts: dict[str, Part | list[Part]] = {}
        for name, ref in node.borrows.items():
            where = f"{node.where}.borrows.{name}"
            if isinstance(ref, str):
                parts[name] = self._part(ref, where)
                continue
            found = [self._part(one, where) for each in ref for one in self._each_teacher(each)]
            if not found:
                raise PlanError(f"{where}: {', '.join(ref)} names no teacher, for there is none")
            parts[name] = found
        return parts

    def _part(self, ref: str, where: str) -> Part:
        owner, _, path = ref.partition(".")
        owner = self._alias(owner, ref, where)
        if owner not in self.spec.models or not path:
            raise PlanError(f"{where}: found {ref!r}, expected a part of a model, as in teacher.classifier")
        return owner, path

    def _each_teacher(self, ref: str) -> list[str]:
        owner, dot, path = ref.partition(".")
        return [ref] if owner != "*" else [f"{teacher}{dot}{path}" for teacher in self.spec.teachers]

    def keys(self, ref: str, where: str) -> list[Key]:
        """The keys of a ref that may stand for several: `*.logits` is that of every teacher."""
        owner, _, name = ref.partition(".")
        base, at, view = owner.partition("@")
        if base != "*":
            return [self.key(ref, where)]
        return [self.key(f"{teacher}{at}{view}.{name}", where) for teacher in self.spec.teachers]

    def key(self, ref: str, where: str) -> Key:
        """The key of a ref; a `PlanError` with the nearest valid ref where it names nothing."""
        owner, dot, name = ref.partition(".")
        base, at, view = owner.partition("@")
        base = self._alias(base, ref, where)
        owner = f"{base}{at}{view}"
        if owner == "batch":
            streams = {*self.facts.streams, "index"}
            if name not in streams:
                raise PlanError(
                    f"{where}: the data has no stream {name!r}; {did_you_mean(name, streams, what='streams')}"
                )
            return f"batch.{name}"
        if base in self.spec.models:
            if at and view not in self.spec.views:
                raise PlanError(f"{where}: the data has no view {view!r}; {did_you_mean(view, self.spec.views)}")
            return f"{owner}.{self._field(base, name, where)}"
        if owner in self.spec.nodes:
            outputs = self.spec.nodes[owner].entry.component.outputs
            name = name if dot else "out"
            if name not in outputs:
                raise PlanError(
                    f"{where}: {owner} gives no {name!r}; {did_you_mean(name, outputs, what=f'{owner} gives')}"
                )
            return f"{owner}.{name}"
        known = {"batch", *self.spec.models, *self.spec.nodes}
        raise PlanError(f"{where}: {ref!r} names nothing; {did_you_mean(owner, known)}")

    def _alias(self, owner: str, ref: str, where: str) -> str:
        """`teacher` is the only teacher, whatever its name."""
        if owner != "teacher" or "teacher" in {**self.spec.models, **self.spec.nodes}:
            return owner
        teachers = list(self.spec.teachers)
        if len(teachers) == 1:
            return teachers[0]
        if not teachers:
            raise PlanError(f"{where}: it reads {ref!r}, but the config has no teachers")
        raise PlanError(
            f"{where}: it reads {ref!r}, but there are {len(teachers)} teachers ({', '.join(teachers)}); "
            "name one of them, or a target over them"
        )

    def _field(self, owner: str, name: str, where: str) -> str:
        model = self.spec.models[owner]
        offers = model.entry.component.offers
        known = {*model.engine.taps, *(offers or ())}
        if not name:
            raise PlanError(
                f"{where}: say which tensor of {owner}; it has: {', '.join(sorted(known)) or 'its outputs'}"
            )
        if offers is not None and name not in known and not is_depth(name):
            raise PlanError(f"{where}: {owner} has no {name!r}; {did_you_mean(name, known, what='it has')}")
        return name


def _views(spec: RunSpec, found: Reach) -> Iterator[str]:
    """The views that models are called on, that they name as their input, and that nodes read from the batch."""
    for owner in found.fields:
        yield owner.partition("@")[2]
    for model in found.models:
        streams = spec.models[model].engine.input or ()
        for stream in [streams] if isinstance(streams, str) else streams:
            yield str(stream).partition("@")[2]
    for arguments in found.arguments.values():
        for key in _keys(arguments):
            if key.startswith("batch."):
                yield key.partition("@")[2]


def _keys(arguments: Mapping[str, Any]) -> Iterator[Key]:
    for key in arguments.values():
        if isinstance(key, tuple):
            yield from key
        elif key:
            yield key
