"""Soft targets and logit regression: golden values, gradients and invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.logit import LogitRegression, SoftTargets, logit_regression, soft_targets
from torch import Tensor

from kdx.testing import check_loss

STUDENT = torch.tensor(
    [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, -0.5, 1.0], [1.0, -1.0, 2.0, 0.0]],
    dtype=torch.float64,
)
TEACHER = torch.tensor(
    [[3.0, 1.0, 0.2, -1.2], [0.1, 1.5, -0.3, 0.7], [0.0, 0.5, 2.5, -1.0]],
    dtype=torch.float64,
)


def tau(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "golden"), [(4.0, 0.2442403738), (1.0, 0.1454213744)])
def test_soft_targets_have_their_golden_value(temperature: float, golden: float) -> None:
    values = soft_targets(STUDENT, TEACHER, tau(temperature))
    assert values.shape == (3,)
    assert values.mean().item() == pytest.approx(golden, abs=1e-9)


def test_logit_regression_has_its_golden_value() -> None:
    assert logit_regression(STUDENT, TEACHER).mean().item() == pytest.approx(0.56, abs=1e-9)


def test_soft_targets_at_a_high_temperature_are_half_of_centred_regression() -> None:
    regression = logit_regression(STUDENT, TEACHER, centre=True).mean().item() / 2
    assert regression == pytest.approx(0.2591666667, abs=1e-9)
    assert soft_targets(STUDENT, TEACHER, tau(1000.0)).mean().item() == pytest.approx(0.2591377, abs=1e-7)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 20))
def test_the_gradient_of_soft_targets_is_tau_times_the_difference(seed: int, temperature: float) -> None:
    student, teacher = normal(seed, 4, 6).requires_grad_(), normal(seed + 1, 4, 6)
    soft_targets(student, teacher, tau(temperature)).mean().backward()
    p = [(logits / temperature).softmax(1) for logits in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, temperature * (p[0] - p[1]) / 4)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(seed: int, shift: float) -> None:
    student, teacher = normal(seed, 4, 6), normal(seed + 1, 4, 6)
    rows = torch.tensor([[shift], [0.0], [-shift], [1.0]], dtype=torch.float64)
    for loss in (
        lambda s, t: soft_targets(s, t, tau(2.0)),
        lambda s, t: logit_regression(s, t, centre=True),
    ):
        torch.testing.assert_close(loss(student + rows, teacher), loss(student, teacher))
        torch.testing.assert_close(loss(student, teacher + rows), loss(student, teacher))


def test_a_temperature_per_sample_acts_on_its_own_sample() -> None:
    together = soft_targets(STUDENT, TEACHER, torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    alone = [soft_targets(STUDENT[i : i + 1], TEACHER[i : i + 1], tau(t)) for i, t in enumerate((1.0, 4.0, 2.0))]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_logarithm_of_probabilities_serves_as_logits() -> None:
    torch.testing.assert_close(
        soft_targets(STUDENT, TEACHER.softmax(1).log(), tau(4.0)), soft_targets(STUDENT, TEACHER, tau(4.0))
    )


def test_positions_of_dense_logits_are_averaged_sample_by_sample() -> None:
    student, teacher = normal(0, 2, 5, 3, 4), normal(1, 2, 5, 3, 4)
    rows = [logits.permute(0, 2, 3, 1).reshape(-1, 5) for logits in (student, teacher)]
    for dense, flat in (
        (soft_targets(student, teacher, tau(4.0)), soft_targets(rows[0], rows[1], tau(4.0))),
        (logit_regression(student, teacher), logit_regression(rows[0], rows[1])),
    ):
        torch.testing.assert_close(dense, flat.reshape(2, -1).mean(1))


def test_a_student_far_from_its_teacher_gives_a_large_but_finite_value() -> None:
    value = soft_targets(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), torch.tensor(1.0))
    assert value.item() == pytest.approx(1e4)


def test_logit_losses_keep_the_contract() -> None:
    check_loss(SoftTargets, zero_at_equality=True)
    check_loss(SoftTargets, zero_at_equality=True, temperature=1.0)
    check_loss(SoftTargets, shapes={"student": (5, 3, 3), "teacher": (5, 3, 3)}, zero_at_equality=True)
    check_loss(LogitRegression, zero_at_equality=True)
    check_loss(LogitRegression, zero_at_equality=True, centre=True)
