"""Facts of `kdx/derive.py`: students of runs as teachers, and the plain student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CASCADE, DISTIL, PLAIN, TEACHER, config_of, prepared, quiet, run_in

from kdx.config import overlay
from kdx.errors import ConfigError
from kdx.plan import Plan
from kdx.runs import Prepared, build_plan


def plan_of(found: Prepared) -> Plan:
    return build_plan(found, quiet(), trained=False)


def plain_of(*layers: dict[str, Any]) -> Prepared:
    plain = prepared(DISTIL, {"baseline": True}, *layers).plain
    assert plain is not None
    return plain


def test_a_model_that_names_a_run_has_its_student_without_its_taps() -> None:
    found = prepared(CASCADE, {"teachers": {"wide": {"run": {"student": {"taps": {"other": "first"}}}}}})
    wide = found.spec.teachers["wide"]
    assert wide.options.width == 8
    assert wide.engine.taps == {"mid": "second"}
    need = found.needs["wide"]
    assert need.spec.root.name == "wide"
    assert need.plain is None
    assert found.hash != need.hash


def test_a_module_that_is_handed_in_computes_where_and_as_its_section_says() -> None:
    own = {"precision": "bf16", "offload": "cpu", "backend": "eager", "taps": {"mid": "0"}}
    handed = quiet(networks={"wide": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))})
    engine = prepared(DISTIL, {"teachers": {"wide": own}}, options=handed).spec.teachers["wide"].engine
    assert {name: getattr(engine, name) for name in own} == own


def test_the_folder_of_runs_is_that_of_the_run_that_needs_them(tmp_path: Path) -> None:
    found = prepared(CASCADE, {"out": str(tmp_path), "teachers": {"wide": {"run": {"out": "elsewhere"}}}})
    assert found.plain is not None
    assert {found.folder.parent, found.needs["wide"].folder.parent, found.plain.folder.parent} == {tmp_path}


def test_a_run_that_no_loss_reads_is_not_needed() -> None:
    found = prepared(CASCADE, {"teachers": {"idle": {"run": overlay(TEACHER, {"name": "idle"})}},
                               "losses": {"kd": {"inputs": {"teacher": "wide.logits"}}}})  # fmt: skip
    assert list(found.needs) == ["wide"]


def test_teacher_assistants_are_chains_of_runs() -> None:
    assistant = overlay(CASCADE, {"name": "assistant", "student": {"width": 6}})
    found = prepared(overlay(DISTIL, {"teachers": None}),
                     {"teachers": {"big": {"run": assistant, "taps": {"mid": "second"}}},
                      "align": {"mid": {"like": "big.mid"}},
                      "losses": {"hint": {"inputs": {"teacher": "big.mid"}}}})  # fmt: skip
    assert found.needs["big"].spec.student.options.width == 6
    assert found.needs["big"].needs["wide"].spec.student.options.width == 8


def test_a_finished_run_can_be_named_by_its_folder(tmp_path: Path) -> None:
    teacher = run_in(tmp_path, TEACHER)
    config = config_of(
        overlay(DISTIL, {"teachers": None}),
        {"teachers": {"wide": {"use": "run", "folder": str(teacher.folder), "taps": {"mid": "second"}}}},
    )
    found = prepared(config)
    assert found.needs == {}
    plan = build_plan(found, quiet(), trained=True)
    own, kept = plan.teachers["wide"].network.net.state_dict(), teacher.student().net.state_dict()
    assert all(torch.equal(own[name], kept[name]) for name in kept)
    born_again = prepared(overlay(PLAIN, {"student": None}), {"student": {"use": "run", "folder": str(teacher.folder)}})
    student = build_plan(born_again, quiet(), trained=True).student.network.net.state_dict()
    assert all(torch.equal(student[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"use": "run", "folder": "none"}, r"teachers\.wide\.folder: .*none is not the folder of a finished run"),
        ({"run": 3}, r"teachers\.wide\.run: found 3, expected the path of a config"),
        ({"run": {"name": "x"}}, r"teachers\.wide\.run: the config has no student"),
    ],
)
def test_a_run_that_cannot_be_used_is_refused(teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(overlay(DISTIL, {"teachers": None}), {"teachers": {"wide": teacher}})


def test_the_plain_student_starts_with_the_same_weights_and_sees_the_same_labels() -> None:
    whole, plain = prepared(DISTIL, {"baseline": True, "data": {"labelled": 18}}), plain_of({"data": {"labelled": 18}})
    first, second = (plan_of(one).student.network.net.state_dict() for one in (whole, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)
    labels = [
        split[split >= 0] for split in (whole.splits.train.labels, plain.splits.train.labels) if split is not None
    ]
    assert torch.equal(*labels)
    positions = whole.splits.train.positions[whole.splits.train.labels >= 0]  # type: ignore[operator]
    assert torch.equal(positions, plain.splits.train.positions)
    assert whole.splits.val is not None
    assert plain.splits.val is not None
    assert torch.equal(whole.splits.val.positions, plain.splits.val.positions)


def test_the_plain_student_has_as_many_updates_and_no_sample_without_a_label() -> None:
    plain = plain_of({"data": {"labelled": 6}, "train": {"updates": None, "epochs": 4}})
    assert plain.spec.train.steps_per_epoch == 3
    assert plain.spec.train.epochs == 4
    assert len(plain.splits.train) == 6
    assert plain.splits.train.labels is not None
    assert (plain.splits.train.labels >= 0).all()


def test_the_plain_student_keeps_losses_that_need_no_teacher() -> None:
    layer = {
        "targets": {"tau": {"use": "doubt"}},
        "losses": {"ce": {"weight": 0.3}, "own": {"use": "stateful"}, "by_tau": {"use": "stateful", "noise": "tau"}},
    }
    plain = plain_of(layer)
    assert list(plain.spec.losses) == ["ce", "own"]
    assert plain.spec.losses["ce"].knobs["weight"] == 0.3
    assert list(plain_of().spec.losses) == ["ce"]
    assert plain.spec.teachers == {} == plain.spec.targets == plain.spec.align
    assert [call.name for call in plan_of(plain).calls] == ["student", "losses.ce", "losses.own"]


@pytest.mark.parametrize("weight", [0.1, {"use": "linear", "start": 0.0, "end": 1.0}])
def test_the_only_loss_of_the_plain_student_counts_in_full(weight: Any) -> None:
    whole = prepared(DISTIL, {"losses": {"ce": {"weight": weight}}})
    assert whole.spec.losses["ce"].knobs["weight"] != 1.0
    plain = plain_of({"losses": {"ce": {"weight": weight}}})
    assert {name: node.knobs["weight"] for name, node in plain.spec.losses.items()} == {"ce": 1.0}


def test_a_student_that_learns_from_teachers_alone_has_a_plain_one_that_learns_from_labels() -> None:
    plain = plain_of({"losses": {"ce": None}})
    assert {name: node.entry.component.name for name, node in plain.spec.losses.items()} == {"ce": "cross_entropy"}


def test_everything_else_of_the_plain_student_is_the_same() -> None:
    layer = {"train": {"ema": 0.9, "clip": 1.0, "lr": {"use": "cosine", "peak": 0.1}}, "seed": 4}
    whole, plain = prepared(DISTIL, layer), plain_of(layer)
    for name in ("ema", "clip", "batch", "accumulate", "optimizer", "weight_decay", "updates", "monitor"):
        assert getattr(plain.spec.train, name) == getattr(whole.spec.train, name)
    assert plain.spec.lr.config == whole.spec.lr.config  # type: ignore[union-attr]
    assert plain.spec.root.seed == 4
    assert plain.spec.root.name == "plain"


@pytest.mark.parametrize(
    "layers",
    [
        ({"baseline": False},),
        ({"losses": {"kd": None, "hint": None}},),
        ({"data": {"labelled": 0}, "losses": {"ce": None}},),
    ],
    ids=["not wanted", "no teacher in use", "no labels"],
)
def test_there_is_no_plain_student(layers: tuple[dict[str, Any], ...]) -> None:
    assert prepared(DISTIL, {"baseline": True}, *layers).plain is None


def test_two_configs_that_differ_in_teachers_alone_share_their_plain_student() -> None:
    first = plain_of()
    second = plain_of({"teachers": {"wide": {"width": 9}}, "losses": {"kd": {"temperature": 8.0}}})
    assert first.folder == second.folder
