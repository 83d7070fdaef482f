"""Stored answers of targets: the same student with no teacher in the step, and refusals of what would not be exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TOYS, plan_of
from small_run import (
    CASCADE,
    PLAIN,
    PLUGIN,
    Seen,
    config_of,
    lines_of,
    prepared,
    quiet,
    session_of,
    weights_of,
    write_config,
)
from torch import Tensor, nn

from kdx.builtin.tensor_data import TensorDataset
from kdx.cache import open_store
from kdx.calls import NodeCall
from kdx.cli import main
from kdx.config import load_mapping
from kdx.errors import ConfigError, DataError, KdxError, PlanError
from kdx.fanout import groups, side_by_side
from kdx.loop import Session, make_session
from kdx.plugins import discover
from kdx.recall import RecallTarget
from kdx.result import Result, read_result
from kdx.runs import Options, Prepared, Stopped, build_plan, carry_out, fill_caches, prepare
from kdx.runtime import Runtime
from kdx.spread import _needs_all
from kdx.table import plan_text
from kdx.types import DataFacts

FIXED = {"data": {"flip": False}}
"""No augmentation."""
FUSED: dict[str, Any] = config_of(
    PLAIN,
    {
        "name": "fused",
        "teachers": {"wide": {"use": "small", "width": 8}, "slim": {"use": "small", "width": 3}},
        "targets": {"all": {"use": "mean", "temperature": 2.0}},
        "losses": {"kd": {"use": "kd", "inputs": {"teacher": "all.logits"}, "temperature": 2.0}},
    },
)
"""Two teachers of which a student reads the mean alone."""
CACHED = {"targets": {"all": {"cache": True}}}
UNSTORABLE = discover([str(TOYS), str(TOYS.with_name("unstorable_plugin.py"))])


def run_of(*layers: Any, options: Options | None = None) -> Prepared:
    """A carried-out run."""
    found = prepared(*layers, options=options)
    carry_out(found, options or quiet())
    return found


def training_of(found: Prepared, how: Options | None = None) -> Session:
    """A session that is ready to train, its caches filled."""
    how = how or quiet()
    runtime = Runtime(found.spec.runtime)
    fill_caches(found, how, runtime)
    plan = build_plan(found, how, trained=True, device=runtime.device)
    return make_session(found.spec, plan, found.dataset, found.splits, runtime)


def trained(*layers: Any) -> Session:
    """A session that has trained, without the evaluation of a run."""
    session = training_of(prepared(*layers))
    Seen(session)
    return session


def same(one: Session, other: Session) -> bool:
    """Whether two sessions have come to the same weights."""
    mine, own = one.learner.state_dict(), other.learner.state_dict()
    return mine.keys() == own.keys() and all(torch.equal(mine[name], own[name]) for name in mine)


def same_student(one: Path, other: Path) -> bool:
    mine, own = weights_of(one), weights_of(other)
    return mine.keys() == own.keys() and all(torch.equal(mine[name], own[name]) for name in mine)


def folders(out: Path) -> list[str]:
    """The caches, without the digests of their names."""
    return sorted(path.name.rpartition("-")[0] for path in (out / "cache").iterdir() if path.is_dir())


class Tired(nn.Module):
    """A teacher that counts its calls and refuses them on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        Tired.calls += 1
        return self.head(images.flatten(1)) * Tired.scale

    calls = 0
    scale = 1.0


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    """Two such teachers."""
    monkeypatch.setattr(Tired, "calls", 0)
    monkeypatch.setattr(Tired, "scale", 1.0)
    torch.manual_seed(0)
    return {"wide": Tired(), "slim": Tired()}


@pytest.mark.parametrize("augmented", [FIXED, {"data": {"views": 3}}], ids=["fixed", "three views"])
def test_the_student_and_its_result_are_the_same_to_the_bit(tmp_path: Path, augmented: dict[str, Any]) -> None:
    live = run_of(FUSED, augmented, {"out": str(tmp_path / "live")})
    cached = run_of(FUSED, augmented, CACHED, {"out": str(tmp_path / "cached")})
    assert live.hash == cached.hash
    assert same_student(live.folder, cached.folder)
    assert lines_of(live.folder) == lines_of(cached.folder)
    one, other = read_result(live.folder), read_result(cached.folder)
    assert (one.teachers, one.targets, one.agreement) == (other.teachers, other.targets, other.agreement)
    assert {"wide", "slim"} == other.teachers.keys()
    assert folders(tmp_path / "cached") == ["all"]


