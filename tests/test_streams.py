"""Facts of `kdx/streams.py` and `kdx/overlap.py`: teachers one after another, or beside each other on a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from small_run import DISTIL, prepared, quiet

from kdx.calls import Values
from kdx.loop import Session, make_session
from kdx.overlap import overlap
from kdx.runs import build_plan
from kdx.runtime import Runtime
from kdx.streams import Runs, Streams, in_turn

THREE: Mapping[str, Any] = {
    "teachers": {name: {"use": "small", "width": width} for name, width in {"slim": 3, "broad": 12}.items()},
    "targets": {"all": {"use": "mean"}},
    "losses": {"kd": {"inputs": {"teacher": "all.logits"}}},
}
"""Two more teachers for `DISTIL`."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def session_on(device: str, **runtime: Any) -> Session:
    found = prepared(DISTIL, THREE, {"runtime": {"device": device, **runtime}})
    made = Runtime(found.spec.runtime)
    plan = build_plan(found, quiet(), trained=True, device=made.device)
    return make_session(found.spec, plan, found.dataset, found.splits, made)


def kept(session: Session) -> Mapping[str, torch.Tensor]:
    return session.teachers(session.feed.at(0), session.knobs.at(session.clock))


def test_the_way_in_which_teachers_run_is_that_of_the_lane() -> None:
    session = session_on("cpu")
    expected, seen = kept(session), []

    def backwards(teachers: Sequence[Runs], values: Values) -> None:
        seen.append(len(teachers))
        in_turn(teachers[::-1], values)

    session.teachers.lane = backwards
    found = kept(session)
    assert seen == [3]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_on_a_cpu_teachers_stay_one_after_another_without_a_word() -> None:
    session = session_on("cpu")
    assert overlap(session) == ()
    assert session.teachers.lane is in_turn


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_streams_of_their_own_are_measured_and_said() -> None:
    session = session_on("cuda")
    (line,) = overlap(session)
    words = "(on streams of their own|one after another)"
    assert re.fullmatch(rf"teachers wide, slim, broad: {words}, \S+ ms; {words} \S+ ms", line)
    assert (session.teachers.lane is in_turn) == ("broad: one after another" in line)
    assert overlap(session_on("cuda", teacher_batching="never")) == ()


@pytest.mark.gpu
@needs_gpu
def test_streams_of_their_own_change_no_bit_of_what_teachers_give() -> None:
    """Each answer is used at once and its memory given back, so that a stream that did not wait would be seen."""
    session = session_on("cuda")
    expected = kept(session)
    session.teachers.lane = Streams(session.runtime.device, 3)
    for _ in range(50):
        found = kept(session)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        del found
