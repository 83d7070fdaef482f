"""Facts of `kdx/shown.py`: weights of teachers and temperatures reach the history, the events and the report."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import NET, plan_of
from rich.console import Console
from small_plugin import CLASSES
from small_run import DISTIL, PLAIN, Seen, config_of, lines_of, prepared, quiet, run_in, session_of

import kdx
from kdx.builtin.watchers import Progress
from kdx.errors import PlanError
from kdx.history import read_history
from kdx.loop import Session
from kdx.plugins import discover
from kdx.resume import restore, training_state
from kdx.runs import Stopped, carry_out
from kdx.shown import Moments, Shown, Tally
from kdx.types import Clock, EvalReport

TWO: dict[str, Any] = config_of(
    PLAIN,
    {
        "name": "two",
        "teachers": {"wide": {"use": "small", "width": 8}, "slim": {"use": "small", "width": 3}},
        "targets": {
            "committee": {"use": "confidence_mean", "sharpness": 40.0},
            "tau": {"use": "entropy_temperature", "inputs": {"logits": "committee.logits"}},
        },
        "losses": {"kd": {"use": "kd", "inputs": {"teacher": "committee.logits"}, "temperature": "tau"}},
    },
)
"""Two teachers with weights for each sample, and a temperature for each sample."""


def weights_by_hand(session: Session, batch: kdx.Batch) -> torch.Tensor:
    knobs = session.knobs.at(session.clock)
    return session.teachers(batch, knobs)["committee.weights"]


def test_weights_and_temperatures_are_found_and_columns_are_named_after_teachers() -> None:
    plan = session_of(TWO).plan
    assert plan.shown == (Shown("committee.weights", ("wide", "slim")), Shown("tau.out"))
    assert plan.kept == ("committee.logits", "tau.out"), "what is only reported is not kept for the learner"
    assert plan.reported == ("committee.weights",)


def test_a_plan_without_such_targets_shows_nothing() -> None:
    session = session_of(DISTIL)
    assert (session.plan.shown, session.plan.reported) == ((), ())
    assert Seen(session).steps[0].shown == {}


def test_each_update_reports_the_mean_and_the_spread_of_each_weight() -> None:
    session = session_of(TWO)
    batch = session.feed.at(0)
    weights = weights_by_hand(session, batch)
    shown = Seen(session).steps[0].shown
    assert list(shown) == [
        "committee.weights.wide", "committee.weights.wide/std", "committee.weights.slim", "committee.weights.slim/std",
        "tau", "tau/std",
    ]  # fmt: skip
    for column, name in enumerate(("wide", "slim")):
        torch.testing.assert_close(shown[f"committee.weights.{name}"], weights[:, column].mean())
        spread = weights[:, column].std(correction=0)
        torch.testing.assert_close(shown[f"committee.weights.{name}/std"], spread)
        assert spread > 0
    assert 1 < shown["tau"] < 4


def test_parts_of_a_batch_report_what_the_whole_batch_reports() -> None:
    whole = Seen(session_of(TWO)).steps[0].shown
    parts = Seen(session_of(TWO, {"train": {"accumulate": 3}})).steps[0].shown
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)


def test_an_epoch_ends_with_the_means_of_each_class() -> None:
    session = session_of(TWO)
    batches = [session.feed.at(step) for step in range(session.steps_per_epoch)]
    weights = torch.cat([weights_by_hand(session, batch) for batch in batches])
    labels = torch.cat([batch["label"] for batch in batches])
    reports = [report for report in Seen(session).evals if report.split == "train"]
    assert [(report.who, report.clock.step) for report in reports] == [
        ("committee", 3), ("tau", 3), ("committee", 6), ("tau", 6),
    ]  # fmt: skip
    metrics = reports[0].metrics
    assert metrics["weights.wide"] == pytest.approx(weights[:, 0].mean().item(), abs=1e-6)
    assert metrics["weights.wide/std"] == pytest.approx(weights[:, 0].std(correction=0).item(), abs=1e-5)
    for number, name in enumerate(CLASSES):
        expected = weights[labels == number][:, 1].mean().item()
        assert metrics[f"weights.slim[{name}]"] == pytest.approx(expected, abs=1e-6)


def test_knobs_that_targets_read_are_reported_by_their_path() -> None:
    layer = {"targets": {"committee": {"use": "mean", "temperature": "warm"}, "warm": {"use": "entropy_temperature",
             "inputs": {"logits": "wide.logits"}}}}  # fmt: skip
    knobs = Seen(session_of(TWO, layer)).steps[0].knobs
    assert set(knobs) == {"targets.committee.temperature", "losses.kd.temperature"}
    assert knobs["targets.committee.temperature"] > 1


def test_samples_without_a_label_count_for_the_mean_and_for_no_class() -> None:
    tally = Tally([Shown("a.weights", ("x", "y"))], ("cat", "dog"))
    values = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]])
    tally.add({"index": torch.arange(3), "label": torch.tensor([0, 0, -1])}, {"a.weights": values})
    tally.update()
    (report,) = tally.epoch(Clock(3, 3, 3))
    assert report.metrics["weights.x"] == pytest.approx(0.5)
    assert report.metrics["weights.x[cat]"] == pytest.approx(0.3)
    assert torch.tensor(report.metrics["weights.x[dog]"]).isnan()
    assert tally.epoch(Clock(3, 3, 3)) == []


def test_the_spread_of_large_numbers_that_differ_little_is_not_lost() -> None:
    whole = torch.tensor([1000.0, 1000.25, 1000.5, 1000.75], dtype=torch.float32)
    parts = [Moments(1.0, part, torch.zeros(1)) for part in whole.split(1)]
    merged = parts[0].with_(parts[1]).with_(parts[2]).with_(parts[3])
    assert dict(merged.named(["x"]))["x/std"].item() == pytest.approx(whole.double().std(correction=0).item())


OWN = """
import kdx, torch

