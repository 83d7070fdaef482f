"""The squared distance of two features, with a gradient that is written once.

With ordinary operations its gradient goes through three tensors of the size of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the elements of a sample of the squared difference of two features [B, ...] of equal shape, [B].

    The teacher gets no gradient. Half precision and compiled code take the composition of torch.
    """
    teacher = teacher.detach()
    exact = student.dtype == teacher.dtype and student.dtype in (torch.float32, torch.float64)
    if exact and student.ndim > 1 and not torch.compiler.is_compiling():
        values: Tensor = _SquaredDistance.apply(student, teacher)
        return values
    return (student - teacher).square().flatten(1).mean(1)


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
