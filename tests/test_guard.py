"""Facts of `kdx/guard.py`: a teacher that answers with nan or inf is refused, or left out and counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import DISTIL, PLAIN, Seen, config_of, lines_of, prepared, quiet, run_in, session_of
from test_shown import TWO

from kdx.config import load_mapping
from kdx.errors import ConfigError, KdxError, PlanError
from kdx.guard import EVERY, guarded
from kdx.loop import Session, Watchers, train
from kdx.plots_shown import shown_panels
from kdx.report_teachers import dropped_section
from kdx.result import read_result
from kdx.runs import Stopped, carry_out, prepare

DROP = config_of(TWO, {"on_bad_teacher": "drop", "targets": {"committee": {"use": "mean", "of": "logits"}}})
"""Two teachers whose logits are averaged."""


def spoil(session: Session, teacher: str = "wide", *, value: float = math.nan, first: int = 0) -> list[int]:
    """From the batch `first` on, a teacher gives `value` for every fifth sample; gives the samples of that batch."""
    net = session.plan.teachers[teacher].network.net
    seen = 0

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        spoilt = output.clone()
        if seen > first:
            spoilt[::5, 1] = value
        return spoilt

    net.register_forward_hook(hook)
    return sorted(session.feed.at(first)["index"][::5].tolist())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_answer_is_refused_with_teacher_update_and_samples(value: float) -> None:
    session = session_of(TWO)
    samples = spoil(session, value=value, first=1)
    named = ", ".join(map(str, samples))
    pattern = rf"teachers.wide: it gave nan or inf for 6 samples, first in update 2 \(batch.index {named}\); expected"
    with pytest.raises(KdxError, match=pattern):
        Seen(session)


def test_nothing_is_kept_as_good_after_a_bad_answer() -> None:
    session = session_of(TWO)
    spoil(session)
    done: list[str] = []
    watchers = Watchers(
        lambda report: None, lambda report: done.append("told"), lambda one: done.append("best"),
        lambda one: done.append("saved"),
    )  # fmt: skip
    with pytest.raises(KdxError, match="on_bad_teacher: drop"):
        train(session, watchers)
    assert session.step == 3, "the flags are read before the epoch is evaluated"
    assert done == []


def test_a_long_epoch_is_not_waited_for() -> None:
    session = session_of(TWO, {"train": {"steps_per_epoch": 1000, "updates": 1000}})
    spoil(session, first=EVERY - 2)
    with pytest.raises(KdxError, match=f"first in update {EVERY - 1}"):
        Seen(session)
    assert session.step == EVERY


def test_features_are_looked_at_as_well() -> None:
    layer = {"losses": {"kd": None}, "train": {"updates": 3}}
    session = session_of(DISTIL, layer)
    net = session.plan.teachers["wide"].network.net
    net.first.register_forward_hook(lambda module, inputs, output: output / 0)
    with pytest.raises(KdxError, match=r"teachers.wide: it gave nan or inf for 36 samples, first in update 1 "):
        Seen(session)


def test_teachers_of_other_classes_do_not_stand_in_for_each_other() -> None:
    plan = session_of(DROP).plan
    assert len(guarded(plan.teacher_calls, plan.shapes, "drop").groups) == 1
    with pytest.raises(PlanError, match="give logits over the same classes"):
        guarded(plan.teacher_calls, plan.shapes, "drop", {"wide": ("a", "b", "c")})


def test_a_dropped_answer_is_replaced_by_that_of_the_other_teacher() -> None:
    session, clean = session_of(DROP), session_of(DROP)
    batch = clean.feed.at(0)
    knobs = clean.knobs.at(clean.clock)
    both = clean.teachers(batch, knobs)["committee.logits"]
    slim = clean.teachers.answers(batch, knobs)["slim.logits"]
    spoil(session)
    found = session.teachers(batch, knobs)["committee.logits"]
    torch.testing.assert_close(found[::5], slim[::5])
    kept = torch.arange(len(found)) % 5 != 0
    assert torch.equal(found[kept], both[kept]), "the other samples are untouched"


def test_of_three_teachers_the_mean_of_the_good_ones_stands_in() -> None:
    three = config_of(DROP, {"teachers": {"more": {"use": "small", "width": 5}}})
    session = session_of(three)
    batch, knobs = session.feed.at(0), session.knobs.at(session.clock)
    good = session.teachers.answers(batch, knobs)
    spoil(session)
    found = session.teachers.answers(batch, knobs)
    torch.testing.assert_close(found["wide.logits"][0], (good["slim.logits"][0] + good["more.logits"][0]) / 2)
    torch.testing.assert_close(found["committee.logits"][0], (good["slim.logits"][0] + good["more.logits"][0]) / 2)


def test_a_run_goes_on_and_counts_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "nan_plugin.py"
    path.write_text(BAD_NET)
    layer: Mapping[str, Any] = {"plugins": [*PLAIN["plugins"], str(path)], "teachers": {"wide": {"use": "nan_net"}}}
    found = run_in(tmp_path, DROP, layer)
    result = read_result(found.folder)
    counts = [line["shown"]["wide.dropped"] for line in lines_of(found.folder) if line["kind"] == "step"]
    assert result.dropped == {"wide": sum(counts), "slim": 0}
    assert 0 < sum(counts) < 72
    assert all(math.isfinite(line["terms"]["kd"]) for line in lines_of(found.folder) if line["kind"] == "step")
    assert f"| `wide` | {int(sum(counts))} |" in (found.folder / "report.md").read_text()
    ready = prepare(load_mapping(config_of(DROP, layer, {"out": str(tmp_path / "parts")})), quiet())
    asked = iter(range(100))
    with pytest.raises(Stopped):
        carry_out(ready, quiet(stop=lambda: next(asked) >= 2))
    assert carry_out(ready, quiet()).dropped == result.dropped, "a resumed run counts on"


BAD_NET = """
import kdx, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 3)

    def forward(self, images):
        z = self.head(images.flatten(1))
        return torch.where(z[:, :1] > z[:, 1:2], torch.nan, z)

