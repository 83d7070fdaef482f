"""Whether a node keeps the graph of a call, and with it all activations of a batch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor

from kdx.trial import Trial, require, tensors_in
from kdx.types import Clock


class _Token:
    """Lives as long as the graph that it was put into."""


class _Marked(torch.autograd.Function):
    """Gives a tensor as it is, with a token in its graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, token: _Token) -> Tensor:
        ctx.token = token
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def check_released(trial: Trial) -> None:
    """Fail for a node that still holds the graph of a call after the update, in itself or anywhere else."""
    node = trial.fresh()
    token = _Token()
    seen = weakref.ref(token)
    inputs = {name: _marked(value, token) for name, value in trial.inputs().items()}
    values = trial.run(node, inputs)
    with torch.no_grad():
        node.after_update(Clock(1, 1, 2))
    del inputs, values, token
    if seen() is not None:  # a circle of references; looking for those takes longer than all the rest
        gc.collect()
    require(
        seen() is None,
        trial.who,
        "holds the graph of a call after it, and so the memory of a batch; keep `tensor.detach()` instead",
    )


def _marked(value: Any, token: _Token) -> Any:
    """The tensors of an input, those of numbers with the token in their graph."""
    made = [_mark(tensor, token) for tensor in tensors_in(value)]
    return made if isinstance(value, list) else made[0] if made else value


def _mark(tensor: Tensor, token: _Token) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    marked: Tensor = _Marked.apply(tensor.detach().requires_grad_(), token)
    return marked
