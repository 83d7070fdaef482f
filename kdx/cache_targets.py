"""Which targets of a run ask for a cache of their own answers, and what these are of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kdx.cache_key import (
    Wanted,
    augmentation_content,
    check_repeatable,
    data_plugin,
    digest_of,
    folders_of,
    precision_of,
    samples_content,
)
from kdx.cache_options import read_cache
from kdx.cache_search import lacking, opened
from kdx.components import Dataset, Schedule
from kdx.data import Splits
from kdx.errors import ConfigError
from kdx.identity import cache_content, model_content, node_content, suppliers
from kdx.plan import streams_of
from kdx.ranges import AUTO, EAGER
from kdx.reach import Reach, base_of, unasked, upstream
from kdx.recall import Stored
from kdx.spec import NodeSpec, RunSpec


def target_caches(
    spec: RunSpec, dataset: Dataset, splits: Splits, reached: Reach, needs: Mapping[str, str]
) -> dict[str, Wanted]:
    """The caches of targets that a run reads, by target. `needs` are the hashes of teachers' runs.

    Raises `ConfigError` for a target whose answer to a sample is not the same each time, as far as the config tells.
    """
    return {
        name: _wanted(node, spec, dataset, splits, reached, needs)
        for name, node in reached.nodes.items()
        if read_cache(node.engine.cache, f"{node.where}.cache") is not None
    }


def opened_for(wanted: Mapping[str, Wanted], reached: Reach, splits: Splits, *, verify: bool) -> dict[str, Stored]:
    """What is stored for a run. The caches of teachers that stored targets alone read are left as they are."""
    found = opened({item: wanted[item] for item in wanted if item in reached.nodes}, splits, verify=verify)
    read = wanted.keys() - reached.nodes.keys() - unasked(reached, found)
    return found | opened({item: wanted[item] for item in wanted if item in read}, splits, verify=verify)


def lacking_for(wanted: Mapping[str, Wanted], reached: Reach, splits: Splits) -> list[Wanted]:
    """What is to be filled next: what reads nothing that is to be filled as well, as it will read what is stored."""
    missing = {one.item: one for one in lacking(wanted.values(), splits)}
    idle = unasked(reached, wanted.keys() - missing.keys())
    found = [one for item, one in missing.items() if item not in idle]
    names = {one.item for one in found}
    return [one for one in found if not names & {*upstream(reached, one.item)} - {one.item}]


def _wanted(
    node: NodeSpec, spec: RunSpec, dataset: Dataset, splits: Splits, reached: Reach, needs: Mapping[str, str]
) -> Wanted:
    where, items = f"{node.where}.cache", upstream(reached, node.name)
    options = read_cache(node.engine.cache, where)
    assert options is not None
    nodes = [reached.nodes[item] for item in items if item in reached.nodes]
    teachers = [item for item in items if item not in reached.nodes]
    _check(where, nodes, {base_of(item) for item in teachers}, spec)
    fields = _fields(node, reached)
    asked = {*_read([one.name for one in nodes], reached)}
    given = {item: sorted(field for owner, field in asked if owner == item) for item in teachers}
    if options.top is not None and "logits" not in fields:
        raise ConfigError(f"{where}.top: it is for logits, and nothing reads those of {node.name}")
    read = [*dict.fromkeys(_streams(teachers, nodes, spec, splits, reached))]
    varies = check_repeatable(where, options, read, spec, dataset, splits)
    seen = [stream for stream in read if splits.facts.streams[stream].kind != "label"]
    parts: dict[str, Any] = {
        **samples_content(spec, dataset, splits),
        **data_plugin(spec),
        "augmentation": augmentation_content(dataset, seen, spec) if varies else None,
        "classes": list(splits.facts.classes),
        "labels": digest_of(list(splits.facts.labels)),
        "target": {one.name: [node_content(one, reached, one.name), None if one is node else cache_content(one)]
                   for one in nodes},
        "teachers": {item: _teacher(item, given[item], spec, needs) for item in teachers},
        "plugins": suppliers([*nodes, *(spec.models[base_of(item)] for item in teachers)], spec.registry),
        "precision": precision_of(spec, spec.student),  # that of the run, in which targets compute
        "form": [options.dtype, options.top],
    }  # fmt: skip
    parts = json.loads(json.dumps(parts, default=str))
    count, folders = (spec.view_count or 1) if varies else 1, folders_of(options, spec)
    return Wanted(node.name, where, options, parts, fields, len(splits.train), count, folders, at_hand=True)


def _check(where: str, nodes: Iterable[NodeSpec], models: Iterable[str], spec: RunSpec) -> None:
    """Refuse what moves in training, and says so in the config."""
    for model in models:
        if not spec.models[model].frozen:
            raise ConfigError(
                f"{where}: it reads {model}, which is trained, so its answers change; leave the cache out"
            )
        if (backend := spec.models[model].engine.backend) not in (None, EAGER, AUTO):
            raise ConfigError(
                f"{where}: it reads {model}, whose backend is {backend!r}, but what is stored is computed by eager "
                "calls; keep one of the two"
            )
    for one in nodes:
        if one.borrows:
            raise ConfigError(
                f"{where}: {one.where} calls parts of models, of which the cache knows nothing; leave the cache out"
            )
        for name, knob in one.knobs.items():
            if isinstance(knob, Schedule):
                raise ConfigError(
                    f"{where}: {one.where}.{name} moves by the schedule {knob.name}, so the answers change; expected a "
                    "constant, or no cache"
                )


def _fields(node: NodeSpec, reached: Reach) -> tuple[str, ...]:
    """What anything reads of a target, and what reports show of it."""
    read = {name for owner, name in _read(reached.nodes, reached) if owner == node.name}
    component = node.entry.component
    return tuple(name for name in component.outputs if name in read or name in component.shown)


def _read(nodes: Iterable[str], reached: Reach) -> Iterator[tuple[str, str]]:
    """Owner and field of all that some nodes read."""
    for node in nodes:
        for value in reached.arguments[node].values():
            for key in value if isinstance(value, tuple) else (value,):
                owner, _, field = (key or "").partition(".")
                yield owner, field


def _streams(
    teachers: Iterable[str], nodes: Iterable[NodeSpec], spec: RunSpec, splits: Splits, reached: Reach
) -> Iterator[str]:
    """The streams of the data that the teachers and targets read."""
    for item in teachers:
        model = spec.models[base_of(item)]
        yield from (f"{stream}{item.removeprefix(model.name)}" for stream in streams_of(model, splits.facts))
    for owner, field in _read([one.name for one in nodes], reached):
        if owner == "batch" and field in splits.facts.streams:
            yield field


def _teacher(item: str, fields: Iterable[str], spec: RunSpec, needs: Mapping[str, str]) -> list[Any]:
    """What decides these answers of a teacher on a view."""
    model = spec.models[base_of(item)]
    content = model_content(model, fields, needs.get(model.name))
    if model.at_hand and not any(content["weights"]):
        content["weights"].append(spec.root.seed)  # first weights follow from the seed
    return [content, precision_of(spec, model) if model.at_hand else None, cache_content(model)]
