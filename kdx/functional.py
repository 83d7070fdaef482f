"""The learner with other values of its weights, without a trace: what an updater asks for that looks ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdx.calls import Key, Values
from kdx.components import Node
from kdx.errors import PlanError, did_you_mean
from kdx.modules import Learner, Teachers
from kdx.types import Batch, Losses


@dataclass(frozen=True)
class Present:
    """A part of the update that is under way: its batch, and what the teachers and the knobs gave for it."""

    teachers: Teachers
    learner: Learner
    batch: Batch
    kept: Mapping[Key, Tensor]
    knobs: Mapping[Key, Tensor]
    autocast: Callable[[], AbstractContextManager[object]]

    def losses(self, weights: Mapping[str, Tensor], batch: Batch | None = None) -> Losses:
        """What the learner gives with `weights` in place of its own, on this batch or another one.

        The graph goes to `weights`. Buffers, such as batch statistics and memories, and the random numbers of nodes,
        those of the teacher side among them, are afterwards as they were. Raises `PlanError` for a name that the
        learner does not have.
        """
        own = dict(self.learner.named_parameters())
        for name in weights:
            if name not in own:
                raise PlanError(f"the learner has no weight {name!r}; {did_you_mean(name, own)}")
        # Copies, not contents put back: the graph of the update itself may still read the buffers.
        state = {name: buffer.clone() for name, buffer in self.learner.named_buffers()} | dict(weights)
        both = (*self.learner.nodes.values(), *self.teachers.nodes.values())
        nodes = [node for node in both if isinstance(node, Node)]
        random = [(node.given.generator, node.given.generator.get_state()) for node in nodes]
        try:
            kept = self.kept if batch is None else self._answers(batch)
            with self.autocast():
                found: Losses = torch.func.functional_call(
                    self.learner, state, (self.batch if batch is None else batch, kept, self.knobs)
                )
        finally:
            for generator, before in random:
                generator.set_state(before)
        return found

    @torch.no_grad()
    def _answers(self, batch: Batch) -> Values:
        """What the teacher side gives for another batch, with copies of its buffers."""
        side = _Side(self.teachers)
        state = {name: buffer.clone() for name, buffer in side.named_buffers()}
        with self.autocast():
            found: Values = torch.func.functional_call(side, state, (batch, self.knobs))
        return found


class _Side(nn.Module):
    """The nodes of the teacher side, as a module that runs with other buffers."""

    def __init__(self, teachers: Teachers) -> None:
        super().__init__()
        self.nodes = teachers.nodes
        self._run = teachers.answers
        self.training = False

    def forward(self, batch: Batch, knobs: Mapping[Key, Tensor]) -> Values:
        return self._run(batch, knobs)
