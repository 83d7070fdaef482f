"""Frozen teachers of one architecture as one batched call, where a measurement says that this is faster."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdx.calls import ModelCall, StandIn, Values
from kdx.errors import PlanError
from kdx.options import plain_options
from kdx.plan import Plan
from kdx.reach import base_of
from kdx.taps import Tapped
from kdx.timing import GAIN, InTurn, medians, start
from kdx.types import Batch

BATCHED = "batched"
"""The way of several teachers in one call."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Together:
    """Runs several models of one architecture in one call: their weights are stacked, and `vmap` goes over the stack.

    After `adopt` the weights of the models are parts of the stack, so that they lie in memory once.
    """

    way = BATCHED

    def __init__(self, calls: Sequence[ModelCall]) -> None:
        self.calls = tuple(calls)
        self._modules = [call.module for call in calls]
        self._weights: tuple[dict[str, Any], dict[str, Any]] = torch.func.stack_module_state(list(self._modules))
        self._body: Tapped = copy.deepcopy(self._modules[0]).to("meta")

    def run(self, values: Values) -> None:
        """As the calls one after another, within rounding."""
        batch = self.calls[0].batch(values)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(self._body, (parameters, buffers), (batch,))

        found = torch.vmap(one)(*self._weights)
        for name, stacked in found.items():
            for call, tensor in zip(self.calls, stacked.unbind(), strict=True):
                values[f"{call.name}.{name}"] = tensor

    def adopt(self) -> None:
        """Let the models use their part of the stack, in place of weights of their own."""
        parameters, buffers = self._weights
        for place, module in enumerate(self._modules):
            for name, parameter in module.named_parameters():
                parameter.data = parameters[name][place].detach()
            for name, buffer in module.named_buffers():
                buffer.data = buffers[name][place]


def alike(plan: Plan, calls: Sequence[ModelCall]) -> list[tuple[ModelCall, ...]]:
    """The calls that may be one: of models with one architecture, that read the same and are asked for the same.

    A model that is tapped by hooks is called by itself, and so is one with a place of its own.
    """
    groups: dict[str, list[ModelCall]] = {}
    for call in calls:
        if call.seat is None and not call.module.is_hooked:
            spec = plan.spec.models[base_of(call.name)]
            net = call.module.network
            state = [(name, tuple(value.shape), str(value.dtype)) for name, value in net.state_dict().items()]
            options = plain_options(spec.options)
            key = repr([spec.entry.component, options, repr(net), state, dict(call.streams), call.module.wanted])
            groups.setdefault(key, []).append(call)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def check_batching(plan: Plan, free: Sequence[ModelCall], *, graphs: bool) -> None:
    """Raise `PlanError` where `always` is asked for and no two of several teachers can be one call.

    `free` are the calls that have no backend of their own; `graphs` says whether others are one graph of theirs.
    """
    calls = [call for call in plan.teacher_calls if isinstance(call, ModelCall)]
    asked = plan.spec.runtime.teacher_batching == "always" and len(calls) > 1
    if asked and not graphs and not alike(plan, free):
        raise PlanError(
            f"runtime.teacher_batching: found 'always', but no two of {', '.join(call.name for call in calls)} can be "
            "one call: they need one architecture and one input, no tap by the path of a module, and no device, "
            "offload or backend of their own; or one backend by name and one input; expected auto or never"
        )


@dataclass(frozen=True)
class Choice:
    """The calls that are one from now on, and a line for each group that says why or why not."""

    adopted: tuple[Together, ...]
    lines: tuple[str, ...]


def choose(
    groups: Sequence[tuple[ModelCall, ...]],
    batch: Batch,
    *,
    always: bool,
    wait: Callable[[], None],
    runs: Mapping[str, StandIn | ModelCall] | None = None,
) -> Choice:
    """Try each group on a batch, and time it against calls one after another, in turn; `wait` waits for the device.

    `runs` holds what else would answer for a model, by name.

    What does not run, or gives other numbers than rounding explains, is not adopted. Raises `PlanError` for it if
    this is to be done `always`.
    """
    adopted: list[Together] = []
    lines: list[str] = []
    for calls in groups:
        who = ", ".join(call.name for call in calls)
        together, problem = _tried(calls, batch)
        if together is None:
            if always:
                raise PlanError(
                    f"runtime.teacher_batching: {who} cannot be one call: {problem}; expected auto or never"
                )
            lines.append(f"teachers {who}: called one after another, since they cannot be one call: {problem}")
            continue
        each = InTurn([(runs or {}).get(call.name, call) for call in calls])
        one, several = medians({"one": together, "several": each}, batch, wait).values()
        if always or one < GAIN * several:
            together.adopt()
            adopted.append(together)
            lines.append(f"teachers {who}: one batched call, {one:.3g} ms; one after another {several:.3g} ms")
        else:
            lines.append(f"teachers {who}: called one after another, {several:.3g} ms; one batched call {one:.3g} ms")
    return Choice(tuple(adopted), tuple(lines))


def _tried(calls: Sequence[ModelCall], batch: Batch) -> tuple[Together | None, str]:
    """The group as one call, or why it cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an operation that vmap can only loop over
            together = Together(calls)
            found, expected = start(batch), start(batch)
            together.run(found)
        for call in calls:
            call.run(expected)
    except (RuntimeError, ValueError, TypeError, UserWarning) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for call in calls:
        for key in call.gives:
            tolerance = _TOLERANCE.get(expected[key].dtype, 0.0)
            if not torch.allclose(found[key], expected[key], rtol=tolerance, atol=tolerance, equal_nan=True):
                return None, f"{key} would differ by {float((found[key] - expected[key]).abs().max()):.2g}"
    return together, ""
