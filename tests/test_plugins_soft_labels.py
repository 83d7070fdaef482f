"""Soft labels and sample weights that follow a rule: golden values, limits, and samples without a label."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_inputs import LABEL, LOGITS, STUDENT, TEACHER, number
from kdx_plugins.soft_labels import (
    DEIT_FORMS,
    AsymmetricTemperature,
    DistillationToken,
    PseudoLabel,
    TeacherFree,
    TransformedMatching,
    WeightedSoftLabels,
    WeightedTransformedMatching,
    asymmetric_targets,
    difficulty,
    transformed_matching,
    virtual_teacher,
)
from torch import Tensor

import kdx
from kdx.testing import check_loss, check_target


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`tau^2 KL(teacher || student)` of softened distributions, written out."""
    ours, theirs = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return (theirs * (theirs / ours).log()).sum(1) * temperature**2


def wsld(student: Tensor, teacher: Tensor, label: Tensor, temperature: float) -> Tensor:
    loss = WeightedSoftLabels(WeightedSoftLabels.Config(), LOGITS)
    value: Tensor = loss(student, teacher, label, number(temperature))
    return value


def ats(student: Tensor, label: Tensor, *temperatures: float) -> Tensor:
    loss = AsymmetricTemperature(AsymmetricTemperature.Config(), LOGITS)
    value: Tensor = loss(student, TEACHER, label, *map(number, temperatures))
    return value


def tf_kd(student: Tensor, label: Tensor, temperature: float, **options: float) -> Tensor:
    value: Tensor = TeacherFree(TeacherFree.Config(**options), LOGITS)(student, label, number(temperature))
    return value


def deit(cls: Tensor, dist: Tensor, label: Tensor, alpha: float, **options: object) -> Tensor:
    given = kdx.Given({"cls": (4,), "dist": (4,), "teacher": (4,)})
    loss = DistillationToken(DistillationToken.Config(**options), given)  # type: ignore[arg-type]
    value: Tensor = loss(cls, dist, TEACHER, label, number(alpha))
    return value


def test_golden_values() -> None:
    for value, golden in (
        (transformed_matching(STUDENT, TEACHER, number(0.1)), 0.3305846138),
        (transformed_matching(STUDENT, TEACHER, number(0.2), weighted=True), 0.6758610976),
        (wsld(STUDENT, TEACHER, LABEL, 4.0), 19.0324023013),
        (100 * tf_kd(STUDENT, LABEL, 20.0), 10.1579595852),
        (deit(STUDENT, STUDENT, LABEL, 1.0), 0.7225726896),
        (ats(STUDENT, LABEL, 4.0, 4.0, 4.0), 0.2442403738),
    ):
        assert value.shape == (3,)
        assert value.mean().item() == pytest.approx(golden, abs=1e-9)


def test_the_published_weights_of_samples() -> None:
    expected = [0.8995289488, 0.8740946970, 0.8632613959]  # of the authors' code in single precision
    assert difficulty(STUDENT, TEACHER, LABEL).tolist() == pytest.approx(expected, abs=3e-8)


def test_the_power_one_is_plain_matching_and_a_small_one_makes_the_teacher_even() -> None:
    for weighted in (False, True):
        value = transformed_matching(STUDENT, TEACHER, number(1.0), weighted=weighted)
        torch.testing.assert_close(value, divergence(STUDENT, TEACHER, 1.0))
    even = -STUDENT.log_softmax(1).mean(1) - math.log(4)
    torch.testing.assert_close(transformed_matching(STUDENT, TEACHER, number(1e-9)), even)
    torch.testing.assert_close(transformed_matching(STUDENT, TEACHER, number(1e-9), weighted=True), 4 * even)


def test_a_power_is_a_temperature_of_the_teacher_alone() -> None:
    value = transformed_matching(STUDENT, TEACHER, number(0.25))
    torch.testing.assert_close(value, divergence(STUDENT, TEACHER / 4, 1.0))
    student = (TEACHER / 4).clone()
    torch.testing.assert_close(transformed_matching(student, TEACHER, number(0.25)), torch.zeros(3).double())


def test_the_weight_of_a_sample_tells_how_much_better_the_teacher_knows_it() -> None:
    entropy = F.cross_entropy(TEACHER, LABEL, reduction="none")
    equal = 1 - torch.exp(-entropy / (entropy + 1e-7))  # 1 - 1/e but for the source's guard against a zero
    torch.testing.assert_close(difficulty(TEACHER, TEACHER, LABEL), equal)
    torch.testing.assert_close(equal, torch.full((3,), 1 - math.exp(-1)).double(), rtol=0, atol=1e-6)
    sure = 40 * F.one_hot(LABEL, 4).double()
    assert difficulty(sure, TEACHER, LABEL).max() < 1e-6
    assert difficulty(TEACHER, sure, LABEL).min() > 0.99


def test_the_gradient_of_weighted_soft_labels_vanishes_for_a_perfect_student() -> None:
    student = TEACHER.clone().requires_grad_()
    wsld(student, TEACHER, LABEL, 4.0).sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


