"""Whether several teachers run beside each other on a GPU, by a measurement when a run starts.

It changes no number, so a checkpoint keeps nothing of it: a run that goes on measures again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdx.calls import ModelCall, StandIn, Values
from kdx.formats import milliseconds
from kdx.loop import Session
from kdx.memory import is_out_of_memory
from kdx.ranges import AUTO
from kdx.streams import Lane, Streams, in_turn
from kdx.timing import GAIN, medians
from kdx.ways import training_samples


@dataclass(frozen=True)
class _Way:
    """All teachers of a step, run in one of two ways."""

    lane: Lane
    teachers: Sequence[ModelCall | StandIn]

    def run(self, values: Values) -> None:
        self.lane(self.teachers, values)


def overlap(session: Session) -> tuple[str, ...]:
    """Let teachers run on streams of their own where a measurement says that this is faster; gives what to say of it.

    It is for several teachers on the GPU of one process, and `teacher_batching: auto` leaves it open.
    """
    teachers, options, device = session.teachers, session.spec.runtime, session.runtime.device
    runs: list[ModelCall | StandIn] = [*teachers.live, *teachers.stand_ins]
    calls = [*teachers.live, *(call for one in teachers.stand_ins for call in one.calls)]
    alone = session.runtime.group.size == 1 and all(call.seat is None for call in calls)
    is_open = options.teacher_batching == AUTO and not options.compile
    if device.type != "cuda" or len(runs) < 2 or not alone or not is_open:
        return ()
    who, streams = ", ".join(call.name for call in calls), Streams(device, len(runs))
    try:
        with torch.no_grad(), session.runtime.autocast():
            ways = {"apart": _Way(streams, runs), "in turn": _Way(in_turn, runs)}
            found = medians(ways, training_samples(session), session.runtime.wait)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return (f"teachers {who}: one after another, as streams of their own need more memory than there is",)
    apart, after = (milliseconds(found[way]) for way in ways)
    if found["apart"] < GAIN * found["in turn"]:
        teachers.lane = streams
        return (f"teachers {who}: on streams of their own, {apart}; one after another {after}",)
    return (f"teachers {who}: one after another, {after}; on streams of their own {apart}",)