def test_a_weighted_mean_is_stored_with_the_weights_that_reports_show(tmp_path: Path) -> None:
    committee = {"targets": {"all": {"use": "confidence_mean", "sharpness": 40.0}}}
    live, found = session_of(FUSED, FIXED, committee), prepared(FUSED, FIXED, committee, CACHED, {"out": str(tmp_path)})
    cached = training_of(found)
    told = [[step.numbers() for step in Seen(one).steps] for one in (live, cached)]
    assert same(live, cached)
    assert told[0] == told[1]
    assert "all.weights.wide" in told[1][0]
    store = open_store(found.caches["all"].folder)
    assert store is not None
    assert store.meta.fields.keys() == {"logits", "weights"}


def test_training_calls_neither_the_target_nor_the_teachers_that_it_alone_reads(
    tmp_path: Path, nets: dict[str, nn.Module]
) -> None:
    how = quiet(networks=nets)
    layers = (FUSED, {"data": {"views": 2}}, CACHED, {"out": str(tmp_path)})
    live = training_of(prepared(*layers, {"targets": {"all": {"cache": False}}}, options=how), how)
    Seen(live)
    assert Tired.calls > 0
    session = training_of(prepared(*layers, options=how), how)
    assert session.plan.idle == {"wide", "slim"}
    assert session.plan.kept == ("all.logits",)
    assert [sum(1 for _ in call.module.parameters()) for call in session.plan.teacher_calls] == [0, 0, 0]
    Tired.calls = 0
    trained = Seen(session)
    assert (Tired.calls, len(trained.steps)) == (0, 6)
    assert same(live, session)
    batch = session.feed.plain(session.splits.train.fetch([0, 1]))
    assert session.teachers.answers(batch, session.knobs.at(session.clock))["all.logits"].shape == (2, 3)
    assert Tired.calls > 0, "a sample that is not augmented as in training is answered by the teachers"


def test_a_teacher_that_a_loss_reads_too_goes_on(tmp_path: Path) -> None:
    second = {"losses": {"own": {"use": "kd", "inputs": {"teacher": "wide.logits"}}}}
    live, cached = trained(FUSED, FIXED, second), trained(FUSED, FIXED, second, CACHED, {"out": str(tmp_path)})
    assert same(live, cached)
    assert cached.plan.idle == {"slim"}


