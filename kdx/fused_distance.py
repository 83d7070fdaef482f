"""The squared distance of two features, with a gradient that is written once.

With ordinary operations its gradient goes through three tensors of the size of the features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.fused import is_traced, savable

SMALL = 1 << 15
"""Up to so many numbers calling a function of Python from autograd costs more than it saves."""


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the elements of a sample of the squared difference of two features [B, ...] of equal shape, [B].

    The teacher gets no gradient. Small features, half precision, compiled code and the transforms of `torch.func` take
    the composition of torch.
    """
    teacher = savable(teacher)
    exact = student.dtype == teacher.dtype and student.dtype in (torch.float32, torch.float64)
    if exact and student.numel() > SMALL and not is_traced():
        values: Tensor = _SquaredDistance.apply(student, teacher)
        return values
    return F.mse_loss(student, teacher, reduction="none").flatten(1).mean(1)


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        rows = difference.flatten(1)
        ctx.save_for_backward(student, teacher)
        ctx.difference = difference
        values: Tensor = torch.linalg.vecdot(rows, rows)
        return values.div_(rows.shape[1])

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        difference = student - teacher if torch.is_grad_enabled() else ctx.difference  # with a graph of its own
        scale = above[0] * (2 / student[:1].numel()) if len(student) else above[0]
        return difference * scale.reshape(-1, *[1] * (student.ndim - 1)), None
