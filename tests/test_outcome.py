"""Facts of `kdx/outcome.py`: what a finished training is found to be worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_plugin import CLASSES, Tensors, made_images
from small_run import DISTIL, PLAIN, PLUGIN, TEACHER, prepared, registry, run_in

import kdx
from kdx.api import RunResult
from kdx.config import overlay
from kdx.plan import build_model
from kdx.result import read_result

TEST_SAMPLES = 24


class Logged(Tensors):
    """Writes down what is fetched, in order."""

    def __init__(self, name: str, tensors: kdx.Batch, log: list[tuple[str, int]]) -> None:
        super().__init__(tensors)
        self.name = name
        self.log = log

    def fetch(self, indices: Sequence[int]) -> kdx.Batch:
        self.log.append((self.name, len(indices)))
        return super().fetch(indices)


class Watched(kdx.Dataset):
    """Three splits in memory that write down when they are read."""

    name = "watched"

    def __init__(self, tested: bool = True) -> None:
        super().__init__(self.Config())
        self.log: list[tuple[str, int]] = []
        self.tested = tested

    def facts(self) -> kdx.DataFacts:
        streams = {"image": kdx.StreamFacts("image", (1, 8, 8), (0.5,), (0.3,)), "label": kdx.StreamFacts("label", ())}
        return kdx.DataFacts(streams, CLASSES, 36)

    def train(self) -> kdx.Split:
        return Logged("train", made_images(36, 1), self.log)

    def val(self) -> kdx.Split:
        return Logged("val", made_images(12, 3), self.log)

    def test(self) -> kdx.Split | None:
        return Logged("test", made_images(TEST_SAMPLES, 2), self.log) if self.tested else None

    def fingerprint(self) -> str:
        return f"watched {self.tested}"


SCORES = {"metrics": {"classification": {}, "scripted": {"scores": [0.0, 0.1, 0.9, 0.3, 0.0, 0.0]}}}
"""Asked for before training, after each of three epochs, then for the last and the best student on the test split."""


def run_scripted(folder: Path, *layers: dict[str, Any], **arguments: Any) -> RunResult:
    registry().find("metrics", "scripted", "").component.computed = 0
    return run_in(folder, PLAIN, SCORES, {"train": {"updates": 9, "monitor": "score"}}, *layers, **arguments)


def test_best_and_last_are_told_apart_and_the_best_student_is_kept(tmp_path: Path) -> None:
    found = run_scripted(tmp_path)
    result = found.result
    assert (result.best.epoch, result.best.step, result.last.epoch, result.last.step) == (2, 6, 3, 9)
    assert (result.best.val["score"], result.last.val["score"]) == (0.9, 0.3)
    shorter = run_scripted(tmp_path, {"name": "shorter", "train": {"updates": 6}})
    names = ("accuracy", "cross_entropy", "macro_f1")
    assert [result.best.test[name] for name in names] == [shorter.result.last.test[name] for name in names]
    assert result.last.test["cross_entropy"] != result.best.test["cross_entropy"]
    longer = run_in(tmp_path, PLAIN, {"name": "longer", "train": {"updates": 9}})
    assert [result.last.test[name] for name in names] == [longer.result.last.test[name] for name in names]
    kept, wanted = found.student().net.state_dict(), shorter.student().net.state_dict()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_the_test_split_is_read_at_the_end_only_and_once_for_each_student(tmp_path: Path) -> None:
    data = Watched()
    found = run_scripted(tmp_path, data=data)
    assert found.result.best.step < found.result.last.step
    first = data.log.index(("test", TEST_SAMPLES))
    assert data.log.count(("train", 12)) == 9
    assert all(name != "train" or count == 1 for name, count in data.log[first:])
    assert all(name != "val" for name, _ in data.log[first:])
    assert sum(count for name, count in data.log if name == "test") == 2 * TEST_SAMPLES


def test_without_a_test_split_there_are_no_test_numbers(tmp_path: Path) -> None:
    found = run_in(tmp_path, PLAIN, data=Watched(tested=False))
    assert found.result.best.test == {}
    assert found.result.confusion == []
    assert found.metrics == found.result.best.val != {}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A student of three teachers: a run, first weights, and one that is only tapped; few labels; a plain student."""
    teachers = {
        "wide": {"run": TEACHER, "taps": {"mid": "second"}},
        "raw": {"use": "small", "width": 3},
        "tapped": {"use": "small", "width": 4, "taps": {"mid": "second"}},
    }
    targets = {
        "both": {"use": "mean", "inputs": {"logits": ["wide.logits", "raw.logits"]}},
        "told": {"use": "peek", "inputs": {"logits": "wide.logits"}},
        "shifted": {"use": "centred", "inputs": {"logits": "told.logits"}},
        "tau": {"use": "doubt", "inputs": {"logits": "both.logits"}},
    }
    losses = {
        "kd": {"inputs": {"teacher": "both.logits"}, "temperature": "tau"},
        "kd_too": {"use": "kd", "inputs": {"teacher": "shifted.logits"}},
        "deep": {"use": "mse", "inputs": {"student": "student.mid", "teacher": "tapped.mid"}},
    }
    return run_in(
        tmp_path_factory.mktemp("runs"),
        overlay(DISTIL, {"teachers": None}),
        {"data": {"labelled": 18}, "baseline": True, "teachers": teachers, "targets": targets, "losses": losses},
    )


