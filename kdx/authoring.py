"""What methods need again and again, for authors of plugins."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.components import Given
from kdx.errors import ConfigError, PlanError


def pool_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W], average-pooled to the smaller height and the smaller width of both."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    pooled = [x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (a, b)]
    return pooled[0], pooled[1]


def over_labelled(values: Tensor, label: Tensor) -> Tensor:
    """0 for samples without a label (-1), and the others scaled so that the mean is that over the labelled, [B]."""
    is_known = label >= 0
    return torch.where(is_known, values, 0.0) * len(label) / is_known.sum().clamp(min=1)


def check_classes(who: str, given: Given, name: str) -> None:
    """Raise `PlanError` unless the input `name` is logits [B, K] of at least two classes."""
    shape = given.shape(name)
    if len(shape) != 1 or shape[0] < 2:
        raise PlanError(f"{who} needs logits of at least two classes [K], but {name} is {list(shape)}")


def check_choice(name: str, found: str, choices: Collection[str]) -> None:
    """Raise `ConfigError` unless an option is one of the words that it may be."""
    if found not in choices:
        raise ConfigError(f"{name}: found {found!r}, expected one of {', '.join(choices)}")
