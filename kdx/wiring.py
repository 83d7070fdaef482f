"""Builds the nodes of a plan: each with the shapes of what it reads, and with the parts of models that it borrows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdx.calls import Borrowed, Key, NodeCall, find_part
from kdx.components import Given, Network, Node
from kdx.errors import KdxError, PlanError
from kdx.randomness import derive_seed
from kdx.reach import Part, Reach, base_of
from kdx.spec import NodeSpec, RunSpec
from kdx.taps import LOGITS
from kdx.types import DataFacts, Shape


def node_call(
    item: str,
    reached: Reach,
    facts: DataFacts,
    spec: RunSpec,
    shapes: Mapping[Key, Shape],
    models: Mapping[str, Network],
    device: torch.device,
    seed: int,
) -> NodeCall:
    """A node whose own random numbers follow from the seed and its name. `shapes` are of all that it reads."""
    node = reached.nodes[item]
    component: type[Node] = node.entry.component
    arguments = reached.arguments[item]
    inputs = {name: arguments[name] for name in component.inputs}
    given = Given(
        {name: _shapes_of(key, shapes) for name, key in inputs.items() if key is not None},
        facts,
        torch.Generator(device=device).manual_seed(derive_seed(seed, "generator", item)),
        {name: list(key) if isinstance(key, tuple) else key for name, key in inputs.items() if key is not None},
    )
    label = f"{node.where} ({component.name}, plugin {node.entry.plugin.name})"
    _check_same_shape(node, given)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "node", item))
        try:
            module = component(node.options, given).to(device)
        except KdxError as error:
            raise type(error)(f"{node.where}: {error}") from error
        except Exception as error:
            raise PlanError(f"{label} could not be built from {_listed(inputs, shapes)}: {error}") from error
    parts = _parts(item, reached, spec, models)
    kind = node.where.partition(".")[0]
    hidden = {"weight"} | ({"like"} if kind == "align" else set())  # an aligner needs only the shape of `like`
    passed = {name: key for name, key in arguments.items() if name not in hidden}
    weight = str(arguments["weight"]) if kind == "losses" else ""
    gives = (item,) if kind == "losses" else tuple(f"{item}.{field}" for field in component.outputs)
    return NodeCall(item, kind, node.where, module, passed, gives, parts, weight, label)


def _parts(
    item: str, reached: Reach, spec: RunSpec, models: Mapping[str, Network]
) -> dict[str, Borrowed | list[Borrowed]]:
    """The borrowed parts of a node. One that it trains must be part of a model that the optimizer knows."""
    node = reached.nodes[item]
    component: type[Node] = node.entry.component

    def lend(name: str, part: Part, ref: str) -> Borrowed:
        model, path = part
        where, trains = f"{node.where}.borrows.{name}", name in component.trains
        is_run = any(base_of(owner) == model for owner in reached.order)
        if trains and (spec.models[model].frozen or not is_run):
            why = "is frozen" if spec.models[model].frozen else "no loss reads"
            raise PlanError(
                f"{where}: {component.name} trains this part, but {ref} belongs to {model}, "
                f"which {why}; expected a part of a model that is trained, as in student.classifier"
            )
        engine = spec.models[model].engine
        if engine.device is not None or engine.offload is not None or engine.shard:
            raise PlanError(
                f"{where}: {ref} is called where the student computes, but teachers.{model} has a place "
                "of its own; leave out its `device`, `offload` and `shard`"
            )
        return Borrowed(find_part(models[model].net, path, where), trains=trains)

    return {
        name: [lend(name, one, ".".join(one)) for one in part]
        if isinstance(part, list)
        else lend(name, part, str(node.borrows[name]))
        for name, part in reached.borrowed[item].items()
    }


def _check_same_shape(node: NodeSpec, given: Given) -> None:
    for group in node.entry.component.same_shape:
        found = {name: given.shapes[name] for name in group if name in given.shapes}
        if len(set(map(str, found.values()))) > 1:
            listing = ", ".join(f"{node.inputs[name]} {list(shape)}" for name, shape in found.items())
            classes = all(len(shape) == 1 for shape in found.values()) and any(
                str(node.inputs[name]).endswith(LOGITS) for name in found
            )
            advice = "the models tell different numbers of classes apart" if classes else "put an aligner between them"
            raise PlanError(f"{node.where}: {node.entry.component.name} needs equal shapes but got {listing}; {advice}")


def _shapes_of(key: Any, shapes: Mapping[Key, Shape]) -> Any:
    return [shapes[one] for one in key] if isinstance(key, tuple) else shapes[key]


def _listed(inputs: Mapping[str, Any], shapes: Mapping[Key, Shape]) -> str:
    keys = [one for key in inputs.values() for one in (key if isinstance(key, tuple) else (key,)) if one]
    return ", ".join(f"{key} {list(shapes[key])}" for key in keys)
