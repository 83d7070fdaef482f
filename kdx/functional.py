"""The learner with other values of its weights, without a trace: what an updater asks for that looks ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.calls import Key
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

        The graph goes to `weights`. Buffers, such as batch statistics and memories, and the random numbers of nodes are
        afterwards as they were. Raises `PlanError` for a name that the learner does not have.
        """
        own = dict(self.learner.named_parameters())
        for name in weights:
            if name not in own:
                raise PlanError(f"the learner has no weight {name!r}; {did_you_mean(name, own)}")
        kept = self.kept
        if batch is not None:
            with torch.no_grad(), self.autocast():
                kept = self.teachers.answers(batch, self.knobs)
        # Copies, not contents put back: the graph of the update itself may still read the buffers.
        state = {name: buffer.clone() for name, buffer in self.learner.named_buffers()} | dict(weights)
        nodes = [node for node in self.learner.nodes.values() if isinstance(node, Node)]
        random = [(node.given.generator, node.given.generator.get_state()) for node in nodes]
        try:
            with self.autocast():
                found: Losses = torch.func.functional_call(
                    self.learner, state, (self.batch if batch is None else batch, kept, self.knobs)
                )
        finally:
            for generator, before in random:
                generator.set_state(before)
        return found
