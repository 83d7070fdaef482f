"""A target that trains the part which it borrows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import kdx


class Judged(kdx.Target):
    """What a borrowed classifier makes of features, with gradient to its weights."""

    name = "judged"
    inputs = {"features": kdx.REQUIRED}
    borrows = {"head": "student.classifier"}
    trains = ("head",)

    def forward(self, features: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        return head(features)


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [Judged]
