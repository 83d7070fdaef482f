"""Weights that take a fraction of the time, for networks that are looked at and thrown away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DRAWN = 16_381
"""So many numbers of a tensor are drawn; a prime, so that the rows of a weight differ."""
_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


class RoughDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, a tensor filled with normal or uniform random numbers repeats its first `DRAWN` ones.

    Shorter tensors get the numbers that they always get as long as no longer one came before. Whoever draws from a
    generator of their own draws as many as ever, since such a generator may go on elsewhere.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWS or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        filled: Tensor = args[0]
        if filled.numel() <= DRAWN or not filled.is_contiguous():
            return func(*args, **kwargs)
        flat = filled.view(-1)
        drawn, rest = flat[:DRAWN], len(flat) % DRAWN
        func(drawn, *args[1:], **kwargs)
        flat[DRAWN : len(flat) - rest].view(-1, DRAWN).copy_(drawn)
        flat[len(flat) - rest :].copy_(drawn[:rest])
        return filled
