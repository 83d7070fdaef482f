"""For which samples of a batch a tensor says anything, where some lack a modality.

A presence is a formula over masks of the batch: a set of sets of keys, each key a bool stream [B]. A sample is present
where all keys of any of the sets hold. `ALWAYS` holds for every sample, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdx.components import Loss

Presence = frozenset[frozenset[str]]
ALWAYS: Presence = frozenset({frozenset()})
LEAST = 2
"""How many samples a loss that compares samples must see."""

T = TypeVar("T")


def every(parts: Iterable[Presence]) -> Presence:
    """Where all of these are."""
    return reduce(lambda a, b: _shortest(one | other for one in a for other in b), parts, ALWAYS)


def some(parts: Iterable[Presence]) -> Presence:
    """Where any of these is."""
    return _shortest(one for part in parts for one in part)


def without(presence: Presence, masks: Iterable[str]) -> Presence:
    """The presence for a reader that looks at these masks itself."""
    known = frozenset(masks)
    return _shortest(one - known for one in presence)


def masks_of(presence: Presence) -> tuple[str, ...]:
    """The keys of the masks in a formula."""
    return tuple(sorted({key for one in presence for key in one}))


def written(presence: Presence) -> str:
    """The formula in words."""
    return " or ".join(sorted(" and ".join(sorted(one)) for one in presence))


def held(presence: Presence, values: Mapping[str, Any]) -> Tensor:
    """The samples of a batch that are present, bool [B]; `presence` is not `ALWAYS`."""
    found = [_all(values, one) for one in sorted(presence, key=sorted)]
    return reduce(torch.logical_or, found)


def _all(values: Mapping[str, Any], keys: frozenset[str]) -> Tensor:
    masks: list[Tensor] = [values[key] for key in sorted(keys)]
    return reduce(torch.logical_and, masks)


def blank(value: Tensor, present: Tensor) -> Tensor:
    """0 in place of the rows that are absent."""
    return torch.where(present.reshape(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value))


def pick(value: T, rows: Tensor) -> T | Tensor | list[Any]:
    """Some rows of a tensor, or of each tensor of a list. A 0-d tensor, and what is no tensor, stays as it is."""
    if isinstance(value, list):
        return [pick(one, rows) for one in value]
    return value[rows] if isinstance(value, Tensor) and value.ndim else value


def over_present(loss: Loss, arguments: Mapping[str, Any], present: Tensor, *, by_mask: bool) -> Tensor:
    """The term of a loss over the samples that are present: 0-d, or [B] with the mean over these samples as its mean.

    With `by_mask`, for a loss whose values belong to one sample each, the values of absent samples are replaced by 0.
    Any other loss is handed the present samples alone, for which the host waits for the device. The term of a batch
    without any, or with one where samples are compared, is 0 with a graph.
    """
    if by_mask:
        value: Tensor = loss(**arguments)
        return torch.where(present, value, 0.0) * (len(present) / present.sum().clamp(min=1))
    rows = present.nonzero().squeeze(1)
    if len(rows) < LEAST:
        return _nothing(loss, arguments, present)
    value = loss(**{name: pick(argument, rows) for name, argument in arguments.items()})
    if not value.ndim:
        return value
    return value.new_zeros(len(present)).index_copy(0, rows, value * (len(present) / len(rows)))


def _nothing(loss: nn.Module, arguments: Mapping[str, Any], present: Tensor) -> Tensor:
    """0, with a graph to all that the loss reads and to its own weights, so that each process reaches the same ones."""
    listed = [
        one for argument in arguments.values() for one in (argument if isinstance(argument, list) else [argument])
    ]
    tensors = [one for one in (*listed, *loss.parameters()) if isinstance(one, Tensor) and one.requires_grad]
    zero = torch.zeros((), device=present.device)
    return torch.stack([zero, *(one.reshape(-1)[:0].sum().float() for one in tensors)]).sum()


def _shortest(found: Iterable[frozenset[str]]) -> Presence:
    """Without the sets that another one contains: `a or (a and b)` is `a`."""
    sets = set(found)
    return frozenset(one for one in sets if not any(other < one for other in sets))
