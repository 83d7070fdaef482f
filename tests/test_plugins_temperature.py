"""Temperatures for samples, learned ones, and standardised logits."""

from __future__ import annotations

import math

import pytest
import torch
from golden_inputs import STUDENT, TEACHER, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.logit import soft_targets
from kdx_plugins.temperature import (
    DynamicTemperature,
    EntropyTemperature,
    LearnedTemperature,
    LearnedTemperatures,
    Standardised,
    confusion,
    doubt_of,
    doubt_temperature,
    dynamic_temperature,
    standardise,
)

import kdx
from kdx.builtin.schedules import Cosine
from kdx.testing import check_target

LOW, HIGH = torch.tensor(1.0), torch.tensor(4.0)


def test_a_sure_answer_gets_the_high_temperature_and_an_even_one_the_low_one() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(doubt_temperature(doubt_of(logits), LOW, HIGH), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(doubt_temperature(doubt_of(logits), LOW, HIGH, reverse=True), torch.tensor([1.0, 4.0]))


def test_the_value_of_a_coin_among_four_classes_is_half_way() -> None:
    logits = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).log()
    logits[:, 2:] = -1e4  # two of four classes: entropy log 2, half of log 4
    value = doubt_temperature(doubt_of(logits), LOW.double(), HIGH.double())
    assert value.item() == pytest.approx(1 + 3 * (1 - math.log(2) / math.log(4)), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.floats(0, 100), shift=st.floats(-10, 10))
def test_it_stays_between_its_knobs_and_ignores_a_shift(seed: int, scale: float, shift: float) -> None:
    logits = scale * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = doubt_temperature(doubt_of(logits), LOW, HIGH)
    assert ((value >= 1) & (value <= 4)).all()
    torch.testing.assert_close(doubt_temperature(doubt_of(logits + shift), LOW, HIGH), value)
    both = value + doubt_temperature(doubt_of(logits), LOW, HIGH, reverse=True)
    torch.testing.assert_close(both, torch.full_like(both, 5.0))


def test_it_serves_as_the_knob_of_soft_targets() -> None:
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    tau = EntropyTemperature(EntropyTemperature.Config(), kdx.Given(shapes={"logits": (4,)}))(teacher, LOW, HIGH)
    values = soft_targets(student, teacher, tau)
    alone = [soft_targets(student[i : i + 1], teacher[i : i + 1], tau[i]) for i in range(5)]
    torch.testing.assert_close(values, torch.cat(alone))


@pytest.mark.parametrize("shape", [(1,), (4, 2, 2), ()])
def test_logits_without_a_choice_of_classes_are_refused(shape: kdx.Shape) -> None:
    with pytest.raises(kdx.PlanError, match=r"expected \[K\] with K >= 2 classes"):
        EntropyTemperature(EntropyTemperature.Config(), kdx.Given(shapes={"logits": shape}))


def test_soft_targets_of_standardised_logits_have_their_golden_value() -> None:
    value = soft_targets(standardise(STUDENT), standardise(TEACHER), number(2.0)).mean()
    assert value.item() == pytest.approx(0.1694090374, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 100), shift=st.floats(-50, 50))
