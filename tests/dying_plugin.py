"""A loss that ends its process after its third update, once or always."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import kdx


class Dying(kdx.Loss):
    """0 for each sample; ends the process unless it did so before, which the file `mark` tells, or `always`."""

    name = "dying"
    inputs = {"student": "student.logits"}

    @dataclass(frozen=True)
    class Config:
        mark: str = ""
        always: bool = False

    config: Config

    def after_update(self, clock: kdx.Clock) -> None:
        mark = Path(self.config.mark)
        if clock.step == 3 and (self.config.always or not mark.exists()):
            mark.touch()
            os._exit(9)

    def forward(self, student: Tensor) -> Tensor:
        return 0.0 * student.sum(1)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [Dying]