def test_a_teacher_that_is_a_run_brings_the_numbers_of_that_run(distilled: RunResult) -> None:
    row = distilled.result.teachers["wide"]
    assert row.folder is not None
    result = read_result(distilled.folder.parent / row.folder)
    assert row.folder.startswith("wide-")
    assert (row.test, row.val, row.last_test) == (result.best.test, result.best.val, result.last.test)
    assert (row.labelled, row.best_epoch, row.size) == (36, 1, result.size)


def test_a_teacher_that_is_no_run_is_evaluated_and_one_that_is_only_tapped_is_not(distilled: RunResult) -> None:
    raw, tapped = (distilled.result.teachers[name] for name in ("raw", "tapped"))
    found = prepared(PLAIN, {"student": {"width": 3}})
    net = build_model(replace(found.spec.student, name="raw"), found.splits.facts, 0).eval()
    test = made_images(TEST_SAMPLES, 2)
    with torch.no_grad():
        loss = F.cross_entropy(net(test["image"]), test["label"])
    assert raw.test["cross_entropy"] == pytest.approx(loss.item(), rel=1e-5)
    assert (raw.folder, raw.labelled, raw.size) == (None, None, None)
    assert (tapped.test, tapped.val) == ({}, {})


def test_ensembles_that_do_not_see_the_label_are_evaluated(distilled: RunResult) -> None:
    assert set(distilled.result.targets) == {"both"}
    teachers = load_teachers(distilled)
    test = made_images(TEST_SAMPLES, 2)
    with torch.no_grad():
        logits = torch.stack([teacher(test["image"]).softmax(1) for teacher in teachers]).mean(0).log()
    found = distilled.result.targets["both"].test["cross_entropy"]
    assert found == pytest.approx(F.cross_entropy(logits, test["label"]).item(), rel=1e-5)


def load_teachers(run: RunResult) -> list[kdx.Network]:
    row = run.result.teachers["wide"]
    found = prepared(PLAIN, {"student": {"width": 3}})
    raw = build_model(replace(found.spec.student, name="raw"), found.splits.facts, 0).eval()
    return [kdx.load_student(run.folder.parent / str(row.folder), plugins=[PLUGIN]), raw]


def test_the_plain_student_is_part_of_the_result(distilled: RunResult) -> None:
    plain = distilled.result.plain
    assert plain is not None
    assert plain.folder is not None
    result = read_result(distilled.folder.parent / plain.folder)
    assert plain.folder.startswith("plain-")
    assert plain.test == result.best.test
    assert (result.seen, result.labelled) == (18, 18)
    assert (distilled.result.seen, distilled.result.labelled) == (36, 18)


def test_the_confusion_counts_every_test_sample_of_the_best_student(distilled: RunResult) -> None:
    confusion = distilled.result.confusion
    assert [sum(row) for row in confusion] == [8, 8, 8]
    hits = sum(confusion[i][i] for i in range(3))
    assert hits / TEST_SAMPLES == pytest.approx(distilled.result.best.test["accuracy"])


def test_size_and_times_are_those_of_the_student(distilled: RunResult) -> None:
    result = distilled.result
    student = distilled.student()
    assert result.size is not None
    assert result.size.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert result.size.file_bytes == (distilled.folder / "student.safetensors").stat().st_size
    seconds = result.seconds
    assert min(seconds.teachers, seconds.student, seconds.data, seconds.evaluation) > 0
    assert seconds.teachers + seconds.student + seconds.data + seconds.evaluation < seconds.total


def test_the_result_in_the_folder_is_the_one_that_was_given(distilled: RunResult) -> None:
    assert read_result(distilled.folder) == distilled.result
    assert distilled.result.status == "finished"
    assert distilled.folder.name == f"distilled-{distilled.result.hash}"
    assert distilled.result.classes == list(CLASSES)