def test_scale_and_origin_of_a_row_do_not_count_once_logits_are_standardised(
    seed: int, scale: float, shift: float
) -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.tensor([[1.0], [2.0], [0.5], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(
        standardise(scale * rows * logits + shift * rows), standardise(logits), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(standardise(logits).std(1), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_standardised_logits_is_orthogonal_to_scale_and_origin_and_finite_for_equal_ones() -> None:
    logits = STUDENT.clone().requires_grad_()
    (standardise(logits) * TEACHER).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(3).double())
    torch.testing.assert_close((logits.grad * STUDENT).sum(1), torch.zeros(3).double(), rtol=0, atol=1e-5)
    even = torch.ones(2, 5, requires_grad=True)
    standardise(even).square().sum().backward()
    assert even.grad is not None
    assert even.grad.isfinite().all()


def test_samples_that_confuse_the_student_get_a_lower_temperature_around_the_same_mean() -> None:
    found = confusion(STUDENT, TEACHER)
    tau = dynamic_temperature(found, number(10.0), number(40.0), number(1.0))
    assert tau.argsort().tolist() == found.argsort(descending=True).tolist()
    assert tau.mean().item() == pytest.approx(10)
    share = found / found.sum()
    torch.testing.assert_close(tau, 10 + 40 * (1 / 3 - share))
    assert dynamic_temperature(found, number(10.0), number(4000.0), number(1.5)).min().item() == 1.5


def test_confusion_by_confidence_and_by_disagreement() -> None:
    torch.testing.assert_close(confusion(STUDENT, TEACHER), 1 / STUDENT.softmax(1).max(1).values)
    cosine = (STUDENT * TEACHER).sum(1) / (STUDENT.norm(dim=1) * TEACHER.norm(dim=1))
    torch.testing.assert_close(confusion(STUDENT, TEACHER, "focal", 2.0), (1 - cosine) ** 2)


def test_a_student_that_agrees_everywhere_has_the_base_temperature() -> None:
    target = DynamicTemperature(DynamicTemperature.Config(confusion="focal"), kdx.Given())
    tau = target(TEACHER, TEACHER, number(10.0), number(40.0), number(1.0))
    torch.testing.assert_close(tau, torch.full((3,), 10.0).double())


def test_no_gradient_reaches_the_student_through_its_dynamic_temperature() -> None:
    student = STUDENT.clone().requires_grad_()
    target = DynamicTemperature(DynamicTemperature.Config(), kdx.Given())
    assert not target(student, TEACHER, number(10.0), number(40.0), number(1.0)).requires_grad


def test_doubt_by_confidence_sees_the_highest_probability_alone() -> None:
    p = torch.tensor([[0.4, 0.6, 0.0, 0.0], [0.6, 0.2, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    found = doubt_of(p.clamp(min=1e-9).log(), "confidence")
    torch.testing.assert_close(found, torch.tensor([0.4, 0.4, 0.0, 1.0]) * torch.tensor([4 / 3, 4 / 3, 1, 1]))


def instance(**options: float) -> LearnedTemperatures:
    torch.manual_seed(0)
    return LearnedTemperatures(
        LearnedTemperatures.Config(**options), kdx.Given(shapes={"student": (4,), "teacher": (4,)})
    )


def test_temperatures_of_samples_begin_where_the_learned_one_does_and_then_differ() -> None:
    target, logits = instance(), (torch.randn(6, 4), torch.randn(6, 4))
    start = target(*logits, gradient=torch.tensor(-1.0))
    torch.testing.assert_close(start, torch.full((6,), 15.6211715726), rtol=1e-6, atol=0)
    with torch.no_grad():
        target.layers[-1].weight.normal_()
    assert len(target(*logits, gradient=torch.tensor(-1.0)).unique()) == 6


@pytest.mark.parametrize("factor", [0.0, -1.0, -0.25])
def test_layers_of_temperatures_get_their_gradient_times_the_factor_and_logits_none(factor: float) -> None:
    student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    grads = []
    for gradient in (torch.tensor(factor), torch.tensor(1.0)):
        target = instance()
        target(student, teacher, gradient=gradient).square().sum().backward()
        grads.append(target.layers[-1].bias.grad)
    torch.testing.assert_close(grads[0], factor * grads[1])
    assert student.grad is None
    assert teacher.grad is None


def learned(**options: float) -> LearnedTemperature:
    target = LearnedTemperature(LearnedTemperature.Config(**options), kdx.Given())
    target.double()
    return target


def test_the_learned_temperature_starts_at_its_published_value_whatever_its_gradient() -> None:
    for gradient in (0.0, -0.3, -1.0):
        assert learned()(number(gradient)).item() == pytest.approx(15.6211715726, abs=1e-9)
    assert learned(low=2.0, reach=4.0)(number(0.0)).item() == pytest.approx(2 + 4 / (1 + math.exp(-1)))


def test_the_learned_temperature_climbs_the_loss_in_proportion_to_its_knob() -> None:
    def gradient(factor: float | None) -> float:
        target = learned()
        tau = 1 + 20 * target.theta.sigmoid() if factor is None else target(number(factor))
        soft_targets(STUDENT, TEACHER, tau).mean().backward()
        assert target.theta.grad is not None
        return target.theta.grad.item()

    plain = gradient(None)
    assert plain != 0
    assert gradient(0.0) == 0
    assert gradient(-0.5) == pytest.approx(-0.5 * plain)
    assert gradient(-1.0) == pytest.approx(-plain)


def test_the_published_curriculum_is_a_cosine() -> None:
    cosine = Cosine(Cosine.Config(peak=0.0, end=-1.0, finish=10.0, per="epoch"))
    values = {epoch: cosine.at(kdx.Clock(4 * (epoch - 1), 4, 400)) for epoch in (1, 5, 10, 11, 100)}
    assert values == pytest.approx({1: (math.cos(math.pi / 10) - 1) / 2, 5: -0.5, 10: -1.0, 11: -1.0, 100: -1.0})


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (DynamicTemperature, {"confusion": "margin"}, "confusion: found 'margin', expected one of confidence, focal"),
        (DynamicTemperature, {"gamma": 2.0}, "gamma: `confusion: confidence` does not read it, only focal"),
        (DynamicTemperature, {"confusion": "focal", "gamma": 0.0}, "gamma: found 0.0, expected a number above 0"),
        (LearnedTemperature, {"reach": 0.0}, "reach: found 0.0, expected a number above 0"),
    ],
)
def test_a_wrong_option_is_refused(target: type[kdx.Target], options: dict[str, object], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=message):
        target(target.Config(**options), kdx.Given())  # type: ignore[call-arg]


def test_logits_of_one_class_are_not_standardised() -> None:
    with pytest.raises(kdx.PlanError, match=r"found \[1\] for one sample, expected \[K, ...\] with K >= 2 classes"):
        Standardised(Standardised.Config(), kdx.Given({"logits": (1,)}))


def test_targets_keep_the_contract() -> None:
    check_target(EntropyTemperature)
    check_target(EntropyTemperature, reverse=True, low=2.0)
    check_target(Standardised, shapes={"logits": (5,)})
    check_target(Standardised, shapes={"logits": (5, 3, 3)})
    check_target(DynamicTemperature)
    check_target(DynamicTemperature, confusion="focal", gamma=2.0)
    check_target(LearnedTemperature)
    check_target(LearnedTemperatures)
    check_target(EntropyTemperature, by="confidence")
