"""The network that a run deploys: the student itself, or the student with a part of a loss behind it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdx.calls import Borrowed, NodeCall
from kdx.components import Loss, Network
from kdx.errors import PlanError
from kdx.plan import Plan
from kdx.taps import Tap, Tapped, read_taps
from kdx.types import Batch


class Extended(Network):
    """A student whose logits come from a loss's `answer`, which reads its taps and calls borrowed parts.

    `fields` maps arguments of `answer` to fields of the student. `net` holds everything that is saved.
    """

    def __init__(
        self,
        student: Network,
        node: Loss,
        fields: Mapping[str, str],
        taps: Mapping[str, Tap],
        parts: Mapping[str, nn.Module],
    ) -> None:
        held = nn.ModuleDict({"student": student.net, "node": node, "parts": nn.ModuleDict(parts)})
        super().__init__(held, student.streams, student.prepare)
        self.node = node
        self.fields = dict(fields)
        self.parts = dict(parts)
        self.tapped = Tapped(student, tuple(dict.fromkeys(fields.values())), taps, "student")

    def forward(self, *streams: Tensor) -> Tensor:
        return self.answer(dict(zip(self.streams, streams, strict=True)))

    def answer(self, batch: Batch) -> Tensor:
        tensors: dict[str, Any] = {name: Borrowed(part) for name, part in self.parts.items()}
        found = self.tapped(batch)
        tensors |= {name: found[field] for name, field in self.fields.items()}
        return self.node.answer(**tensors)


def deployed(plan: Plan) -> Network:
    """What a plan's run evaluates and keeps. It shares its weights with the plan's modules, borrowed parts excepted."""
    call = answering(plan)
    if call is None:
        return plan.student.network
    assert isinstance(call.module, Loss)
    parts = {name: copy.deepcopy(call.parts[name].module) for name in call.module.answers if name in call.parts}
    return Extended(
        plan.student.network,
        call.module,
        answer_fields(call),
        read_taps(plan.spec.student.engine.taps, "student"),
        parts,
    )


def answering(plan: Plan) -> NodeCall | None:
    """The loss that changes what is deployed, or None. Raises `PlanError` where there are two."""
    found = [call for call in plan.loss_calls if isinstance(call.module, Loss) and call.module.answers]
    if len(found) > 1:
        raise PlanError(f"losses: {' and '.join(call.where for call in found)} both change what is deployed; keep one")
    return found[0] if found else None


def answer_fields(call: NodeCall) -> dict[str, str]:
    """Argument of `answer` -> field of the student. Raises `PlanError` for an input that is not the student's."""
    assert isinstance(call.module, Loss)
    fields: dict[str, str] = {}
    for name in call.module.answers:
        if name in call.parts:
            continue
        key = call.arguments.get(name)
        if not isinstance(key, str) or not key.startswith("student."):
            raise PlanError(f"{call.where}.inputs.{name}: found {key!r}; what is deployed can read the student alone")
        fields[name] = key.removeprefix("student.")
    return fields


def teacher_of(plan: Plan, call: NodeCall, part: str) -> tuple[str, str]:
    """The model and the path that a borrowed part comes from."""
    node = plan.spec.losses[call.name.removeprefix("losses.")]
    owner, _, path = node.borrows[part].partition(".")
    if owner == "teacher" and owner not in plan.spec.models:
        owner = next(iter(plan.spec.teachers))
    return owner, path
