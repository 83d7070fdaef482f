"""The updater that adds all terms up and takes one optimizer step."""

from __future__ import annotations

from kdx.types import Losses
from kdx.updater import Engine, Updater


class Plain(Updater):
    """One backward pass through the weighted sum for each micro-batch, one step for each update."""

    name = "plain"
    by_total = True

    def backward(self, losses: Losses, share: float, engine: Engine) -> None:
        engine.backward(losses.total, share)

    def step(self, engine: Engine) -> None:
        engine.update()


UPDATERS: list[type[Updater]] = [Plain]