class NanNet(kdx.Model):
    name = "nan_net"
    offers = ("logits",)

    def build(self):
        return kdx.Network(Net())

@kdx.hookimpl
def kdx_models():
    return [NanNet]
"""


def test_where_all_teachers_are_bad_nothing_stands_in() -> None:
    session = session_of(DROP)
    spoil(session)
    spoil(session, "slim")
    with pytest.raises(KdxError, match=r"teachers.wide: .* no other teacher could stand in for it"):
        Seen(session)


def test_nothing_is_left_out_and_nothing_is_said_where_all_is_well() -> None:
    seen = Seen(session := session_of(DROP))
    assert session.guard.dropped() == {"wide": 0, "slim": 0}
    assert seen.steps[0].shown["wide.dropped"] == 0
    assert session_of(TWO).guard.dropped() == {}


def test_the_numbers_of_good_teachers_do_not_depend_on_the_choice() -> None:
    dropping, refusing = Seen(session_of(DROP)), Seen(session_of(DROP, {"on_bad_teacher": "refuse"}))
    for mine, own in zip(dropping.steps, refusing.steps, strict=True):
        assert torch.equal(mine.terms["total"], own.terms["total"])


def test_one_teacher_cannot_be_left_out() -> None:
    with pytest.raises(PlanError, match=r"no two of the teachers \(wide\) give logits over the same classes"):
        session_of(DISTIL, {"on_bad_teacher": "drop"})


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="on_bad_teacher: found 'skip', expected refuse or drop"):
        session_of(TWO, {"on_bad_teacher": "skip"})


def test_the_choice_counts_for_the_hash_where_there_are_teachers() -> None:
    assert prepared(DROP).hash != prepared(DROP, {"on_bad_teacher": "refuse"}).hash
    assert prepared(PLAIN).hash == prepared(PLAIN, {"on_bad_teacher": "drop"}).hash


def test_counts_are_no_panel_of_means_and_no_section_without_one() -> None:
    from sample_run import sample_result

    assert dropped_section(sample_result()) == []
    assert shown_panels([]) == []
