"""What methods need again and again, for authors of plugins."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.components import Given
from kdx.errors import ConfigError, PlanError
from kdx.fused import soft_divergence
from kdx.fused_distance import squared_distance
from kdx.types import Shape


def precise(x: Tensor) -> Tensor:
    """The tensor in float32 at least: probabilities and mixtures of half precision are too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def soft_divergences(student: Tensor, teachers: Sequence[Tensor], temperatures: Tensor | Sequence[Tensor]) -> Tensor:
    """`tau_k^2 KL(softmax(z_k / tau_k) || softmax(z_s / tau_k))`, [B, M], from logits [B, K] of M teachers.

    A temperature is 0-d or [B]; one may be for all, or each teacher has its own. Teachers get no gradient.
    """
    each = [temperatures] * len(teachers) if isinstance(temperatures, Tensor) else temperatures
    pairs = zip(teachers, each, strict=True)
    return torch.stack([soft_divergence(student, teacher, temperature) for teacher, temperature in pairs], 1)


def hint_distances(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """The mean squared difference of M pairs of tensors [B, ...] of equal shape, [B, M]. Teachers get no gradient."""
    pairs = zip(student, teachers, strict=True)
    return torch.stack([squared_distance(ours, theirs) for ours, theirs in pairs], 1)


def confidence_weights(errors: Tensor, present: Tensor | None = None) -> Tensor:
    """`(1 - softmax(CE)) / (M - 1)` over the cross-entropies [B, M] of M >= 2 teachers, [B, M]; they sum to 1.

    With `present`, bool [B, M], those of the teachers that a sample has: one alone has the weight 1, others 0.
    Source: CA-MKD (Zhang, Chen, Wang, ICASSP 2022).
    """
    if present is None:
        return (1 - errors.softmax(1)) / (errors.shape[1] - 1)
    counted = present | ~present.any(1, keepdim=True)
    count = counted.sum(1, keepdim=True)
    found = (1 - torch.where(counted, errors, -math.inf).softmax(1)) / (count - 1).clamp(min=1)
    return torch.where(counted, torch.where(count > 1, found, 1.0), 0.0)


def pool_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W], average-pooled to the smaller height and the smaller width of both."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    pooled = [x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (a, b)]
    return pooled[0], pooled[1]


def among_present(log_weights: Tensor, present: Tensor | None) -> Tensor:
    """Log-weights [B, M] of those of M teachers that are there for a sample: the weights sum to 1, others are 0.

    `present`, bool [B, M], is what the engine hands to nodes with `gaps`. Weights stay as they are where it is None,
    and for samples without any teacher, of which the engine makes no use.
    """
    if present is None:
        return log_weights
    counted = present | ~present.any(1, keepdim=True)
    return torch.log_softmax(torch.where(counted, log_weights, -math.inf), dim=1)


def through_stages(
    x: Tensor, stages: Iterable[Callable[[Tensor], Tensor]], indices: Sequence[int] | None = None, *, stop_early: bool
) -> tuple[Tensor, list[Tensor]]:
    """What comes out of the last stage that is run, and of those at `indices` (all by default), in their order.

    For the method `forward_intermediates` of a net, by which taps read its stages without hooks. With `stop_early`
    nothing after the last stage that is asked for is run.
    """
    passed = [*stages]
    wanted = set(range(len(passed)) if indices is None else indices)
    maps: list[Tensor] = []
    for number, stage in enumerate(passed):
        if stop_early and number > max(wanted):
            break
        x = stage(x)
        if number in wanted:
            maps.append(x)
    return x, maps


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


def check_teachers(given: Given, name: str = "logits") -> int:
    """How many teachers the input `name` of many logits [K] has; `PlanError` unless all have the same K >= 2."""
    shapes: list[Shape] = given.shapes[name]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes) or shapes[0][0] < 2:
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise PlanError(f"{name}: found {found} for one sample, expected [K] with the same K >= 2 for each teacher")
    return len(shapes)


def check_same_classes(who: str, given: Given, name: str = "teacher") -> int:
    """How many teachers the input `name` of many logits has; `PlanError` unless they have the student's classes."""
    check_classes(who, given, "student")
    ours, theirs = given.shape("student"), given.shapes[name]
    if any(shape != ours for shape in theirs):
        found = ", ".join(str(list(shape)) for shape in theirs)
        raise PlanError(
            f"{who}: the student's logits are {list(ours)}, those of the teachers {found}; expected the same classes"
        )
    return len(theirs)
