"""Facts of `kdx/seats.py`: a teacher may compute elsewhere, rest in main memory, and have a precision of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import DISTIL, Seen, prepared, quiet, run_in
from test_shown import TWO

from kdx.errors import ConfigError, PlanError
from kdx.loop import Session, make_session
from kdx.result import read_result
from kdx.runs import build_plan, check_run
from kdx.runtime import Runtime
from kdx.seats import Seat

CPU = torch.device("cpu")


def session_of(*layers: Mapping[str, Any]) -> Session:
    """A session on the device that its config names."""
    found = prepared(*layers)
    runtime = Runtime(found.spec.runtime)
    plan = build_plan(found, quiet(), trained=True, device=runtime.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_session(found.spec, plan, found.dataset, found.splits, runtime)


def seated(**options: str) -> dict[str, object]:
    return {"teachers": {"wide": options}}


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"offload": "cpu"}, {"device": "cpu", "offload": "cpu"}])
def test_the_place_of_a_teacher_changes_no_number(options: dict[str, str]) -> None:
    plain, other = Seen(session_of(DISTIL)), Seen(session_of(DISTIL, seated(**options)))
    for mine, own in zip(plain.steps, other.steps, strict=True):
        assert torch.equal(mine.terms["total"], own.terms["total"])


def test_an_offloaded_teacher_is_there_in_turn_and_its_weights_lie_where_they_lay() -> None:
    session = session_of(TWO, seated(offload="cpu"))
    net = session.plan.teachers["wide"].network
    before = [(stored.data_ptr(), stored.clone()) for stored in (*net.parameters(), *net.buffers())]
    Seen(session)
    for stored, (place, content) in zip((*net.parameters(), *net.buffers()), before, strict=True):
        assert stored.data_ptr() == place
        assert torch.equal(stored, content)


def test_an_error_in_a_pass_leaves_the_weights_where_they_rest() -> None:
    net = torch.nn.Linear(2, 2)
    place = net.weight.data_ptr()

    def fail(batch: object) -> None:
        net.weight.data = torch.zeros(2, 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Seat(CPU, CPU, offload=True).use(net, {}, fail)
    assert net.weight.data_ptr() == place


def test_the_run_does_not_move_a_teacher_that_has_its_own_place() -> None:
    session = session_of(TWO, seated(offload="cpu"))
    assert list(session.teachers.models) == ["model/slim"]


def test_a_teacher_in_its_own_precision_hands_over_float32() -> None:
    exact, coarse = session_of(DISTIL), session_of(DISTIL, seated(precision="bf16"))
    batch, knobs = exact.feed.at(0), exact.knobs.at(exact.clock)
    mine, own = exact.teachers(batch, knobs), coarse.teachers(batch, knobs)
    for key, value in mine.items():
        assert own[key].dtype == torch.float32
        assert not torch.equal(own[key], value)
        torch.testing.assert_close(own[key], value, rtol=0.05, atol=0.02)


def test_a_teacher_stays_exact_in_a_run_of_low_precision() -> None:
    layer = {"runtime": {"precision": "bf16"}}
    exact, session = session_of(DISTIL), session_of(DISTIL, layer, seated(precision="fp32"))
    batch, knobs = exact.feed.at(0), exact.knobs.at(exact.clock)
    with session.runtime.autocast():
        found = session.teachers(batch, knobs)
    assert torch.equal(found["wide.logits"], exact.teachers(batch, knobs)["wide.logits"])


def test_a_whole_run_with_a_seated_teacher_is_evaluated_as_any_other(tmp_path: Path) -> None:
    plain = read_result(run_in(tmp_path / "a", TWO).folder)
    found = read_result(run_in(tmp_path / "b", TWO, seated(offload="cpu")).folder)
    assert (found.teachers, found.agreement, found.hash) == (plain.teachers, plain.agreement, plain.hash)


@pytest.mark.parametrize("option", ["device", "offload", "precision"])
def test_what_is_trained_follows_the_runtime(option: str) -> None:
    value = "fp32" if option == "precision" else "cpu"
    with pytest.raises(ConfigError, match=rf"student.{option}: found '{value}', but only frozen teachers"):
        session_of(DISTIL, {"student": {option: value}})
    with pytest.raises(ConfigError, match=rf"teachers.wide.{option}: found"):
        session_of(DISTIL, {"teachers": {"wide": {option: value, "trainable": True}}})


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"teachers.wide.offload: found 'disk', expected cpu"):
        session_of(DISTIL, seated(offload="disk"))
    with pytest.raises(ConfigError, match=r"teachers.wide.precision: found 'int8', expected one of fp32, bf16"):
        session_of(DISTIL, seated(precision="int8"))


def test_a_device_that_is_not_there_is_refused_before_anything_trains() -> None:
    found = prepared(DISTIL, seated(device="cuda:99"))
    assert build_plan(found, quiet(), trained=False).teacher_models["wide"].seat == Seat(CPU, CPU)
    with pytest.raises(ConfigError, match=r"teachers.wide.device: found 'cuda:99', but"):
        check_run(found, quiet())


def test_half_precision_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teachers.wide.precision: fp16 needs a GPU"):
        check_run(prepared(DISTIL, seated(precision="fp16")), quiet())


def test_a_borrowed_part_must_be_where_the_student_computes() -> None:
    reuse = {"use": "simkd", "inputs": {"student": "student.mid", "teacher": "wide.mid"}}
    layer = {"losses": {"hint": None, "kd": None, "ce": None, "reuse": reuse}, "align": None}
    session_of(DISTIL, layer)
    with pytest.raises(
        PlanError, match=r"teachers.wide has a place of its own; leave out its `device`, `offload` and `shard`"
    ):
        session_of(DISTIL, layer, seated(offload="cpu"))


def test_only_precision_counts_for_the_hash() -> None:
    plain = prepared(DISTIL).hash
    assert prepared(DISTIL, seated(device="cpu", offload="cpu")).hash == plain
    assert prepared(DISTIL, seated(precision="fp32")).hash != plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_offloaded_weights_rest_in_pinned_memory_and_numbers_stay() -> None:
    layer = {"runtime": {"device": "cuda"}}
    plain, other = session_of(DISTIL, layer), session_of(DISTIL, layer, seated(offload="cpu"))
    net = other.plan.teachers["wide"].network
    for mine, own in zip(Seen(plain).steps, Seen(other).steps, strict=True):
        torch.testing.assert_close(mine.terms["total"], own.terms["total"])
    assert all(stored.is_pinned() for stored in net.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_the_cpu_serves_a_student_on_the_gpu() -> None:
    layer = {"runtime": {"device": "cuda"}}
    session = session_of(DISTIL, layer, seated(device="cpu"))
    kept = session.teachers(session.feed.at(0), session.knobs.at(session.clock))
    assert {value.device.type for value in kept.values()} == {"cuda"}
    assert {stored.device.type for stored in session.plan.teachers["wide"].parameters()} == {"cpu"}
    Seen(session)
