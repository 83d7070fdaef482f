"""The inputs at which the golden values of logit methods are known, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

import kdx

STUDENT = torch.tensor(
    [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, -0.5, 1.0], [1.0, -1.0, 2.0, 0.0]],
    dtype=torch.float64,
)
TEACHER = torch.tensor(
    [[3.0, 1.0, 0.2, -1.2], [0.1, 1.5, -0.3, 0.7], [0.0, 0.5, 2.5, -1.0]],
    dtype=torch.float64,
)
LABEL = torch.tensor([0, 1, 2])
LOGITS = kdx.Given({"student": (4,), "teacher": (4,)})
"""The shapes of the two."""


def number(value: float) -> Tensor:
    """A knob's value."""
    return torch.tensor(value, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    """Seeded numbers of a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
