"""Facts of `kdx/ways.py`: one decision for each teacher, by a measurement where it is open, kept for a resumed run."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import DISTIL, PLAIN, Seen, config_of, prepared, quiet, session_of
from torch import nn

from kdx.backends import Backend
from kdx.calls import ModelCall
from kdx.errors import PlanError
from kdx.fanout import Shared
from kdx.loop import Session, Watchers, training
from kdx.resume import restore, training_state
from kdx.runs import build_plan, carry_out, check_run
from kdx.seats import Seat
from kdx.ways import WORTH, decide, ways

AUTO: Mapping[str, Any] = {"runtime": {"backend": "auto"}}
FOLDED = {**dict.fromkeys(WORTH, float("inf")), "folded": 0.0}
"""Only folding is worth a try: the others take seconds to make."""
TWO: dict[str, Any] = config_of(
    PLAIN,
    {
        "name": "two",
        "teachers": {"one": {"use": "small", "width": 8}, "two": {"use": "small", "width": 8}},
        "targets": {"committee": {"use": "mean"}},
        "losses": {"kd": {"use": "kd", "inputs": {"teacher": "committee.logits"}}},
    },
)


def slow_down(session: Session, seconds: float) -> None:
    """Make eager calls of each teacher take longer; a graph knows no such hook."""

    def wait(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if not torch.compiler.is_exporting():
            time.sleep(seconds)

    for call in session.teachers.live:
        call.module.network.net.register_forward_hook(wait)


def test_without_a_wish_teachers_are_eager_and_nothing_is_said() -> None:
    session = session_of(DISTIL)
    assert decide(session, None) == ()
    assert ways(session) == []


def test_the_fastest_way_is_taken_and_said_with_what_was_measured() -> None:
    session = session_of(DISTIL, AUTO)
    slow_down(session, 0.05)
    (line,) = decide(session, None, worth=FOLDED)
    assert re.fullmatch(
        r"teacher wide: folded \(within \S+ of eager\), \S+ ms; eager \S+ ms; onnxruntime not tried, as all calls take "
        r"\S+ s; openvino not tried, .*; compile not tried, .*",
        line,
    )
    assert ways(session) == [["folded", ["wide"]]]
    assert session.teachers.live == ()


def test_a_slower_way_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(DISTIL, AUTO)
    real = Backend.run
    monkeypatch.setattr(Backend, "run", lambda self, values: (time.sleep(0.05), real(self, values))[1])
    (line,) = decide(session, None, worth=FOLDED)
    assert re.match(r"teacher wide: eager, \S+ ms; folded \S+ ms; ", line)
    assert ways(session) == []
    assert [call.name for call in session.teachers.live] == ["wide"]


def test_nothing_is_tried_in_a_training_too_short_to_win_it_back() -> None:
    session = session_of(DISTIL, AUTO)
    (line,) = decide(session, None)
    assert re.match(r"teacher wide: eager, \S+ ms; folded not tried, as all calls take \S+ s; ", line)


def test_what_is_not_possible_falls_back_with_the_reason_and_is_refused_where_it_was_asked_for() -> None:
    sessions = [session_of(DISTIL, layer) for layer in (AUTO, {"teachers": {"wide": {"backend": "folded"}}})]
    for session in sessions:
        for call in session.teachers.live:
            hook = call.module.network.net.register_forward_hook
            hook(lambda module, inputs, output: output * (2 if float(output.sum()) > 0 else 1))
    (line,) = decide(sessions[0], None, worth=FOLDED)
    assert re.search(r"teacher wide: eager, \S+ ms; folded not possible: GuardOnDataDependentSymNode: ", line)
    with pytest.raises(PlanError, match=r"teachers.wide.backend: the teacher wide cannot be computed by folded: Guard"):
        decide(sessions[1], None)


def test_a_teacher_with_a_place_of_its_own_stays_eager() -> None:
    session = session_of(DISTIL, AUTO, {"teachers": {"wide": {"precision": "fp32"}}})
    plan = build_plan(prepared(DISTIL), quiet(), trained=True, device=torch.device("cpu"))
    (call,) = plan.teacher_models.values()
    session.teachers.live = (replace(call, seat=Seat(torch.device("cpu"), torch.device("cpu"))),)
    assert decide(session, None, worth=FOLDED) == ("teacher wide: eager, as it has a place or a precision of its own",)


def test_a_teachers_own_backend_goes_before_that_of_the_run() -> None:
    session = session_of(TWO, {"runtime": {"backend": "folded"}, "teachers": {"two": {"backend": "eager"}}})
    (line,) = decide(session, None)
    assert re.fullmatch(r"teacher one: folded \(within \S+ of eager\)", line)
    assert ways(session) == [["folded", ["one"]]]


def slow_backends(monkeypatch: pytest.MonkeyPatch, *, single: float = 0.0, graph: float = 0.0) -> None:
    """Make backends of one teacher, or graphs of several, take longer."""
    real = Backend.run
    monkeypatch.setattr(
        Backend, "run", lambda self, values: (time.sleep(single if len(self.calls) == 1 else graph), real(self, values))
    )


def test_one_call_of_teachers_that_are_alike_is_measured_against_their_fastest_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = session_of(TWO, AUTO)
    slow_down(session, 0.02)  # of the batched call as well
    slow_backends(monkeypatch, graph=0.02)
    lines = decide(session, None, worth=FOLDED)
    names = [line.partition(":")[0] for line in lines]
    assert names == ["teacher one", "teacher two", "teachers one, two", "teachers one, two"]
    assert lines[2].startswith("teachers one, two: called one after another")
    assert re.match(r"teachers one, two: no graph of all, as one after another \S+ ms; folded \S+ ms; onnx", lines[3])
    assert ways(session) == [["folded", ["one"]], ["folded", ["two"]]]


def test_teachers_that_are_not_alike_become_one_graph_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(TWO, AUTO, {"teachers": {"two": {"width": 3}, "far": {"use": "small", "offload": "cpu"}}})
    slow_down(session, 0.05)
    slow_backends(monkeypatch, single=0.02)
    first, last = decide(session, None, worth=FOLDED)
    assert first == "teacher far: eager, as it has a place or a precision of its own"
    assert re.fullmatch(
        r"teachers one, two: one graph of folded \(within \S+ of eager\), \S+ ms; one after another \S+ ms; "
        r"onnxruntime not tried, as all calls take \S+ s; openvino not tried, .*; compile not tried, .*",
        last,
    )
    assert ways(session) == [["folded", ["one", "two"]]]
    assert [call.name for call in session.teachers.live] == ["far"]


def test_one_graph_goes_before_a_batched_call_that_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(TWO, AUTO)
    slow_backends(monkeypatch, single=0.1)
    for call in session.teachers.live:
        call.module.network.net.register_forward_hook(
            lambda module, inputs, output: None if torch.compiler.is_exporting() else time.sleep(0.03)
        )
    (line,) = decide(session, None, worth=FOLDED)
    assert line.startswith("teachers one, two: one graph of folded (within ")
    assert ways(session) == [["folded", ["one", "two"]]]
    plain = session_of(TWO)
    found = session.teachers(session.feed.at(0), session.knobs.at(session.clock))
    expected = plain.teachers(plain.feed.at(0), plain.knobs.at(plain.clock))
    torch.testing.assert_close(found, expected)


def test_no_graph_is_tried_where_training_is_too_short_or_it_is_never_to_be() -> None:
    lines = decide(session_of(TWO, AUTO), None)
    assert re.match(r"teachers one, two: no graph of all; folded not tried, as all calls take \S+ s; onnx", lines[-1])
    never = decide(session_of(TWO, AUTO, {"runtime": {"teacher_batching": "never"}}), None)
    assert [line.partition(":")[0] for line in never] == ["teacher one", "teacher two"]


def test_a_graph_of_several_needs_as_much_time_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(TWO, AUTO, {"teachers": {"two": {"width": 3}}})
    waiting = 0.05
    slow_down(session, waiting)
    seconds = session.steps * waiting
    worth = {**FOLDED, "folded": 1.9 * seconds}  # more than the calls of one teacher take, less than those of both
    assert "folded not tried" in decide(session, None, worth=worth)[-1]


def test_always_one_call_is_one_graph_of_teachers_with_one_backend_by_name() -> None:
    layer = {
        "runtime": {"backend": "folded", "teacher_batching": "always"},
        "teachers": {"two": {"width": 3}, "slow": {"use": "small", "backend": "eager"}},
    }
    check_run(prepared(TWO, layer), quiet())
    session, eager = session_of(TWO, layer), session_of(TWO, {**layer, "runtime": {}})
    (line,) = decide(session, None)
    assert re.fullmatch(r"teachers one, two: one graph of folded \(within \S+ of eager\)", line)
    assert ways(session) == [["folded", ["one", "two"]]]
    for mine, own in zip(Seen(eager).steps, Seen(session).steps, strict=True):
        torch.testing.assert_close(own.terms["total"], mine.terms["total"], rtol=1e-5, atol=1e-6)


def test_teachers_that_cannot_be_the_graph_that_was_asked_for_are_named() -> None:
    session = session_of(TWO, {"runtime": {"backend": "folded", "teacher_batching": "always"}})
    hook = session.teachers.live[1].module.network.net.register_forward_hook
    hook(lambda module, inputs, output: output * (2 if float(output.sum()) > 0 else 1))
    with pytest.raises(PlanError, match=r"runtime.teacher_batching: one, two cannot be one graph of folded: GuardOn"):
        decide(session, None)


def test_a_resumed_run_goes_on_with_its_graph() -> None:
    first, second, third = (session_of(TWO, AUTO) for _ in range(3))
    state = {**training_state(first, 0.0), "teacher_ways": [["folded", ["one", "two"]]]}
    restore(second, state, "here")
    (line,) = decide(second, state["teacher_ways"])
    assert re.fullmatch(r"teachers one, two: one graph of folded \(within \S+ of eager\)", line)
    assert ways(second) == state["teacher_ways"] == training_state(second, 0.0)["teacher_ways"]
    hook = third.teachers.live[0].module.network.net.register_forward_hook
    hook(lambda module, inputs, output: output * (2 if float(output.sum()) > 0 else 1))
    with pytest.raises(PlanError, match=r"teachers, as the run began: one, two cannot be one graph of folded: Guard"):
        decide(third, state["teacher_ways"])


def test_a_graph_that_was_asked_for_is_a_sessions_own_side_by_side() -> None:
    shared = Shared()
    layer = {"runtime": {"backend": "folded", "teacher_batching": "always"}}
    sessions = [session_of(TWO, layer), session_of(TWO, layer), session_of(TWO)]
    for session in sessions:
        shared.join(session)
        decide(session, None)
    assert [ways(session) for session in sessions] == [[["folded", ["one", "two"]]]] * 2 + [[]]
    one, two, eager = (session.teachers(session.feed.at(0), session.knobs.at(session.clock)) for session in sessions)
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    torch.testing.assert_close(one, eager)


def test_always_one_call_goes_before_a_measurement() -> None:
    session = session_of(TWO, AUTO, {"runtime": {"teacher_batching": "always"}})
    assert len(decide(session, None, worth=FOLDED)) == 1
    assert ways(session) == [["batched", ["one", "two"]]]


def test_always_one_call_is_refused_where_teachers_have_different_backends_by_name() -> None:
    layer = {
        "runtime": {"backend": "folded", "teacher_batching": "always"},
        "teachers": {"two": {"backend": "compile"}},
    }
    with pytest.raises(
        PlanError, match=r"found 'always', but no two of .* or one backend by name and one input; expec"
    ):
        check_run(prepared(TWO, layer), quiet())


def test_a_resumed_run_takes_the_way_in_which_it_began() -> None:
    first, second, third = (session_of(DISTIL, AUTO) for _ in range(3))
    slow_down(first, 0.05)
    decide(first, None, worth=FOLDED)
    state = training_state(first, 0.0)
    restore(second, state, "here")
    (line,) = decide(second, state["teacher_ways"])
    assert re.fullmatch(r"teacher wide: folded \(within \S+ of eager\)", line)
    assert ways(second) == [["folded", ["wide"]]]
    decide(third, [], worth=FOLDED)
    assert ways(third) == []


def test_a_way_that_is_no_longer_possible_ends_a_resumed_run() -> None:
    session = session_of(DISTIL, AUTO)
    for call in session.teachers.live:
        hook = call.module.network.net.register_forward_hook
        hook(lambda module, inputs, output: output * (2 if float(output.sum()) > 0 else 1))
    with pytest.raises(PlanError, match=r"teachers.wide, as the run began: the teacher wide cannot be computed by"):
        decide(session, [["folded", ["wide"]]])


def test_an_uninterrupted_training_and_a_resumed_one_are_the_same_to_the_bit() -> None:
    layer = {"teachers": {"wide": {"backend": "folded"}}}
    whole, first, second = (session_of(DISTIL, layer) for _ in range(3))
    for session in (whole, first):
        decide(session, None)
    seen = Seen(whole)
    for _ in training(first, Watchers(*[lambda report: None] * 4)):
        if first.step == 3:
            break
    state = training_state(first, 0.0)
    restore(second, state, "here")
    decide(second, state["teacher_ways"])
    rest = Seen(second)
    for mine, own in zip(seen.steps[3:], rest.steps, strict=True):
        assert torch.equal(mine.terms["total"], own.terms["total"])


def test_a_backend_that_was_asked_for_is_a_sessions_own_side_by_side() -> None:
    shared = Shared()
    layers: list[Mapping[str, Any]] = [{"teachers": {"wide": {"backend": "folded"}}}, {}, AUTO]
    sessions = [session_of(DISTIL, layer) for layer in layers]
    for session in sessions:
        shared.join(session)
        decide(session, None, worth=FOLDED)
    assert [ways(session) for session in sessions] == [[["folded", ["wide"]]], [], []]
    assert len(shared._wanted["wide"]) == 2
    kept = [session.teachers(session.feed.at(0), session.knobs.at(session.clock)) for session in sessions]
    assert torch.equal(kept[1]["wide.mid"], kept[2]["wide.mid"])
    torch.testing.assert_close(kept[0]["wide.mid"], kept[1]["wide.mid"])


def test_a_run_says_which_backend_and_writes_it_down(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    ready = prepared(DISTIL, {"out": str(tmp_path), "teachers": {"wide": {"backend": "folded"}}})
    carry_out(ready, replace(quiet(), quiet=False, console=console))
    (line,) = json.loads((ready.folder / "environment.json").read_text())["teacher_calls"]
    assert line.startswith("teacher wide: folded (within ")
    assert f"{ready.folder.name}: {line}" in console.file.getvalue()
    assert "teacher wide: folded" in (ready.folder / "report.md").read_text()


def test_a_backend_runs_beside_a_compiled_step() -> None:
    session = session_of(DISTIL, {"teachers": {"wide": {"backend": "folded"}}})
    (call,) = (call for call in session.teachers.live if isinstance(call, ModelCall))
    decide(session, None)
    session.teachers.compile(backend="eager")
    plain = session_of(DISTIL)
    samples, knobs = plain.feed.at(0), plain.knobs.at(plain.clock)
    found, expected = session.teachers(samples, knobs), plain.teachers(samples, knobs)
    assert call.gives[0].startswith("wide.")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
