"""The forward and the backward pass of a learner as one compiled graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdx.calls import Key
from kdx.devices import without_autocast
from kdx.errors import PluginError
from kdx.types import Batch, Losses

Gradients = Sequence[Tensor | None]


def compiler_of(device: torch.device) -> dict[str, Any]:
    """What to tell `torch.compile` for a device.

    The layout is what `runtime.channels_last` says: that which the compiler would choose on a CPU is slower there.
    Graphs of one learner leave those of others alone: torch keeps eight of a function and then compiles no more. They
    are for sizes that are known; torch would leave those open that it has seen to differ, be it in another learner.
    """
    how: dict[str, Any] = {"dynamic": False}
    if device.type == "cpu":
        how["options"] = {"layout_optimization": False}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not in torch 2.11
        how["isolate_recompiles"] = True
    return how


def can_be_one() -> bool:
    """Whether this torch follows a gradient that is asked for within a compiled function."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


class OneGraph:
    """Gives the losses of a learner and keeps the gradient of their total for whoever asks for it next.

    Nothing runs between the passes, neither Python nor torch's record of operations, which takes as long as the
    operations of a small net. What is given has no graph of its own. Where torch cannot follow both passes to their
    end, the learner runs as it does by itself, with a graph that gradients are asked of.
    """

    def __init__(self, learner: nn.Module, compiler: Mapping[str, Any]) -> None:
        self._learner = learner
        self._weights = [weight for weight in learner.parameters() if weight.requires_grad]
        self._both: Any = torch.compile(self._passes, fullgraph=True, **compiler)
        self._known = False
        self._held: tuple[Losses, Gradients] | None = None

    def __call__(self, batch: Batch, kept: Mapping[Key, Tensor], knobs: Mapping[Key, Tensor]) -> Losses:
        self._held = None
        if not self._known and self._both is not None and (hooked := self._hooked()) is not None:
            self._give_up(f"{hooked} has a hook that waits for its gradient")
        if self._both is not None:
            try:
                losses, gradients = self._run(batch, kept, knobs)
            except torch._dynamo.exc.TorchDynamoException as error:  # of what it cannot follow, before anything ran
                self._give_up(_reason(error))
            except torch._dynamo.exc.FailOnRecompileLimitHit:  # as before anything ran, but of no class with the others
                self._give_up("a part of the learner changes from update to update, and each change needs another one")
            else:
                self._held = losses, gradients
                return losses
        found: Losses = self._learner(batch, kept, knobs)
        return found

    def take(self, total: Tensor) -> list[tuple[nn.Parameter, Tensor]] | None:
        """Each weight that `total` reaches and its gradient, which is the caller's own to change. None where the losses
        have a graph to ask. Raises `PluginError` for a number that is not their total.
        """
        if self._held is None:
            return None
        losses, gradients = self._held
        if losses.total is not total:
            raise PluginError(
                "train.updater: it asks for the gradient of another number than `losses.total`, but its class says "
                "`by_total = True`"
            )
        self._held = None
        reported = (losses.means, losses.terms, losses.knobs, losses.shown, losses.parts)
        taken = {total.data_ptr(), *(one.data_ptr() for values in reported for one in values.values())}
        found: list[tuple[nn.Parameter, Tensor]] = []
        learning = (weight for weight in self._weights if weight.requires_grad)
        for weight, gradient in zip(learning, gradients, strict=True):
            if gradient is None:
                continue
            if gradient.stride() != weight.stride() or gradient.data_ptr() in taken:
                gradient = torch.empty_like(weight).copy_(gradient)
            taken.add(gradient.data_ptr())
            found.append((weight, gradient))
        return found

    def _hooked(self) -> str | None:
        """The name of a weight whose gradient passes through a hook, which a compiler leaves out without a word."""
        named = self._learner.named_parameters()
        return next((name for name, one in named if one._backward_hooks or one._post_accumulate_grad_hooks), None)

    def _give_up(self, reason: str) -> None:
        self._both = None
        warnings.warn(f"runtime.compile: the backward pass is not in the graph: {reason}", stacklevel=3)

    def _run(self, *inputs: Any) -> tuple[Losses, Gradients]:
        if self._known:
            with suppress(torch._dynamo.exc.TorchDynamoException):  # inputs of another shape need another graph
                return self._both(*inputs)  # type: ignore[no-any-return]
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            found: tuple[Losses, Gradients] = self._both(*inputs)
        self._known = True
        return found

    def _passes(
        self, batch: Batch, kept: Mapping[Key, Tensor], knobs: Mapping[Key, Tensor]
    ) -> tuple[Losses, tuple[Tensor | None, ...]]:
        losses = self._learner.forward(batch, kept, knobs)
        with without_autocast(losses.total.device.type):
            learning = [weight for weight in self._weights if weight.requires_grad]
            gradients = torch.autograd.grad(losses.total, learning, allow_unused=True)
        parts = {name: part.detach() for name, part in losses.parts.items()}
        return replace(losses, total=losses.total.detach(), parts=parts), gradients


def _reason(error: Exception) -> str:
    """The first line of what the compiler says, and which line of code outside of torch it is about."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    torch_itself = Path(torch.__file__).parent
    for frame in reversed(getattr(error, "real_stack", None) or ()):
        if torch_itself not in Path(frame.filename).parents:
            return f"{lines[0]} ({Path(frame.filename).name}, line {frame.lineno})"
    return lines[0]