def test_asymmetric_temperatures_act_on_their_own_classes() -> None:
    found = asymmetric_targets(TEACHER, LABEL, number(2.0), number(4.0))
    row = [3.0 / 2, 1.0 / 4, 0.2 / 4, -1.2 / 4]
    torch.testing.assert_close(found[0], torch.tensor(row, dtype=torch.float64).log_softmax(0))
    student = 3 * found
    torch.testing.assert_close(ats(student, LABEL, 3.0, 2.0, 4.0), torch.zeros(3).double())


def test_the_made_up_teacher_is_the_softmax_of_probabilities() -> None:
    found = virtual_teacher(torch.tensor([1]), 3, 0.9, number(2.0))
    torch.testing.assert_close(found, torch.tensor([[0.025, 0.45, 0.025]], dtype=torch.float64).log_softmax(1))
    assert not tf_kd(virtual_teacher(LABEL, 4, 0.8, number(5.0)), LABEL, 5.0, correct=0.8).abs().gt(1e-12).any()


def test_the_labels_head_gets_nothing_from_the_teacher_and_the_other_nothing_from_labels() -> None:
    for form in DEIT_FORMS:
        cls, dist = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
        deit(cls, dist, LABEL, 1.0, form=form).sum().backward()
        assert cls.grad is not None
        assert not cls.grad.any(), form
        assert dist.grad is not None
        assert dist.grad.any(), form
        dist.grad = None
        deit(cls, dist, LABEL, 0.0, form=form).sum().backward()
        assert not dist.grad.any(), form  # type: ignore[attr-defined]
        assert cls.grad.any(), form


def test_the_soft_forms_of_the_token_are_soft_targets_and_their_mean_over_classes() -> None:
    value = deit(STUDENT, STUDENT, LABEL, 1.0, form="soft", temperature=3.0)
    torch.testing.assert_close(value, divergence(STUDENT, TEACHER, 3.0))
    torch.testing.assert_close(deit(STUDENT, STUDENT, LABEL, 1.0, form="soft_mean", temperature=3.0) * 4, value)
    torch.testing.assert_close(deit(STUDENT, STUDENT, LABEL, 1.0, form="soft"), divergence(STUDENT, TEACHER, 1.0))


def test_without_a_label_the_token_still_learns_from_the_teacher() -> None:
    label = torch.tensor([-1, 1, -1])
    truth = F.cross_entropy(STUDENT[1:2], LABEL[1:2])
    taught = F.cross_entropy(STUDENT, TEACHER.argmax(1))
    torch.testing.assert_close(deit(STUDENT, STUDENT, label, 0.25).mean(), 0.75 * truth + 0.25 * taught)


def test_samples_without_a_label_count_nothing_and_the_mean_is_that_of_the_others() -> None:
    label, kept = torch.tensor([0, -1, 2]), torch.tensor([0, 2])
    for value, full in (
        (wsld(STUDENT, TEACHER, label, 4.0), wsld(STUDENT, TEACHER, LABEL, 4.0)),
        (ats(STUDENT, label, 4.0, 3.0, 2.0), ats(STUDENT, LABEL, 4.0, 3.0, 2.0)),
        (tf_kd(STUDENT, label, 20.0), tf_kd(STUDENT, LABEL, 20.0)),
    ):
        assert value[1].item() == 0
        torch.testing.assert_close(value.mean(), full[kept].mean())


def test_a_sample_without_a_label_gets_the_first_choice() -> None:
    target = PseudoLabel(PseudoLabel.Config(), kdx.Given({"logits": (4,)}))
    assert target(TEACHER, torch.tensor([3, -1, -1])).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "mean"}, "form: found 'mean', expected one of hard, soft, soft_mean"),
        ({"temperature": 2.0}, "temperature: `form: hard` does not read it"),
        ({"form": "soft", "temperature": 0.0}, "temperature: found 0.0, expected a number above 0"),
    ],
)
def test_a_wrong_option_of_the_token_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=message):
        deit(STUDENT, STUDENT, LABEL, 0.5, **options)


def test_a_made_up_teacher_that_is_certain_is_refused() -> None:
    with pytest.raises(kdx.ConfigError, match=r"correct: found 1\.0, expected a probability between 0 and 1"):
        tf_kd(STUDENT, LABEL, 20.0, correct=1.0)


def test_logits_of_one_class_are_refused() -> None:
    with pytest.raises(kdx.PlanError, match=r"^wsld needs logits of at least two classes \[K\], but student is \[1\]"):
        WeightedSoftLabels(WeightedSoftLabels.Config(), kdx.Given({"student": (1,), "teacher": (1,)}))
    with pytest.raises(kdx.PlanError, match=r"^pseudo_label needs logits .* but logits is \[4, 2, 2\]"):
        PseudoLabel(PseudoLabel.Config(), kdx.Given({"logits": (4, 2, 2)}))


def test_losses_and_targets_keep_the_contract() -> None:
    check_loss(TransformedMatching)
    check_loss(TransformedMatching, gamma=1.0, zero_at_equality=True)
    check_loss(WeightedTransformedMatching)
    check_loss(WeightedSoftLabels)
    check_loss(AsymmetricTemperature)
    check_loss(AsymmetricTemperature, true_temperature=4.0, zero_at_equality=True)
    check_loss(TeacherFree)
    for form in DEIT_FORMS:
        check_loss(DistillationToken, shapes={"cls": (5,), "dist": (5,)}, form=form)
    check_target(PseudoLabel)
