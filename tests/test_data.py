"""Splits, views and loaders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from kdx.components import Dataset, Split
from kdx.data import SampleSplit, SplitOptions, TensorSplit, View, make_splits
from kdx.errors import ConfigError, DataError
from kdx.loader import Loader, in_order
from kdx.types import Batch, DataFacts, StreamFacts

IGNORE_FEW_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers(Dataset):
    """Samples whose content is their position, with the labels given."""

    def __init__(self, labels: Sequence[int] | None, val: int = 0, test: int = 0, classes: int = 4) -> None:
        super().__init__(None)
        self._train = numbers(len(labels or range(100)), labels)
        self._val = numbers(val, [i % classes for i in range(val)]) if val else None
        self._test = numbers(test, [i % classes for i in range(test)]) if test else None
        self._classes = tuple("abcdefgh"[:classes])

    def facts(self) -> DataFacts:
        return DataFacts(streams={"x": StreamFacts("vector", ())}, classes=self._classes)

    def train(self) -> Split:
        return self._train

    def val(self) -> Split | None:
        return self._val

    def test(self) -> Split | None:
        return self._test

    def fingerprint(self) -> str:
        return "numbers"


def numbers(count: int, labels: Sequence[int] | None) -> TensorSplit:
    tensors = {"x": torch.arange(count)}
    if labels is not None:
        tensors["label"] = torch.tensor(labels)
    return TensorSplit(tensors)


def balanced(count: int = 200, classes: int = 4) -> list[int]:
    return [i % classes for i in range(count)]


def whole(view: Split | None) -> Batch:
    assert view is not None
    return view.fetch(range(len(view)))


def visible_positions(labels: Sequence[int]) -> set[int]:
    return {i for i, label in enumerate(labels) if label >= 0}


def test_validation_is_held_out_class_by_class() -> None:
    splits = make_splits(Numbers(balanced()), SplitOptions(validation=20))
    held, kept = whole(splits.val), whole(splits.train)
    assert held["label"].bincount().tolist() == [5, 5, 5, 5]
    assert sorted(held["index"].tolist() + kept["index"].tolist()) == list(range(200))


def test_a_share_and_a_count_hold_out_the_same_samples() -> None:
    share = make_splits(Numbers(balanced()), SplitOptions(validation=0.1))
    count = make_splits(Numbers(balanced()), SplitOptions(validation=20))
    assert torch.equal(whole(share.val)["index"], whole(count.val)["index"])


def test_the_data_sets_own_validation_split_is_used_and_training_left_whole() -> None:
    splits = make_splits(Numbers(balanced(), val=12, test=8), SplitOptions(validation=0.5))
    assert (len(splits.train), len(whole(splits.val)["x"]), len(whole(splits.test)["x"])) == (200, 12, 8)


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_validation_can_be_switched_off(nothing: float) -> None:
    splits = make_splits(Numbers(balanced()), SplitOptions(validation=nothing))
    assert splits.val is None
    assert len(splits.train) == 200


def test_labels_are_kept_class_by_class_and_hidden_elsewhere() -> None:
    splits = make_splits(Numbers(balanced()), SplitOptions(labelled=40, validation=20))
    batch = whole(splits.train)
    assert len(batch["label"]) == 180
    assert batch["label"][batch["label"] >= 0].bincount().tolist() == [10, 10, 10, 10]
    assert splits.train.labels is not None
    assert torch.equal(splits.train.labels, batch["label"])


def test_hidden_and_held_out_labels_leak_neither_into_batches_nor_into_the_facts() -> None:
    truth = balanced()
    splits = make_splits(Numbers(truth), SplitOptions(labelled=40, validation=20))
    batch = whole(splits.train)
    shown = {int(i): int(label) for i, label in zip(batch["index"], batch["label"], strict=True) if label >= 0}
    assert visible_positions(splits.facts.labels) == set(shown)
    assert all(splits.facts.labels[i] == truth[i] for i in shown)
    assert len(splits.facts.labels) == splits.facts.size == 200
    assert not set(whole(splits.val)["index"].tolist()) & set(shown)


def test_validation_samples_keep_their_labels() -> None:
    splits = make_splits(Numbers(balanced()), SplitOptions(labelled=0, validation=20))
    batch = whole(splits.val)
    assert torch.equal(batch["label"], batch["index"] % 4)


def test_unlabelled_samples_can_be_dropped() -> None:
    splits = make_splits(Numbers(balanced()), SplitOptions(labelled=40, unlabelled="drop", validation=20))
    assert len(splits.train) == 40
    assert (whole(splits.train)["label"] >= 0).all()
    assert splits.facts.size == 200
    assert len(visible_positions(splits.facts.labels)) == 40


def test_dropping_does_not_change_which_samples_are_labelled() -> None:
    keep = make_splits(Numbers(balanced()), SplitOptions(labelled=40))
    drop = make_splits(Numbers(balanced()), SplitOptions(labelled=40, unlabelled="drop"))
    assert keep.facts.labels == drop.facts.labels


def test_fewer_labels_are_a_subset_of_more() -> None:
    few, many = (make_splits(Numbers(balanced()), SplitOptions(labelled=n)).facts.labels for n in (20, 60))
    assert visible_positions(few) < visible_positions(many)


def test_the_split_seed_alone_decides_which_samples_are_labelled() -> None:
    torch.manual_seed(1)
    first = make_splits(Numbers(balanced()), SplitOptions(labelled=20)).facts.labels
    torch.manual_seed(2)
    assert make_splits(Numbers(balanced()), SplitOptions(labelled=20)).facts.labels == first
    assert make_splits(Numbers(balanced()), SplitOptions(labelled=20, split_seed=1)).facts.labels != first


def test_a_rare_class_keeps_at_least_one_label() -> None:
    splits = make_splits(Numbers([0] * 196 + [1, 2, 3, 3]), SplitOptions(labelled=6, validation=0))
    shown = torch.tensor([label for label in splits.facts.labels if label >= 0])
    assert shown.bincount().tolist() == [3, 1, 1, 1]


def test_shares_follow_uneven_classes() -> None:
    splits = make_splits(Numbers([0] * 120 + [1] * 60 + [2] * 20), SplitOptions(labelled=0.1, validation=0))
    shown = torch.tensor([label for label in splits.facts.labels if label >= 0])
    assert shown.bincount().tolist() == [12, 6, 2]


def test_no_label_at_all_is_allowed() -> None:
    splits = make_splits(Numbers(balanced()), SplitOptions(labelled=0))
    assert set(splits.facts.labels) == {-1}
    assert len(splits.train) == 180


def test_samples_that_never_had_a_label_stay_in_training_and_out_of_validation() -> None:
    splits = make_splits(Numbers([0, 1, 2, 3] * 10 + [-1] * 60, classes=4), SplitOptions(labelled=20, validation=8))
    assert (whole(splits.val)["label"] >= 0).all()
    assert len(splits.train) == 92
    dropped = make_splits(Numbers([0, 1, 2, 3] * 10 + [-1] * 60), SplitOptions(unlabelled="drop", validation=8))
    assert len(dropped.train) == 32


def test_a_data_set_without_labels_is_split_all_the_same() -> None:
    splits = make_splits(Numbers(None), SplitOptions(validation=10))
    assert len(splits.train) == 90
    assert splits.facts.labels == ()
    assert set(whole(splits.train)) == {"x", "index"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled": 181}, r"data.labelled: found 181, expected 0 to 180, the training samples that have a label"),
        ({"labelled": -1}, r"data.labelled: found -1, expected 0 to 180"),
        ({"labelled": 3}, r"data.labelled: 3 labels cannot cover 4 classes; expected 4 or more"),
        ({"labelled": 0.01}, r"data.labelled: 2 labels \(a share of 0.01 of 180 samples\) cannot cover 4 classes"),
        ({"labelled": 0.001}, r"data.labelled: 0 labels \(a share of 0.001 of 180 samples\) cannot cover 4 classes"),
        ({"labelled": 1.5}, r"data.labelled: found 1.5, but a share is above 0 and at most 1"),
        ({"labelled": 0.0}, r"data.labelled: found 0.0, but a share is above 0"),
        ({"labelled": True}, r"data.labelled: found True, expected a count"),
        ({"labelled": "few"}, r"data.labelled: found 'few', expected a count"),
        ({"unlabelled": "dorp"}, r"data.unlabelled: found 'dorp', did you mean 'drop'\? \(known: drop, keep\)"),
        ({"labelled": 0, "unlabelled": "drop"}, r"data.unlabelled: 'drop' leaves no training sample"),
        ({"validation": 200}, r"data.validation: found 200, but of 200 training samples at least one must be left"),
        ({"validation": 1.0}, r"data.validation: found 1.0, but a share is below 1"),
        ({"validation": -0.1}, r"data.validation: found -0.1, expected a count, or a share"),
        ({"validation": False}, r"data.validation: found False, expected a count, or a share"),
    ],
)
def test_options_that_the_data_cannot_meet_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_splits(Numbers(balanced()), SplitOptions(**options))


def test_labels_cannot_be_chosen_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match=r"data.labelled: found 10, but the data set has no class labels"):
        make_splits(Numbers(None), SplitOptions(labelled=10))


def test_validation_needs_labelled_samples_where_there_are_any() -> None:
    with pytest.raises(ConfigError, match="but there are labels for only 4 training samples"):
        make_splits(Numbers([0, 1, 2, 3] + [-1] * 96), SplitOptions(validation=10))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 9, 2], r"data: sample 2 of the train split has label 9; expected 0 to 3 for 4 classes"),
        ([0, -2, 1, 2], r"data: sample 1 of the train split has label -2; expected 0 to 3"),
    ],
)
def test_a_label_that_is_no_class_is_an_error_with_its_position(labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_splits(Numbers(labels), SplitOptions(validation=0))


def test_wrong_labels_in_the_test_split_are_found_before_training() -> None:
    data = Numbers(balanced(), test=8, classes=4)
    data._test = numbers(8, [7] * 8)
    with pytest.raises(DataError, match=r"sample 0 of the test split has label 7"):
        make_splits(data, SplitOptions())


def test_an_empty_split_is_an_error() -> None:
    data = Numbers(balanced())
    data._val = numbers(0, [])
    with pytest.raises(DataError, match=r"data: the val split has no samples"):
        make_splits(data, SplitOptions())


def test_labels_of_another_length_are_an_error() -> None:
    data = Numbers(balanced())
    data._train.labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match=r"the train split has 200 samples but labels of shape \[3\]; expected \[200\]"):
        make_splits(data, SplitOptions())


def test_split_options_are_a_schema_for_omegaconf() -> None:
    read = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SplitOptions), {"labelled": 0.5, "validation": 7}))
    assert read == SplitOptions(labelled=0.5, validation=7)
    assert isinstance(read.validation, int)


def test_tensor_splits_keep_types_and_pick_the_samples_asked_for() -> None:
    images = torch.arange(5 * 12, dtype=torch.uint8).reshape(5, 3, 2, 2)
    split = TensorSplit({"image": images, "label": torch.arange(5)})
    batch = split.fetch([3, 1])
    assert batch["image"].dtype == torch.uint8
    assert torch.equal(batch["image"], images[[3, 1]])
    assert batch["label"].tolist() == [3, 1]


def test_tensors_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataError, match="every stream needs the same number of samples, but found image 3, label 4"):
        TensorSplit({"image": torch.zeros(3, 1), "label": torch.zeros(4)})
    with pytest.raises(DataError, match="no stream at all"):
        TensorSplit({})


class Files(SampleSplit):
    """Samples that are the squares of their position; number 5 is broken and number 6 has another shape."""

    def __init__(self, bad: bool = False) -> None:
        self.labels = torch.zeros(8, dtype=torch.int64)
        self.read: list[int] = []
        self._bad = bad

    def __len__(self) -> int:
        return 8

    def sample(self, i: int) -> Batch:
        self.read.append(i)
        if self._bad and i == 5:
            raise OSError("truncated")
        return {"x": torch.full((2 if self._bad and i == 6 else 1,), i * i), "label": self.labels[i]}

    def where(self, i: int) -> str:
        return f"file{i}.png"


def test_samples_are_stacked() -> None:
    assert Files().fetch([2, 3])["x"].tolist() == [[4], [9]]


def test_an_unreadable_sample_is_an_error_that_names_its_file() -> None:
    with pytest.raises(DataError, match=r"file5.png: cannot be read: OSError: truncated"):
        Files(bad=True).fetch([4, 5])


def test_a_sample_of_another_shape_is_an_error_that_names_its_file() -> None:
    with pytest.raises(DataError, match=r"file6.png: found \[2\] for the stream 'x', expected \[1\] as in file4.png"):
        Files(bad=True).fetch([4, 6])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_reports_an_unreadable_sample_as_the_main_process_does(workers: int) -> None:
    with pytest.raises(DataError, match=r"^file5.png: cannot be read: OSError: truncated$"):
        list(in_order(Files(bad=True), 2, workers))


def train_view(count: int) -> View:
    return make_splits(Numbers(balanced(count)), SplitOptions(validation=0)).train


def indices(batches: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@IGNORE_FEW_CORES
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_workers(workers: int) -> None:
    here, there = Loader(train_view(50), 8, seed=3), Loader(train_view(50), 8, seed=3, workers=workers)
    for number in (1, 2):
        for ours, theirs in zip(here.epoch(number), there.epoch(number), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert indices(there.epoch(3, start=4)) == indices(here.epoch(3))[4:]


def test_an_epoch_visits_samples_once_and_leaves_out_an_incomplete_batch() -> None:
    loader = Loader(train_view(50), 8, seed=0)
    seen = [i for batch in indices(loader.epoch(1)) for i in batch]
    assert loader.steps_per_epoch == 6
    assert len(seen) == len(set(seen)) == 48


def test_a_split_smaller_than_a_batch_is_one_short_batch() -> None:
    loader = Loader(train_view(5), 8, seed=0)
    assert loader.steps_per_epoch == 1
    assert [sorted(batch) for batch in indices(loader.epoch(1))] == [[0, 1, 2, 3, 4]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = indices(Loader(train_view(50), 8, seed=0).epoch(2))
    loader = Loader(train_view(50), 8, seed=0)
    torch.manual_seed(99)
    list(loader.epoch(1))
    assert indices(loader.epoch(2)) == first
    assert indices(loader.epoch(1)) != first
    assert indices(Loader(train_view(50), 8, seed=1).epoch(2)) != first


def test_starting_late_does_not_read_what_was_consumed() -> None:
    files = Files()
    view = View(files, torch.arange(8), files.labels)
    expected = indices(Loader(view, 2, seed=0).epoch(1))[3]
    files.read.clear()
    assert indices(Loader(view, 2, seed=0).epoch(1, start=3)) == [expected]
    assert files.read == expected


def test_evaluation_sees_every_sample_in_order_and_a_short_last_batch() -> None:
    assert indices(in_order(train_view(10), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert indices(in_order(train_view(10), 4, workers=1)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def states() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_states_alone(workers: int) -> None:
    before = states()
    list(Loader(train_view(20), 8, seed=0, workers=workers).epoch(1))
    after = states()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_an_epoch_that_is_left_early_does_not_disturb_the_next() -> None:
    loader = Loader(train_view(50), 4, seed=0, workers=1)
    next(iter(loader.epoch(1)))
    assert indices(loader.epoch(2)) == indices(Loader(train_view(50), 4, seed=0).epoch(2))


def test_two_epochs_at_once_on_the_same_workers_are_refused() -> None:
    loader = Loader(train_view(50), 4, seed=0, workers=1)
    first = loader.epoch(1)
    next(first)
    next(loader.epoch(2))
    with pytest.raises(RuntimeError, match="this epoch was cut off"):
        next(first)


def test_only_samples_of_the_chosen_classes_are_seen_and_their_labels_are_numbered_anew() -> None:
    splits = make_splits(Numbers(balanced(), test=40), SplitOptions(classes=[3, 1], validation=10))
    assert splits.facts.classes == ("d", "b")
    for view, count in ((splits.train, 90), (splits.val, 10), (splits.test, 20)):
        batch = whole(view)
        assert len(batch["label"]) == count
        assert torch.equal(batch["index"] % 4, torch.tensor([3, 1])[batch["label"]])
        assert batch["label"].bincount().tolist() == [count // 2, count // 2]


def test_a_choice_of_classes_leaves_positions_in_the_source_and_hides_all_other_labels() -> None:
    splits = make_splits(Numbers(balanced()), SplitOptions(classes=[0, 2], validation=20, labelled=30))
    assert splits.facts.size == len(splits.facts.labels) == 200
    assert sum(label >= 0 for label in splits.facts.labels) == 30
    assert all(i % 4 == 2 * label for i, label in enumerate(splits.facts.labels) if label >= 0)
    assert len(splits.train) == 80


def test_the_data_sets_own_validation_split_is_cut_to_the_chosen_classes_too() -> None:
    splits = make_splits(Numbers(balanced(), val=12), SplitOptions(classes=[1, 2]))
    assert whole(splits.val)["x"].tolist() == [1, 2, 5, 6, 9, 10]
    assert len(splits.train) == 100


def test_what_is_held_out_of_some_classes_is_what_is_held_out_of_all() -> None:
    """So a teacher of some classes has not seen what a student of all is validated on."""
    every = whole(make_splits(Numbers(balanced()), SplitOptions(validation=20)).val)
    some = whole(make_splits(Numbers(balanced()), SplitOptions(classes=[1, 3], validation=10)).val)
    assert set(some["index"].tolist()) == {i for i in every["index"].tolist() if i % 4 in (1, 3)}


def test_samples_without_a_label_belong_to_no_chosen_class() -> None:
    splits = make_splits(Numbers([0, 1, -1, 2, 3] * 10, test=8), SplitOptions(classes=[0, 1], validation=0))
    assert sorted(whole(splits.train)["index"].tolist()) == sorted([*range(0, 50, 5), *range(1, 50, 5)])


def test_all_classes_in_their_order_are_the_whole_data_set() -> None:
    every, chosen = (
        make_splits(Numbers(balanced(), test=8), SplitOptions(classes=classes)) for classes in (None, [0, 1, 2, 3])
    )
    assert every.facts == chosen.facts
    for ours, theirs in ((every.train, chosen.train), (every.val, chosen.val), (every.test, chosen.test)):
        assert all(torch.equal(whole(ours)[name], whole(theirs)[name]) for name in ("x", "label", "index"))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([0], r"data.classes: found \[0\], expected two or more different classes"),
        ([0, 1, 1], r"found \[0, 1, 1\], expected two or more different"),
        ([0, 4], r"data.classes: found 4, expected numbers from 0 to 3, as there are 4 classes"),
        ([-1, 1], r"found -1, expected numbers from 0"),
    ],
)
def test_a_choice_of_classes_that_cannot_be_is_refused(chosen: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_splits(Numbers(balanced()), SplitOptions(classes=chosen))


def test_classes_are_chosen_only_where_there_are_labels_and_samples_of_each() -> None:
    with pytest.raises(ConfigError, match="the train split has no class labels to choose by"):
        make_splits(Numbers(None), SplitOptions(classes=[0, 1]))
    with pytest.raises(DataError, match=r"data.classes: the test split has no sample of 3"):
        make_splits(Numbers(balanced(), test=3), SplitOptions(classes=[0, 3]))
