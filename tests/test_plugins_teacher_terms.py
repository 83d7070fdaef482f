"""Losses that take a weight for each teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_inputs import STUDENT, TEACHER, normal, number
from kdx_plugins.logit import soft_targets
from kdx_plugins.teacher_terms import WeightedDivergences, WeightedHints

import kdx
from kdx.testing import check_loss

TEACHERS = [
    TEACHER,
    torch.tensor([[2.0, 2.0, 0.5, 0.0], [1.0, 0.2, -0.3, 0.9], [0.3, 0.2, 1.0, 0.4]], dtype=torch.float64),
    torch.tensor([[0.0, 1.0, 2.0, -1.0], [0.5, 2.0, 0.0, 0.1], [1.0, 0.1, 0.3, 0.2]], dtype=torch.float64),
]
CONFIDENCE = torch.tensor(
    [[0.45974892, 0.39901204, 0.42643473], [0.42161871, 0.18281218, 0.35289949], [0.11863238, 0.41817578, 0.22066578]],
    dtype=torch.float64,
).T


def weighted_kd() -> WeightedDivergences:
    shapes = {"student": (4,), "teacher": [(4,)] * 3, "weights": (3,)}
    return WeightedDivergences(WeightedDivergences.Config(), kdx.Given(shapes))


def test_even_weights_have_the_golden_value_of_the_plain_average() -> None:
    value = weighted_kd()(STUDENT, TEACHERS, torch.full((3, 3), 1 / 3, dtype=torch.float64), number(4.0))
    assert value.shape == (3,)
    assert value.mean().item() == pytest.approx(0.3704212887, abs=1e-9)


def test_the_confidence_weights_have_their_golden_value() -> None:
    value = weighted_kd()(STUDENT, TEACHERS, CONFIDENCE / 3, number(4.0))
    assert value.mean().item() == pytest.approx(0.1017590819, abs=1e-8)  # the weights are known to 8 digits


def test_the_divergences_are_those_of_soft_targets() -> None:
    tau = torch.tensor([1.0, 4.0, 2.5], dtype=torch.float64)
    expected = torch.stack([soft_targets(STUDENT, teacher, tau) for teacher in TEACHERS], 1)
    torch.testing.assert_close(kdx.soft_divergences(STUDENT, TEACHERS, tau), expected, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_soft_targets_of_the_mixture() -> None:
    student = STUDENT.clone().requires_grad_()
    (ours,) = torch.autograd.grad(weighted_kd()(student, TEACHERS, CONFIDENCE, number(4.0)).sum(), student)
    mixture = kdx.log_mixture(TEACHERS, (CONFIDENCE / CONFIDENCE.sum(1, keepdim=True)).log().unbind(1), number(4.0))
    (theirs,) = torch.autograd.grad(soft_targets(student, mixture, number(4.0)).sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_perfect_student_and_absent_teachers_give_zero() -> None:
    ones = torch.ones(3, 3, dtype=torch.float64)
    assert weighted_kd()(TEACHER, [TEACHER] * 3, ones, number(4.0)).abs().max() < 1e-12
    assert not weighted_kd()(STUDENT, TEACHERS, 0 * ones, number(4.0)).any()


def test_teachers_and_weights_may_be_reordered_together() -> None:
    order = [2, 0, 1]
    value = weighted_kd()(STUDENT, TEACHERS, CONFIDENCE, number(4.0))
    moved = weighted_kd()(STUDENT, [TEACHERS[k] for k in order], CONFIDENCE[:, order], number(4.0))
    torch.testing.assert_close(moved, value)


def test_hints_are_the_weighted_mean_squares() -> None:
    ours, theirs = [normal(0, 2, 3, 4, 4), normal(1, 2, 5, 2, 2)], [normal(2, 2, 3, 4, 4), normal(3, 2, 5, 2, 2)]
    weights = torch.tensor([[0.2, 0.8], [1.0, 0.0]], dtype=torch.float64)
    shapes = {"student": [(3, 4, 4), (5, 2, 2)], "teacher": [(3, 4, 4), (5, 2, 2)], "weights": (2,)}
    value = WeightedHints(WeightedHints.Config(), kdx.Given(shapes))(ours, theirs, weights)
    slow = [
        sum(float(weights[b, k]) * (ours[k][b] - theirs[k][b]).square().mean().item() for k in range(2))
        for b in range(2)
    ]
    assert value.tolist() == pytest.approx(slow, abs=1e-12)
    assert not kdx.hint_distances(ours, ours).any()


@pytest.mark.parametrize(
    ("kind", "shapes", "message"),
    [
        (WeightedDivergences, {"student": (4,), "teacher": [(4,), (5,)], "weights": (2,)}, r"teachers \[4\], \[5\]"),
        (WeightedDivergences, {"student": (4,), "teacher": [(4,)] * 2, "weights": (3,)}, r"weights is \[3\] .* \[2\]"),
        (WeightedHints, {"student": [(3, 4, 4)], "teacher": [(5, 4, 4)], "weights": (1,)}, "put an aligner for each"),
        (WeightedHints, {"student": [(3, 4, 4)], "teacher": [(3, 4, 4)], "weights": ()}, r"weights is \[\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(kind: type[Any], shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        kind(kind.Config(), kdx.Given(shapes))


def test_the_losses_keep_the_contract() -> None:
    check_loss(WeightedDivergences, shapes={"weights": (3,)})
    maps = [(3, 4, 4), (5, 2, 2)]
    check_loss(WeightedHints, shapes={"student": maps, "teacher": maps, "weights": (2,)})
