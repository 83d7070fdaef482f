"""Tells the calls of a plan for which samples they have what they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from kdx.calls import Call, Key, ModelCall, NodeCall, Values
from kdx.errors import PlanError
from kdx.presence import ALWAYS, Presence, every, masks_of, some, without, written
from kdx.types import Batch, DataFacts


def all_there(sample: Batch, facts: DataFacts) -> Batch:
    """The samples of a probe, as if they had every modality: else a loss might see none of them."""
    masks = {stream.present for stream in facts.streams.values() if stream.present}
    views = {name for name in sample if name.partition("@")[0] in masks}
    return {name: value.new_ones(value.shape) if name in views else value for name, value in sample.items()}


def told(call: Call, facts: DataFacts, known: dict[Key, Presence]) -> Call:
    """The call with its presence; `known` holds that of what earlier calls give, and gains that of what it gives.

    A call that reads a mask of the batch copes with the gaps that this mask marks, and has none of them itself.
    """

    def of(keys: Iterable[Key]) -> list[Presence]:
        own = call.reads
        return [without(_presence(key, facts, known), own) for key in keys]

    found: Call
    if isinstance(call, ModelCall):
        found = replace(call, presence=every(of(call.reads)))
    else:
        gaps = call.arguments.get(call.module.gaps) if call.module.gaps else None
        among = tuple(of(gaps)) if isinstance(gaps, tuple) else ()
        partial = any(part != ALWAYS for part in among)
        rest = every(of(key for key in call.reads if not (partial and isinstance(gaps, tuple) and key in gaps)))
        found = replace(call, presence=every([rest, some(among)]) if partial else rest, among=among if partial else ())
    if found.presence != ALWAYS:
        known |= dict.fromkeys(found.gives, found.presence)
    return found


def settled(call: Call, values: Values) -> Call:
    """The call after it was tried out: whether absent samples can be left out of its term by a mask.

    Raises `PlanError` for a target that makes one number of a batch that may have gaps.
    """
    if not isinstance(call, NodeCall) or call.presence == ALWAYS:
        return call
    if call.kind == "losses":
        own = vars(type(call.module)).get("separable", False)  # a class derived from one may compute something else
        return replace(call, by_mask=own and values[call.gives[0]].ndim == 1)
    for key in call.gives:
        if not values[key].ndim:
            raise PlanError(
                f"{call.label}: {key} is one number for the whole batch, but some samples lack what it is made of "
                f"({', '.join(masks_of(call.presence))}); expected one value per sample, or a data set without gaps"
            )
    return call


def gap_notes(calls: Iterable[Call]) -> Iterable[str]:
    """What the plan says of losses that leave samples out."""
    for call in calls:
        if isinstance(call, NodeCall) and call.kind == "losses" and call.presence != ALWAYS:
            yield f"{call.where} is over the samples with {written(call.presence)}"


def _presence(key: Key, facts: DataFacts, known: Mapping[Key, Presence]) -> Presence:
    owner, _, stream = key.partition(".")
    if owner != "batch" or stream not in facts.streams or not (mask := facts.streams[stream].present):
        return known.get(key, ALWAYS)
    return frozenset({frozenset({f"batch.{mask}"})})
