"""What turns the terms of an update into a change of the weights, and what it may ask of the engine for that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdx.components import Component, Given
from kdx.types import Batch, Clock, Losses


class Updater(Component, nn.Module, ABC):
    """Turns terms into a change of the weights. The default one follows `losses.total`; others weigh or merge the
    gradients of `losses.parts`.

    `backward` is called once per micro-batch with `share`, the micro-batch's part of the whole batch; `step` once per
    update. Both go through `engine`, which knows precision and process groups.

    Of `given`, `losses` and `facts` tell what is trained, and `generator` is the updater's own source of random
    numbers, on the CPU. Parameters are trained with the student, without weight decay; parameters, buffers and the
    generator are saved, so state survives a resume. What is kept between `backward` and `step` need not be a buffer.

    eager: whether it asks for `engine.gradients` or `engine.losses`, which a compiled step does not allow.
    by_total: whether all that `backward` does is `engine.backward(losses.total, share)`, with whatever it keeps of the
        numbers. A compiled step then has both passes in one graph.
    needs_teachers: whether it makes sense only beside teachers; the plain student then has the default one.
    """

    eager: ClassVar[bool] = False
    by_total: ClassVar[bool] = False
    needs_teachers: ClassVar[bool] = False

    def __init__(self, config: Any, given: Given | None = None) -> None:
        super().__init__()
        self.config = config
        self.given = Given() if given is None else given

    def prepare(self, engine: Engine) -> None:
        """Called once when the optimizer is there, before a state is restored: buffers of the size of weights are made
        here, and an optimizer that does not fit is refused.
        """

    @abstractmethod
    def backward(self, losses: Losses, share: float, engine: Engine) -> None: ...

    @abstractmethod
    def step(self, engine: Engine) -> None: ...

    def after_update(self, clock: Clock) -> None:
        """Called after each optimizer step, without gradient; `clock.step` counts it."""

    def shown(self) -> Mapping[str, Tensor]:
        """Numbers of the last update that reports show with the knobs, 0-d by config path.

        A factor of a knob has the path of the knob, as `losses.kd.weight`: reports show their product, which is the
        weight in effect.
        """
        return {}


class Engine(ABC):
    """What an updater may ask of the engine."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def backward(self, value: Tensor, share: float = 1.0) -> None:
        """Add the gradient of a 0-d `value`, times `share`, to the parameters, scaled as the precision needs."""

    @abstractmethod
    def update(self) -> None:
        """Unscale, clip, step the optimizer, and clear the gradients."""

    @abstractmethod
    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is trained, the updater's own parameters last."""

    @abstractmethod
    def gradients(
        self, value: Tensor, weights: Sequence[Tensor] | None = None, *, retain: bool = True
    ) -> list[Tensor | None]:
        """The gradient of a 0-d `value`, one for each of `weights` or of `parameters`; None where it does not reach.

        They are in true scale whatever the precision, and leave the parameters' own gradients alone. With `retain` the
        graph stays for further gradients. In fp16 they may be infinite; the coming `update` is then skipped if these
        gradients are added.
        """

    @abstractmethod
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients in true scale, one for each of `parameters`, to those that the next `update` takes."""

    @property
    @abstractmethod
    def batch(self) -> Batch:
        """The micro-batch that the losses at hand are of."""

    @abstractmethod
    def weights(self, owner: str | None = None) -> dict[str, nn.Parameter]:
        """All that the learner trains, or what is trained of a part of the config, by name.

        A part is a node such as `targets.tau`, a model such as `student`, or a sub-module of one, as `student.layer4`.
        """

    @abstractmethod
    def losses(self, weights: Mapping[str, Tensor], batch: Batch | None = None) -> Losses:
        """What the learner gives with other values of some of its weights, on the present micro-batch or on another.

        Names are those of `weights`. The graph goes to the given tensors and allows second derivatives. Nothing else
        changes: batch statistics, memories and random numbers are afterwards as they were. The teachers run for
        another batch as for their own.
        """