def test_a_target_of_a_target_with_a_temperature_for_each_sample_is_stored_too(tmp_path: Path) -> None:
    chain = {
        "targets": {
            "tau": {"use": "doubt", "inputs": {"logits": "wide.logits"}},
            "all": {"temperature": "tau"},
            "told": {"use": "peek", "inputs": {"logits": "all.logits"}, "cache": True},
        },
        "losses": {"kd": {"inputs": {"teacher": "told.logits"}}},
    }
    live = trained(FUSED, FIXED, chain, {"targets": {"told": {"cache": False}}})
    cached = trained(FUSED, FIXED, chain, {"out": str(tmp_path)})
    assert same(live, cached)
    assert cached.plan.idle == {"wide", "slim", "tau", "all"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_targets_of_which_one_reads_the_other_are_both_stored(tmp_path: Path, dtype: str) -> None:
    both = {
        "targets": {
            "all": {"cache": {"dtype": dtype}},
            "told": {"use": "peek", "inputs": {"logits": "all.logits"}, "cache": True},
        },
        "losses": {"kd": {"inputs": {"teacher": "told.logits"}}},
    }
    live = trained(FUSED, FIXED, both, {"targets": {"told": {"cache": False}}, "out": str(tmp_path / "live")})
    cached = trained(FUSED, FIXED, both, {"out": str(tmp_path)})
    assert same(live, cached), "the second is made of what is stored of the first"
    assert folders(tmp_path) == ["all", "told"]
    assert cached.plan.idle == {"wide", "slim", "all"}
    exact = prepared(FUSED, FIXED, both, {"targets": {"all": {"cache": False}}, "out": str(tmp_path)})
    assert (exact.caches["told"].folder.exists()) is (dtype == "float32")
    assert training_of(exact).plan.idle == {"wide", "slim", "all"}


def test_a_batch_of_one_sample_is_enough_to_fill_a_cache(tmp_path: Path) -> None:
    alone = {"train": {"batch": 1}, "data": {"size": 30}}
    assert same(trained(FUSED, FIXED, alone), trained(FUSED, FIXED, alone, CACHED, {"out": str(tmp_path)}))


def test_a_target_is_filled_from_what_is_stored_of_its_teachers(tmp_path: Path, nets: dict[str, nn.Module]) -> None:
    teachers = {"teachers": {"wide": {"cache": True}, "slim": {"cache": {"dtype": "float16"}}}}
    how, layers = quiet(networks=nets), (FUSED, FIXED, CACHED, {"out": str(tmp_path)})
    training_of(prepared(*layers, teachers, options=how), how)
    assert folders(tmp_path) == ["all", "slim", "wide"]
    Tired.calls = 0
    other = prepared(*layers, teachers, {"targets": {"all": {"temperature": 3.0}}}, options=how)
    training_of(other, how)
    assert Tired.calls == 0
    assert folders(tmp_path) == ["all", "all", "slim", "wide"]
    exact = prepared(*layers, {"targets": {"all": {"temperature": 3.0}}}, options=how)
    assert exact.caches["all"].folder != other.caches["all"].folder, "what is lost of a teacher is lost of the target"


def test_each_change_of_what_decides_the_answers_names_another_cache(tmp_path: Path) -> None:
    base = config_of(FUSED, CACHED, {"out": str(tmp_path), "data": {"views": 2}})
    folder = prepared(base).caches["all"].folder
    changed: dict[str, dict[str, Any]] = {
        "the weights of the teachers": {"seed": 1},
        "a teacher": {"teachers": {"slim": {"width": 2}}},
        "the number of teachers": {"teachers": {"third": {"use": "small"}}},
        "the component": {"targets": {"all": {"use": "ebkd", "cache": True}}},
        "an option": {"targets": {"all": {"weights": [1.0, 2.0]}}},
        "a knob": {"targets": {"all": {"temperature": 3.0}}},
        "what it reads": {"targets": {"all": {"inputs": {"logits": ["wide.logits"]}}}},
        "the data": {"data": {"size": 60}},
        "the samples and their labels": {"data": {"validation": 6}},
        "the augmentation": {"data": {"flip": False}},
        "the views": {"data": {"views": 3}},
        "the form": {"targets": {"all": {"cache": {"dtype": "float16"}}}},
        "the precision": {"runtime": {"precision": "bf16"}},
        "the precision of targets": {
            "runtime": {"precision": "bf16"},
            "teachers": {"wide": {"precision": "fp32"}, "slim": {"precision": "fp32"}},
        },
    }
    found = {what: prepared(base, layer).caches["all"].folder for what, layer in changed.items()}
    assert len({folder, *found.values()}) == 1 + len(changed)
    others: dict[str, dict[str, Any]] = {
        "the student": {"student": {"width": 5}},
        "the losses": {"losses": {"kd": {"temperature": 8}}},
        "the batch": {"train": {"batch": 6}},
        "what a loss reads of a teacher": {
            "teachers": {"wide": {"taps": {"mid": "second"}}},
            "align": {"mid": {"source": "student.mid", "like": "wide.mid"}},
            "losses": {"hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "wide.mid"}}},
        },
        "a teacher that nothing reads": {"teachers": {"third": {"use": "small"}},
                                         "targets": {"all": {"inputs": {"logits": ["wide.logits", "slim.logits"]}}}},
    }  # fmt: skip
    assert {prepared(base, layer).caches["all"].folder for layer in others.values()} == {folder}


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("learns", r"targets.all.cache: .*learns.* learns, so its answers cannot be stored"),
        ("draws", r"targets.all.cache: .*draws random numbers, so its answers cannot be stored"),
        ("begins", r"targets.all.cache: .*begins with random numbers"),
        ("banks", r"targets.all.cache: .*remembers what it has seen"),
        ("counts", r"targets.all.cache: .*remembers what it has seen"),
        ("compares", r"targets.all.cache: all.out depends on the batch around a sample"),
        ("number", r"targets.all.cache: all.out is not one answer for each sample"),
    ],
)
def test_a_target_whose_answers_do_not_follow_from_a_sample_is_refused(use: str, message: str) -> None:
    teacher = {"teachers": {"wide": {"use": "timm", "model": "resnet18", "args": {"layers": [1, 1, 1, 1],
               "channels": [8, 16, 24, 32], "stem_width": 8}}}}  # fmt: skip
    loss = {"losses": {"kd": {"use": "mse", "inputs": {"student": "student.logits", "teacher": "all.out"}}}}
    if use == "number":
        loss = {"losses": {"kd": {"use": "kd", "temperature": "all.out"}}}
    target = {"targets": {"all": {"use": use, "inputs": {"logits": "wide.logits"}}}}
    plan_of(teacher, loss, target, plugins=UNSTORABLE)
    with pytest.raises(PlanError, match=message):
        plan_of(teacher, loss, target, CACHED, plugins=UNSTORABLE)


