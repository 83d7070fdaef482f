"""The classification metric, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdx.builtin.metrics import Classification
from kdx.errors import DataError, PlanError
from kdx.types import DataFacts

CPU = torch.device("cpu")


def metric(classes: int = 3, bins: int = 15) -> Classification:
    facts = DataFacts(streams={}, classes=tuple("abcdefghij"[:classes]))
    return Classification(Classification.Config(bins=bins), facts, CPU)


def logits(*rows: tuple[float, ...]) -> Tensor:
    """Logits whose softmax gives these probabilities."""
    return torch.tensor(rows).log()


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    found = metric()
    found.update(
        logits=logits((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.2, 0.7, 0.1), (0.1, 0.1, 0.8)),
        label=torch.tensor([0, 1, 1, 2]),
    )
    numbers = found.compute()
    assert numbers["accuracy"] == pytest.approx(3 / 4)
    assert numbers["macro_recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert numbers["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert numbers["cross_entropy"] == pytest.approx(-math.log(0.7 * 0.3 * 0.7 * 0.8) / 4)
    # Bins: 0.7 twice (both right), 0.6 (wrong), 0.8 (right).
    assert numbers["calibration_error"] == pytest.approx((2 * 0.3 + 0.6 + 0.2) / 4, abs=1e-6)
    assert found.confusion().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_samples_without_a_label_are_left_out() -> None:
    with_them, without = metric(), metric()
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    label = torch.arange(20) % 3
    hidden = torch.where(torch.arange(20) % 4 == 0, -1, label)
    with_them.update(logits=rows, label=hidden)
    without.update(logits=rows[hidden >= 0], label=label[hidden >= 0])
    assert with_them.compute() == pytest.approx(without.compute())
    assert torch.equal(with_them.confusion(), without.confusion())


def test_batches_add_up() -> None:
    whole, parts = metric(), metric()
    rows = 3 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    label = torch.arange(50) % 3
    whole.update(logits=rows, label=label)
    for part in range(0, 50, 16):
        parts.update(logits=rows[part : part + 16], label=label[part : part + 16])
    assert parts.compute() == pytest.approx(whole.compute())


def test_a_batch_without_any_label_changes_nothing() -> None:
    found = metric()
    found.update(logits=logits((0.7, 0.2, 0.1)), label=torch.tensor([0]))
    before = found.compute()
    found.update(logits=logits((0.7, 0.2, 0.1)), label=torch.tensor([-1]))
    assert found.compute() == pytest.approx(before)


def test_logits_between_0_and_1_are_not_taken_for_probabilities() -> None:
    found = metric(classes=2)
    found.update(logits=torch.tensor([[0.9, 0.1]]), label=torch.tensor([0]))
    confidence = 1 / (1 + math.exp(-0.8))
    assert found.compute()["calibration_error"] == pytest.approx(1 - confidence, abs=1e-6)


def test_a_class_that_does_not_occur_has_no_part_in_the_macro_average() -> None:
    found = metric(classes=3)
    found.update(logits=logits((0.7, 0.2, 0.1), (0.2, 0.7, 0.1)), label=torch.tensor([0, 1]))
    assert found.compute()["macro_recall"] == 1


def test_half_precision_logits_are_measured_in_single_precision() -> None:
    found = metric()
    found.update(logits=torch.tensor([[10.0, 0, 0]], dtype=torch.bfloat16), label=torch.tensor([0]))
    assert found.compute()["cross_entropy"] == pytest.approx(math.log1p(2 * math.exp(-10)), rel=1e-2)


def test_the_number_of_bins_can_be_set() -> None:
    found = metric(bins=1)
    found.update(logits=logits((0.9, 0.05, 0.05), (0.6, 0.3, 0.1)), label=torch.tensor([0, 1]))
    assert found.compute()["calibration_error"] == pytest.approx(abs(1 / 2 - 0.75), abs=1e-6)
    with pytest.raises(ValueError, match="bins: found 0, expected 1 or more"):
        Classification.Config(bins=0)


def test_a_diverged_student_gives_numbers_all_the_same() -> None:
    found = metric()
    found.update(logits=torch.full((4, 3), float("nan")), label=torch.tensor([0, 1, 2, 0]))
    numbers = found.compute()
    assert 0 <= numbers["accuracy"] <= 1
    assert math.isnan(numbers["cross_entropy"])


@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_nothing_to_measure_is_an_error(labels: list[int]) -> None:
    found = metric()
    if labels:
        found.update(logits=torch.zeros(2, 3), label=torch.tensor(labels))
    with pytest.raises(DataError, match=r"metrics.classification: no sample with a label was seen"):
        found.compute()


def test_data_without_classes_is_refused() -> None:
    with pytest.raises(PlanError, match=r"metrics.classification: found 0 classes in the data, expected 2 or more"):
        Classification(Classification.Config(), DataFacts(streams={}), CPU)


def test_logits_for_another_number_of_classes_are_refused() -> None:
    with pytest.raises(PlanError, match=r"found logits of shape \[2, 4\], expected \[2, 3\] for 3 classes"):
        metric().update(logits=torch.zeros(2, 4), label=torch.tensor([0, 1]))
