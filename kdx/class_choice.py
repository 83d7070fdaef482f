"""Some of the classes of a data set: what the option `data.classes` chooses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdx.errors import ConfigError, DataError


def choose_classes(labels: Tensor | None, chosen: Sequence[int], classes: Sequence[str], name: str) -> Tensor:
    """The labels of a split as places in `chosen`, int64 `[N]`; -1 for samples of other classes and for those of none.

    `labels` are checked labels of all `classes`, int64 `[N]`. Raises ConfigError for a choice that cannot be, DataError
    where the split `name` has no sample of a chosen class.
    """
    _check_choice(chosen, len(classes))
    if labels is None:
        raise ConfigError(f"data.classes: found {list(chosen)}, but the {name} split has no class labels to choose by")
    places = torch.full((1 + max(max(chosen), int(labels.max())),), -1)
    places[list(chosen)] = torch.arange(len(chosen))
    found = torch.where(labels >= 0, places[labels.clamp(min=0)], -1)
    absent = [number for place, number in enumerate(chosen) if not (found == place).any()]
    if absent:
        raise DataError(f"data.classes: the {name} split has no sample of {', '.join(map(str, absent))}")
    return found


def chosen_names(chosen: Sequence[int], classes: Sequence[str]) -> tuple[str, ...]:
    """The names of the chosen classes; their numbers where the data set names none."""
    return tuple(classes[number] if classes else str(number) for number in chosen)


def _check_choice(chosen: Sequence[int], count: int) -> None:
    """`count` is the number of classes, 0 where it is unknown."""
    if len(chosen) < 2 or len(set(chosen)) != len(chosen):
        raise ConfigError(f"data.classes: found {list(chosen)}, expected two or more different classes")
    wrong = [number for number in chosen if number < 0 or (count and number >= count)]
    if wrong:
        highest = f"to {count - 1}, as there are {count} classes" if count else "or more"
        raise ConfigError(f"data.classes: found {', '.join(map(str, wrong))}, expected numbers from 0 {highest}")
