"""The network that a run deploys: the student itself, or the student with a part of a loss behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdx.calls import Borrowed, NodeCall
from kdx.components import Loss, Network
from kdx.errors import KdxError, PlanError
from kdx.plan import Plan
from kdx.probe import without_trace
from kdx.taps import Tap, Tapped, read_taps
from kdx.types import Batch

Fields = Mapping[str, str | list[str]]
"""Argument of a loss's `answer` -> the field of the student that it reads, or a list of fields."""


class Extended(Network):
    """A student whose logits come from a loss's `answer`, which reads its taps and calls borrowed parts.

    `net` holds everything that is saved.
    """

    def __init__(
        self, student: Network, node: Loss, fields: Fields, taps: Mapping[str, Tap], parts: Mapping[str, nn.Module]
    ) -> None:
        held = nn.ModuleDict({"student": student.net, "node": node, "parts": nn.ModuleDict(parts)})
        super().__init__(held, student.streams, student.prepare)
        self.node = node
        self.fields = dict(fields)
        self.parts = dict(parts)
        self.tapped = Tapped(student, tuple(dict.fromkeys(_each(fields.values()))), taps, "student")
        self.tapped.copy_all()

    def forward(self, *streams: Tensor) -> Tensor:
        return self.answer(dict(zip(self.streams, streams, strict=True)))

    def answer(self, batch: Batch) -> Tensor:
        found = self.tapped(batch)
        tensors: dict[str, Any] = dict(self.parts)
        for name, field in self.fields.items():
            tensors[name] = found[field] if isinstance(field, str) else [found[one] for one in field]
        return self.node.answer(**tensors)


def deployed(plan: Plan) -> Network:
    """What a plan's run evaluates and keeps. It shares its weights with the plan's modules."""
    call = answering(plan)
    if call is None:
        return plan.student.network
    assert isinstance(call.module, Loss)
    return Extended(
        plan.student.network,
        call.module,
        answer_fields(call),
        read_taps(plan.spec.student.engine.taps, "student.taps"),
        {name: _lent(call, name).module for name in call.module.answers if name in call.parts},
    )


def check_answer(plan: Plan, sample: Batch) -> None:
    """Raise `PlanError` unless what a plan deploys gives logits over the classes of the data.

    `sample` holds two samples, on the device of the plan.
    """
    call = answering(plan)
    if call is None:
        return
    network, classes = deployed(plan), len(plan.facts.classes)
    with without_trace(network, generator=call.module.given.generator), torch.no_grad():
        try:
            found = network.answer(sample)
        except KdxError as error:
            raise type(error)(f"{call.where}: {error}") from error
        except Exception as error:
            raise PlanError(f"{call.label}: its answer does not run: {type(error).__name__}: {error}") from error
    shape = tuple(found.shape[1:]) if isinstance(found, Tensor) else None
    if shape != (classes,):
        what = f"a {type(found).__name__}" if shape is None else f"{list(shape)} for a sample"
        raise PlanError(f"{call.label}: its answer gives {what}, but the data has {classes} classes")


def answering(plan: Plan) -> NodeCall | None:
    """The loss that changes what is deployed, or None. Raises `PlanError` where there are two."""
    found = [call for call in plan.loss_calls if isinstance(call.module, Loss) and call.module.answers]
    if len(found) > 1:
        raise PlanError(f"losses: {' and '.join(call.where for call in found)} both change what is deployed; keep one")
    return found[0] if found else None


def answer_fields(call: NodeCall) -> dict[str, str | list[str]]:
    """Argument of `answer` -> field of the student. Raises `PlanError` for an input that is not the student's."""
    assert isinstance(call.module, Loss)
    fields: dict[str, str | list[str]] = {}
    for name in call.module.answers:
        if name in call.parts:
            continue
        if name not in call.module.inputs:
            raise PlanError(f"{call.label}: `answers` names {name!r}, which is in neither `inputs` nor `borrows`")
        key = call.arguments[name]
        for one in _each([key or "nothing"]):
            if not one.startswith("student."):
                raise PlanError(f"{call.where}.inputs.{name}: found {one}; what is deployed reads the student alone")
        fields[name] = [*map(_field, key)] if isinstance(key, tuple) else _field(str(key))
    return fields


def owner_of(plan: Plan, call: NodeCall, part: str) -> tuple[str, str]:
    """The model that a borrowed part comes from, and the part's path in it."""
    node = plan.spec.losses[call.name.removeprefix("losses.")]
    owner, _, path = str(node.borrows[part]).partition(".")
    if owner not in plan.spec.models:  # `teacher`, which stands for the only one
        owner = next(iter(plan.spec.teachers))
    return owner, path


def _lent(call: NodeCall, name: str) -> Borrowed:
    part = call.parts[name]
    if isinstance(part, list):
        raise PlanError(
            f"{call.label}: `answers` names {name!r}, which is a list of parts; expected one part by itself"
        )
    return part


def _field(key: str) -> str:
    return key.removeprefix("student.")


def _each(names: Iterable[str | list[str] | tuple[str, ...]]) -> Iterable[str]:
    for name in names:
        yield from [name] if isinstance(name, str) else name
