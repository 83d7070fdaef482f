"""Whether the answers of a target may be stored: they must follow from a sample alone, and stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdx.calls import Key, NodeCall, Values
from kdx.components import Node
from kdx.errors import PlanError
from kdx.probe import without_trace

RTOL, ATOL = 1e-4, 1e-5
"""What rounding may change where a sample has others beside it."""


@torch.no_grad()
def check_storable(
    chain: Sequence[NodeCall], values: Values, teacher_side: Container[str], again: Callable[[NodeCall], Node]
) -> None:
    """Try a target, the last of a chain of all targets that it reads, on the two samples of a probe.

    `again` makes a node anew with other random numbers. Raises `PlanError` with the reason where an answer learns,
    remembers, draws random numbers, reads what is trained, or depends on the batch around a sample.
    """
    where = f"{chain[-1].where}.cache"
    for call in chain:
        if (reason := _moves(call, values, teacher_side, again)) is not None:
            raise PlanError(f"{where}: {call.label} {reason}, so its answers cannot be stored; leave the cache out")
    check_samples(where, chain, values)


def check_samples(where: str, chain: Sequence[NodeCall], values: Values) -> None:
    """Raise `PlanError` where what the last target of a chain gives for a batch is not what it gives for its halves."""
    size, gives = len(values["batch.index"]), chain[-1].gives
    whole = answers(chain, gives, values)
    for key, value in whole.items():
        if not value.ndim or len(value) != size:
            raise PlanError(f"{where}: {key} is not one answer for each sample, so it cannot be stored; leave it out")
    read = {key: value for key, value in values.items() if key not in {key for call in chain for key in call.gives}}
    for part in (slice(0, size // 2), slice(size // 2, size))[size < 2 :]:
        found = answers(chain, gives, {key: _rows(value, part, size) for key, value in read.items()})
        for key, value in found.items():
            if not _alike(value, whole[key][part]):
                raise PlanError(
                    f"{where}: {key} depends on the batch around a sample, so it cannot be stored; leave the cache out"
                )


def answers(chain: Sequence[NodeCall], keys: Sequence[Key], values: Values) -> dict[Key, Tensor]:
    """What a chain of targets gives, under these keys."""
    found = dict(values)
    for call in chain:
        call.run(found)
        call.check(found)
    return {key: found[key] for key in keys}


def _moves(
    call: NodeCall, values: Values, teacher_side: Container[str], again: Callable[[NodeCall], Node]
) -> str | None:
    """Why a target gives another answer to a sample after some training, or in another run; None if it does not."""
    module = call.module
    if any(True for _ in module.parameters()):
        return "learns"
    if call.name not in teacher_side:
        return "reads what is trained"
    for hook in ("calibrate", "after_update"):
        if getattr(type(module), hook) is not getattr(Node, hook):
            return f"remembers what it sees in `{hook}`"
    other = again(call).eval()
    module.eval()  # as on the side of the teachers
    mine, own = dict(module.named_buffers()), dict(other.named_buffers())
    if mine.keys() != own.keys() or not all(_same(mine[name], own[name]) for name in mine):
        return "begins with random numbers"
    before, state = {name: value.clone() for name, value in mine.items()}, module.given.generator.get_state()
    with without_trace(module, generator=module.given.generator):
        first, second = (answers([call], call.gives, values) for _ in range(2))
        after = dict(module.named_buffers())
        changed = after.keys() != before.keys() or not all(_same(after[name], before[name]) for name in before)
        drawn = not torch.equal(module.given.generator.get_state(), state)
    if drawn:
        return "draws random numbers"
    if changed or not all(_same(first[key], second[key]) for key in first):
        return "remembers what it has seen"
    third = answers([replace(call, module=other)], call.gives, values)
    return None if all(_same(first[key], third[key]) for key in first) else "begins with random numbers"


def _rows(value: Any, part: slice, size: int) -> Any:
    """The rows of a part of a batch; what is not of each sample stays as it is."""
    return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == size else value


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=RTOL, atol=ATOL, equal_nan=True)