class Own(kdx.Target):
    name = "own"
    inputs = {"logits": kdx.Many("*.logits")}
    outputs = ("logits", "doubt", "pair", "map")
    shown = SHOWN

    def forward(self, logits):
        z = torch.stack(logits).mean(0)
        return {"logits": z, "doubt": z.std(1), "pair": z[:, :2], "map": z[:, :, None]}

@kdx.hookimpl
def kdx_targets():
    return [Own]
"""


def with_own(folder: Path, shown: str) -> Any:
    path = folder / f"own_{len(list(folder.iterdir()))}.py"
    path.write_text(OWN.replace("SHOWN", shown))
    layer = {
        "teachers": {"big": NET},
        "targets": {"committee": {"use": "own"}},
        "losses": {"kd": {"use": "kd", "inputs": {"teacher": "committee.logits"}}},
    }
    return plan_of(layer, plugins=discover([str(path)]))


def test_a_target_declares_other_fields_to_be_shown(tmp_path: Path) -> None:
    plan = with_own(tmp_path, '("doubt", "pair")')
    assert plan.shown == (Shown("committee.doubt"), Shown("committee.pair", ("1", "2")))


def test_a_declared_field_that_no_report_can_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"`shown` names committee.map, of shape \[3, 1\] per sample; expected"):
        with_own(tmp_path, '("map",)')


def test_a_declared_field_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kdx.PluginError, match="shows weight, which is no output"):
        with_own(tmp_path, '("weight",)')


def test_a_run_writes_them_into_its_history_and_a_resumed_one_writes_the_same(tmp_path: Path) -> None:
    found = run_in(tmp_path / "whole", TWO)
    lines = lines_of(found.folder)
    steps = [line for line in lines if line["kind"] == "step"]
    assert all(0 <= line["shown"]["committee.weights.wide"] <= 1 for line in steps)
    assert [line["who"] for line in lines if line["kind"] == "eval"] == ["committee", "tau", "student"] * 2
    ready = prepared(TWO, {"out": str(tmp_path / "parts")})
    asked = iter(range(100))
    with pytest.raises(Stopped, match="stopped after update"):
        carry_out(ready, quiet(stop=lambda: next(asked) >= 2))
    carry_out(ready, quiet())
    assert (ready.folder / "metrics.jsonl").read_bytes() == (found.folder / "metrics.jsonl").read_bytes()
    assert read_history(found.folder).steps[0].shown["tau"] > 1


def test_the_state_of_an_epoch_survives_a_stop_in_its_middle() -> None:
    whole, first, second = session_of(TWO), session_of(TWO), session_of(TWO)
    for session in (whole, first):
        for step in range(2 if session is whole else 1):
            session.tally.add(batch := session.feed.at(step), session.teachers(batch, session.knobs.at(session.clock)))
            session.tally.update()
    restore(second, training_state(first, 0.0), "here")
    second.tally.add(batch := second.feed.at(1), second.teachers(batch, second.knobs.at(second.clock)))
    second.tally.update()
    clock = Clock(2, 3, 6)
    assert [dict(one.metrics) for one in second.tally.epoch(clock)] == [
        dict(one.metrics) for one in whole.tally.epoch(clock)
    ]


def test_targets_of_the_learner_side_are_shown_too() -> None:
    layer = {"targets": {"tau": {"use": "dtd", "inputs": {"teacher": "wide.logits"}}}}
    session = session_of(TWO, layer)
    assert "tau.out" not in session.plan.reported
    assert Seen(session).steps[0].shown["tau"] == pytest.approx(10.0, rel=1e-3)


def test_tensorboard_has_updates_epochs_and_classes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run_in(tmp_path, TWO)
    events = EventAccumulator(str(found.folder / "events"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"shown/committee.weights.wide", "shown/committee.weights.wide/std", "shown/tau"} <= tags
    assert {"train/committee/weights.wide", "train/committee/weights.wide[left]", "train/tau/out"} <= tags


def test_what_is_shown_of_an_epoch_is_no_score_on_the_progress_line() -> None:
    output = io.StringIO()
    progress = Progress(Console(file=output, width=200), "two", quiet=False)
    clock = Clock(3, 3, 6)
    progress.kdx_eval_end(EvalReport(clock, "train", "committee", {"weights.wide": 0.5}))
    assert output.getvalue() == ""
    progress.kdx_eval_end(EvalReport(clock, "val", "student", {"accuracy": 0.5}))
    assert "accuracy" in output.getvalue()