def test_a_target_with_a_hook_of_training_is_refused_before_anything_trains(tmp_path: Path) -> None:
    centred = {"targets": {"all": {"use": "centred", "inputs": {"logits": "wide.logits"}}}}
    with pytest.raises(PlanError, match=r"targets.all.cache: .*remembers what it sees in `calibrate`"):
        carry_out(prepared(FUSED, FIXED, centred, CACHED, {"out": str(tmp_path)}), quiet())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [CACHED, {"targets": {"all": {"temperature": {"use": "linear", "start": 1.0, "end": 2.0}}}}],
            "targets.all.cache: targets.all.temperature moves by the schedule linear, .* expected a constant",
        ),
        (
            [CACHED, {"targets": {"all": {"inputs": {"logits": ["wide.logits", "student.logits"]}}}}],
            "targets.all.cache: it reads student, which is trained",
        ),
        ([CACHED, {"teachers": {"slim": {"trainable": True}}}], "targets.all.cache: it reads slim, which is trained"),
        (
            [CACHED, {"teachers": {"slim": {"backend": "folded"}}}],
            "targets.all.cache: it reads slim, whose backend is 'folded'",
        ),
        ([CACHED, {"data": {"flip": True}}], "targets.all.cache: image is augmented anew in each epoch"),
        ([CACHED, {"targets": {"all": {"cache": {"dtype": "int8"}}}}], "targets.all.cache.dtype: found 'int8'"),
        ([{"losses": {"kd": {"cache": True}}}], "losses.kd.cache: only the answers of teachers and targets are stored"),
        (
            [{"targets": {"all": {"use": "doubt", "inputs": {"logits": "wide.logits"}, "temperature": None,
                                  "cache": {"top": 2}}},
              "losses": {"kd": {"temperature": "all", "inputs": {"teacher": "wide.logits"}}}}],
            "targets.all.cache.top: it is for logits, and nothing reads those of all",
        ),
    ],
)  # fmt: skip
def test_what_the_config_shows_to_move_is_refused_before_anything_trains(layers: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(FUSED, FIXED, *layers)


def test_a_cache_of_another_target_is_refused_by_name(tmp_path: Path) -> None:
    filled = prepared(FUSED, FIXED, CACHED, {"out": str(tmp_path)})
    one, folder = training_of(filled), filled.caches["all"].folder
    Seen(one)
    named = {"targets": {"all": {"cache": str(folder)}}, "out": str(tmp_path / "b")}
    assert same(one, trained(FUSED, FIXED, named))
    for change, what in (
        ({"targets": {"all": {"temperature": 3.0}}}, "the target, its options, its knobs or what it reads are others"),
        ({"teachers": {"slim": {"width": 2}}}, "the teachers that it reads, or their weights, are others"),
    ):
        with pytest.raises(DataError, match=f"targets.all.cache: {folder} is not of this target on this data: {what}"):
            training_of(prepared(FUSED, FIXED, named, change))


@pytest.mark.parametrize(("scale", "dtype"), [(float("nan"), "float32"), (1e6, "float16")])
def test_what_is_no_number_is_found_when_a_cache_is_filled(
    tmp_path: Path, nets: dict[str, nn.Module], scale: float, dtype: str
) -> None:
    Tired.scale = scale
    how = quiet(networks=nets)
    form = {"targets": {"all": {"of": "logits", "cache": {"dtype": dtype}}}, "out": str(tmp_path)}
    what = "wide.logits" if dtype == "float32" else "all.logits"
    message = rf"targets.all.cache: {what} is nan or inf for \d+ samples \(batch.index [\d, ]+.*\), which no cache"
    for choice in ("refuse", "drop"):
        with pytest.raises(DataError, match=message):
            training_of(prepared(FUSED, FIXED, form, {"on_bad_teacher": choice}, options=how), how)


def test_teachers_that_may_stand_in_for_each_other_train_the_same_student(tmp_path: Path) -> None:
    drop = {"on_bad_teacher": "drop"}
    assert same(trained(FUSED, FIXED, drop), trained(FUSED, FIXED, drop, CACHED, {"out": str(tmp_path)}))


def test_a_teacher_without_a_net_can_answer_from_the_folder_of_a_target(tmp_path: Path) -> None:
    for data in (FIXED, {"data": {"views": 2}}):
        found = prepared(FUSED, data, CACHED, {"out": str(tmp_path)})
        taught, alone = training_of(found), config_of(FUSED, data, {"teachers": None, "targets": None})
        Seen(taught)
        assert same(taught, trained(alone, {"teachers": {"all": {"cache": str(found.caches["all"].folder)}}}))


def test_a_stopped_run_goes_on_whether_its_target_is_stored_or_not(tmp_path: Path) -> None:
    live, cached = (prepared(FUSED, FIXED, layer, {"out": str(tmp_path / "parts")}) for layer in ({}, CACHED))
    for part, looks, last in ((live, 1, 2), (cached, 4, 4)):  # at each batch of the filling, too
        asked = iter([False] * looks)
        with pytest.raises(Stopped, match=f"stopped after update {last} of 6"):
            carry_out(part, quiet(stop=lambda asked=asked: next(asked, True)))
    carry_out(cached, quiet())
    whole = run_of(FUSED, FIXED, {"out": str(tmp_path / "whole")})
    assert same_student(whole.folder, cached.folder)
    assert lines_of(whole.folder) == lines_of(cached.folder)


def test_a_stored_target_gets_more_views_and_teaches_as_the_live_one(tmp_path: Path) -> None:
    for views in (2, 3):
        run_of(FUSED, CACHED, {"data": {"views": views}, "out": str(tmp_path / "grown")})
    live, grown = (
        run_of(FUSED, layer, {"data": {"views": 3}, "out": str(tmp_path / out)})
        for layer, out in (({}, "live"), (CACHED, "grown"))
    )
    assert same_student(live.folder, grown.folder)


def test_runs_side_by_side_read_one_stored_target(tmp_path: Path) -> None:
    runs = [
        prepare(load_mapping(config_of(FUSED, FIXED, CACHED, {"out": str(tmp_path), "train": {"lr": lr}})), quiet(),
                registry=discover([str(PLUGIN)]))
        for lr in (0.05, 0.01)
    ]  # fmt: skip
    ended: list[Result | Exception] = []
    assert groups(runs) == [[0, 1]]
    side_by_side(runs, quiet(), lambda place, found: ended.append(found))
    assert [getattr(found, "status", found) for found in ended] == ["finished", "finished"]
    alone = run_of(FUSED, FIXED, {"out": str(tmp_path / "live"), "train": {"lr": 0.01}})
    assert same_student(alone.folder, runs[1].folder)


class Heard(TensorDataset):
    """Images, and sounds as images, which every third sample lacks."""

    def facts(self) -> DataFacts:
        facts = super().facts()
        heard = replace(facts.streams["heard"], present="heard_present")
        return replace(facts, streams={**facts.streams, "heard": heard})


class Ear(nn.Module):
    """Answers silence with nan."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, sound: Tensor) -> Tensor:
        flat = sound.flatten(1)
        return self.head(flat / flat.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("teachers", [["ear", "eye"], ["ear"]], ids=["some are there", "none may be there"])
def test_samples_that_lack_what_a_teacher_reads_are_stored_as_they_are_answered(
    tmp_path: Path, teachers: list[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    image, heard = (torch.rand(24, 1, 8, 8, generator=generator) for _ in range(2))
    there = torch.arange(24) % 3 > 0
    heard[~there] = 0
    tensors = {"image": image, "heard": heard, "heard_present": there, "label": torch.arange(24) % 3}
    torch.manual_seed(0)
    nets = {"student": nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "ear": Ear(),
            "eye": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}  # fmt: skip
    mean = {"use": "mean", "temperature": 2.0, "inputs": {"logits": [f"{one}.logits" for one in teachers]}}
    streams = {"ear": "heard", "eye": "image"}
    own = {
        "student": {"use": "module", "input": "image"},
        "teachers": {name: {"use": "module", "input": streams[name]} for name in teachers},
        "targets": {"all": mean},
        "data": {"use": "tensors", "validation": 0},
    }
    found = []
    for name, layer in (("live", {}), ("cached", CACHED)):
        how = quiet(networks={one: nets[one] for one in ("student", *teachers)}, data=Heard.from_tensors(tensors))
        config = config_of(FUSED, {"teachers": None}, own, layer, {"out": str(tmp_path / name)})
        found.append(training_of(prepared(config, options=how), how))
        steps = Seen(found[-1]).steps
        assert all(step.terms["kd"].isfinite() for step in steps)
    assert same(*found)
    assert found[1].plan.idle == {*teachers}


@pytest.mark.parametrize("data", [{"labelled": 9}, {"classes": [1, 2]}], ids=["hidden", "some classes"])
def test_a_stored_target_reads_the_labels_that_training_reads(tmp_path: Path, data: dict[str, Any]) -> None:
    guessed = {
        "teachers": {"slim": None},
        "targets": {"all": {"use": "pseudo_label", "inputs": {"logits": "wide.logits", "label": "batch.label"},
                            "temperature": None}},
        "losses": {"kd": None, "ce": {"inputs": {"label": "all"}}},
        "data": data,
    }  # fmt: skip
    assert same(trained(FUSED, FIXED, guessed), trained(FUSED, FIXED, guessed, CACHED, {"out": str(tmp_path)}))


def test_a_filling_is_taken_up_by_a_run_that_reads_less_of_the_teachers(tmp_path: Path) -> None:
    hint = {
        "teachers": {"wide": {"taps": {"mid": "second"}}},
        "align": {"mid": {"source": "student.mid", "like": "wide.mid"}},
        "losses": {"hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "wide.mid"}}},
    }
    more, less = (prepared(FUSED, FIXED, CACHED, layer, {"out": str(tmp_path)}) for layer in (hint, {}))
    training_of(more)
    (more.caches["all"].folder / "blocks.jsonl").unlink()
    assert training_of(less).plan.idle == {"wide", "slim"}
    assert folders(tmp_path) == ["all"]


def test_a_target_of_answers_for_other_images_is_no_target_of_the_teacher(tmp_path: Path) -> None:
    plain = prepared(FUSED, FIXED, {"teachers": {"wide": {"cache": True}}}, {"out": str(tmp_path)})
    training_of(plain)
    fixed = {"teachers": {"wide": {"cache": {"path": str(plain.caches["wide"].folder), "one_view": True}}}}
    augmented = (FUSED, {"data": {"views": 2}, "out": str(tmp_path)})
    one, other = prepared(*augmented, CACHED, fixed), prepared(*augmented, CACHED)
    assert one.hash != other.hash
    training_of(one)
    assert same(trained(*augmented), trained(*augmented, CACHED))


def test_a_target_over_a_view_is_stored_for_that_view(tmp_path: Path) -> None:
    data = {"data": {"views": {"count": 2, "turned": {"flip": True}}, "flip": False}}
    on_view = {"targets": {"all": {"inputs": {"logits": ["wide@turned.logits", "slim.logits"]}}}}
    layers = (FUSED, data, on_view, {"losses": {"kd": {"inputs": {"student": "student@turned.logits"}}}})
    cached = trained(*layers, CACHED, {"out": str(tmp_path)})
    assert same(trained(*layers), cached)
    assert cached.plan.idle == {"wide@turned", "slim"}


def test_the_runs_that_teachers_are_from_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, target = {"teachers": {"wide": {"cache": False}}}, {"all": {"use": "mean", "cache": True}}
    kd = {"losses": {"hint": None, "kd": {"inputs": {"teacher": "all.logits"}}}, "align": None, "targets": target}
    layers = (CASCADE, FIXED, one, kd, {"teachers": {"wide": {"run": FIXED}}, "out": str(tmp_path)})
    assert main(["cache", str(write_config(tmp_path / "config.yaml", *layers))]) == 0
    assert "36 samples" in capsys.readouterr().out
    assert [name.rpartition("-")[0] for name in run_folders(tmp_path)] == ["wide"]
    seeds = [prepared(*layers, {"seed": seed}).caches["all"].folder for seed in (0, 1)]
    assert seeds[0] == seeds[1], "without augmentation, students of other seeds share what trained teachers said"


def run_folders(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.is_dir() and path.name != "cache"]


def test_a_process_of_several_needs_its_own_rows_only(tmp_path: Path) -> None:
    live = build_plan(prepared(FUSED, FIXED), quiet(), trained=True)
    assert [_needs_all(call) for call in live.teacher_calls if isinstance(call, NodeCall)] == [True]
    calls = training_of(prepared(FUSED, FIXED, CACHED, {"out": str(tmp_path)})).plan.teacher_calls
    assert [_needs_all(call) for call in calls if isinstance(call, RecallTarget)] == [False]


def test_a_mapping_without_options_asks_for_a_cache_too(tmp_path: Path) -> None:
    found = prepared(FUSED, FIXED, {"targets": {"all": {"cache": {}}}}, {"out": str(tmp_path)})
    notes = build_plan(found, quiet(), trained=False).notes
    assert "targets.all: its answers for training are stored before it, and read from then on" in notes


def test_the_commands_say_how_large_it_is_and_what_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", FUSED, FIXED, CACHED, {"out": str(tmp_path)})
    assert main(["explain", str(config), "--text"]) == 0
    assert "targets.all: its answers for training are stored before it" in capsys.readouterr().out
    assert main(["cache", str(config)]) == 0
    said = capsys.readouterr()
    assert "all: 432 B for logits of 36 samples, views: 1, into" in said.err.replace("\n", "")
    assert f"all: {tmp_path / 'cache' / 'all-'}" in said.out
    assert main(["explain", str(config), "--text"]) == 0
    text = capsys.readouterr().out
    assert "targets.all: its answers for training are read from" in text
    assert "not run in training, for only stored targets read it: wide, slim" in text
    plan = build_plan(prepared(FUSED, FIXED, CACHED, {"out": str(tmp_path)}), quiet(), trained=False)
    assert plan_text(plan) == text


def test_a_target_that_calls_a_part_of_a_teacher_is_refused() -> None:
    target = {"all": {"use": "borrows", "inputs": {"logits": "wide.logits"}, "borrows": {"head": "wide.head"}}}
    loss = {"kd": {"use": "mse", "inputs": {"student": "student.logits", "teacher": "all.out"}}}
    own = {"teachers": {"wide": {"use": "small", "width": 8}}, "targets": target, "losses": loss}
    config = load_mapping(config_of(PLAIN, FIXED, own, CACHED))
    registry = discover([str(PLUGIN), str(TOYS.with_name("unstorable_plugin.py"))])
    with pytest.raises(ConfigError, match=r"targets.all.cache: targets.all calls parts of models"):
        prepare(config, quiet(), registry=registry)


def test_a_cache_that_does_not_say_what_it_was_made_of_is_refused(tmp_path: Path) -> None:
    found = prepared(FUSED, FIXED, CACHED, {"out": str(tmp_path)})
    training_of(found)
    path = found.caches["all"].folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta["parts"]["inputs"]
    path.write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"all-\w+ does not say what its target was made of; fill it anew"):
        training_of(found)


def test_a_damaged_cache_of_a_target_is_named(tmp_path: Path) -> None:
    found = prepared(FUSED, FIXED, CACHED, {"out": str(tmp_path)})
    training_of(found)
    path = found.caches["all"].folder / "logits.bin"
    content = bytearray(path.read_bytes())
    content[77] ^= 4
    path.write_bytes(content)
    with pytest.raises(KdxError, match=r"logits.bin is altered"):
        training_of(found)
