"""Three made-up teachers: two that mostly know the class, and between them one that guesses, surely."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = 5


def labels(count: int = 200) -> Tensor:
    """Classes of some samples, the first ones more often, as in many data sets."""
    chances = torch.arange(CLASSES, 0, -1).double()
    return torch.multinomial(chances, count, replacement=True, generator=torch.Generator().manual_seed(1))


def answers(label: Tensor) -> list[Tensor]:
    """The logits [B, K] of the good one, the guessing one and another good one."""
    generator = torch.Generator().manual_seed(2)
    truth = 5.0 * torch.eye(CLASSES, dtype=torch.float64)[label]
    noise = [torch.randn(truth.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    guess = torch.randint(0, CLASSES, label.shape, generator=generator)
    return [truth + 2 * noise[0], 5.0 * torch.eye(CLASSES, dtype=torch.float64)[guess], truth + 2 * noise[1]]
