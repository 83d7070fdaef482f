"""Facts of runs that train side by side: the numbers are those of each run alone, and teachers run once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CASCADE, DISTIL, PLAIN, PLUGIN, STATEFUL, config_of, lines_of, quiet, session_of, weights_of
from torch._dynamo.utils import counters

from kdx.config import load_mapping
from kdx.fanout import Shared, groups, memory, side_by_side
from kdx.plugins import discover
from kdx.result import Result
from kdx.runs import Prepared, Stopped, build_plan, carry_out, check_run, finished, prepare
from kdx.taps import Tapped

TEACHER = CASCADE["teachers"]
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_hint": {"losses": {"hint": None}},
    "hot": {"losses": {"kd": {"temperature": 8}}},
    "logits_only": {"losses": {"hint": None, "kd": {"weight": 2.0}}, "align": None},
    "stateful": {"student": {"dropout": 0.2}, "losses": {"own": {"use": "stateful"}}},
    "averaged": {"train": {"ema": 0.9, "lr": {"use": "cosine", "peak": 0.1}}},
    "longer": {"train": {"updates": 8}},
}


def prepared(*layers: Mapping[str, Any]) -> Prepared:
    return prepare(load_mapping(config_of(*layers)), quiet(), registry=discover([str(PLUGIN)]))


def runs(folder: Path, variants: Mapping[str, Mapping[str, Any]] = VARIANTS, *more: Any) -> list[Prepared]:
    return [prepared(CASCADE, variant, *more, {"out": str(folder)}) for variant in variants.values()]


def outcomes(chosen: list[Prepared], **options: Any) -> list[Result | Exception | None]:
    found: list[Result | Exception | None] = [None] * len(chosen)

    def ended(place: int, what: Result | Exception) -> None:
        found[place] = what

    side_by_side(chosen, quiet(**options), ended)
    return found


def same_runs(one: Prepared, other: Prepared) -> None:
    assert one.hash == other.hash
    mine, own = weights_of(one.folder), weights_of(other.folder)
    assert mine.keys() == own.keys()
    assert all(torch.equal(mine[name], own[name]) for name in mine)
    assert lines_of(one.folder) == lines_of(other.folder)


def test_seven_variants_have_to_the_bit_the_numbers_that_each_has_alone(tmp_path: Path) -> None:
    together, alone = runs(tmp_path / "together"), runs(tmp_path / "alone")
    assert groups(together) == [list(range(len(VARIANTS)))]
    found = outcomes(together)
    for one, other, result in zip(together, alone, found, strict=True):
        expected = carry_out(other, quiet())
        assert isinstance(result, Result)
        assert (result.best, result.last, result.confusion) == (expected.best, expected.last, expected.confusion)
        same_runs(one, other)


def test_parts_of_a_batch_are_shared_as_well(tmp_path: Path) -> None:
    variants = {"one": {}, "no_hint": {"losses": {"hint": None}}}
    accumulated = {**STATEFUL, "teachers": TEACHER}
    together, alone = (
        [prepared(accumulated, variant, {"out": str(tmp_path / name)}) for variant in variants.values()]
        for name in ("together", "alone")
    )
    outcomes(together)
    for one, other in zip(together, alone, strict=True):
        carry_out(other, quiet())
        same_runs(one, other)


def test_a_teacher_runs_once_for_all_and_gives_what_any_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = runs(tmp_path, {name: VARIANTS[name] for name in ("no_hint", "full", "hot")})
    carry_out(chosen[0].needs["wide"], quiet())
    passes: list[tuple[str, ...]] = []
    forward = Tapped.forward

    def counted(self: Tapped, batch: Any) -> Any:
        if torch.is_grad_enabled() is False and len(batch["image"]) == 12 and not self.training:
            passes.append(self.wanted)
        return forward(self, batch)

    monkeypatch.setattr(Tapped, "forward", counted)
    outcomes(chosen)
    assert passes == [("logits", "mid")] * 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_shared_model_of_compiled_steps_is_one_graph_for_all_updates() -> None:
    shared, sessions = Shared(), [session_of(DISTIL, {"runtime": {"compile": True}}) for _ in range(2)]
    for session in sessions:
        shared.join(session)
    torch.compiler.reset()
    counters.clear()
    alone = session_of(DISTIL)
    for step in range(3):
        batch, knobs = shared.at(step), alone.knobs.at(alone.clock)
        expected = alone.teachers(batch, knobs)
        for session in sessions:
            torch.testing.assert_close(session.teachers(batch, knobs), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_models_with_the_same_name_but_other_options_are_not_shared(tmp_path: Path) -> None:
    wider = {"teachers": {"wide": {"run": {"student": {"width": 6}}}}}
    chosen = runs(tmp_path / "a", {"full": {}, "wider": wider})
    alone = runs(tmp_path / "b", {"full": {}, "wider": wider})
    outcomes(chosen)
    for one, other in zip(chosen, alone, strict=True):
        carry_out(other, quiet())
        same_runs(one, other)


def test_runs_with_other_data_seed_or_batch_are_in_groups_of_their_own(tmp_path: Path) -> None:
    variants = {"full": {}, "few": {"data": {"labelled": 12}}, "seed": {"seed": 1}, "batch": {"train": {"batch": 6}}}
    chosen = runs(tmp_path, {**variants, "hot": VARIANTS["hot"]})
    assert groups(chosen) == [[0, 4], [1], [2], [3]]


def test_what_is_one_run_is_trained_once_and_each_is_told_of_its_result(tmp_path: Path) -> None:
    chosen = [prepared(PLAIN, {"out": str(tmp_path), "title": title}) for title in ("one", "other")]
    assert chosen[0].folder == chosen[1].folder
    first, last = outcomes(chosen, fresh=True)
    assert isinstance(first, Result)
    assert isinstance(last, Result)
    assert (first.name, last.name) == ("one", "other")
    assert (first.best, first.seconds) == (last.best, last.seconds)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    chosen = runs(tmp_path, {"full": {}, "hot": VARIANTS["hot"], "no_hint": VARIANTS["no_hint"]})
    chosen[1].folder.parent.mkdir(parents=True, exist_ok=True)
    chosen[1].folder.write_text("a file where the folder should be")
    found = outcomes(chosen)
    assert isinstance(found[1], Exception)
    assert all(isinstance(found[place], Result) for place in (0, 2))


def test_stopped_runs_go_on_where_they_were(tmp_path: Path) -> None:
    variants = {"full": {}, "stateful": VARIANTS["stateful"]}
    together, alone = runs(tmp_path / "together", variants), runs(tmp_path / "alone", variants)
    carry_out(together[0].needs["wide"], quiet())
    assert together[0].plain is not None
    carry_out(together[0].plain, quiet())
    assert together[1].plain is not None
    carry_out(together[1].plain, quiet())
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 7

    with pytest.raises(Stopped):
        outcomes(together, stop=stop)
    assert not any(finished(run) for run in together)
    outcomes(together)
    for one, other in zip(together, alone, strict=True):
        carry_out(other, quiet())
        same_runs(one, other)


def test_the_weights_of_a_shared_teacher_lie_in_memory_once(tmp_path: Path) -> None:
    from kdx.loop import make_session
    from kdx.runtime import Runtime

    chosen = runs(tmp_path, {"full": {}, "hot": VARIANTS["hot"]})
    carry_out(chosen[0].needs["wide"], quiet())
    shared, pointers = Shared(), []
    for run in chosen:
        plan = build_plan(run, quiet(), trained=True)
        session = make_session(run.spec, plan, run.dataset, run.splits, Runtime(run.spec.runtime))
        shared.join(session)
        pointers.append([value.data_ptr() for value in session.plan.teachers["wide"].parameters()])
    assert pointers[0] == pointers[1]


def test_memory_counts_what_is_trained_four_times(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, {"logits_only": VARIANTS["logits_only"]})
    plan = check_run(run, quiet())
    trained = sum(value.nbytes for value in plan.student.parameters())
    frozen = sum(value.nbytes for value in plan.teachers["wide"].parameters())
    kept = sum(value.nbytes for call in plan.calls for value in call.module.buffers())
    assert memory(plan) == 4 * trained + frozen + kept
