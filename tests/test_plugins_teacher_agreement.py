"""Losses on several teachers' logits: the mean of the divergences, and the weights by which gradients agree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from golden_inputs import STUDENT, normal, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.ensemble import Mean
from kdx_plugins.logit import soft_targets
from kdx_plugins.teacher_agreement import (
    AgreeingDivergences,
    AgreeingHints,
    EqualDivergences,
    agreement_weights,
    least_norm_weights,
)
from synthetic_teachers import answers, labels
from test_plugins_ensemble import TEACHERS
from torch import Tensor

import kdx
from kdx.testing import check_loss

ONE, FOUR = number(1), number(4)
SHAPES = {"student": (4,), "teacher": [(4,)] * 3}


def make(kind: type[Any], shapes: dict[str, Any] = SHAPES, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes))


def gradient(value: Any) -> Tensor:
    student = STUDENT.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(student), student)
    return found


def exact(gradients: Tensor, limit: float) -> Tensor:
    """The least-norm weights by trying which of them are 0, `limit` or between."""
    count, gram = len(gradients), gradients @ gradients.T
    best, least = torch.empty(0), float("inf")
    for places in itertools.product((0, 1, 2), repeat=count):
        weights = torch.tensor([limit if place == 1 else 0.0 for place in places], dtype=gradients.dtype)
        free = [k for k, place in enumerate(places) if place == 2]
        if free:
            system = torch.ones(len(free) + 1, len(free) + 1, dtype=gradients.dtype)
            system[:-1, :-1] = gram[free][:, free]
            system[-1, -1] = 0
            right = torch.cat([-(gram @ weights)[free], 1 - weights.sum().reshape(1)])
            weights[free] = torch.linalg.solve(system, right)[:-1]
        fits = abs(weights.sum() - 1) < 1e-9 and weights.min() > -1e-10 and weights.max() < limit + 1e-10
        if fits and weights @ gram @ weights < least:
            best, least = weights, float(weights @ gram @ weights)
    return best


# --- aver


def test_the_mean_of_the_divergences_has_its_golden_value() -> None:
    assert make(EqualDivergences)(STUDENT, TEACHERS, FOUR).mean().item() == pytest.approx(0.3704212887, abs=1e-9)


def test_the_mean_of_the_divergences_has_the_gradient_of_that_from_the_mean_teacher() -> None:
    mixture = Mean(Mean.Config(), kdx.Given({"logits": [(4,)] * 3}))(TEACHERS, FOUR)["logits"]
    found = gradient(lambda student: make(EqualDivergences)(student, TEACHERS, FOUR).mean())
    expected = gradient(lambda student: soft_targets(student, mixture, FOUR).mean())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_each_teacher_has_its_own_temperature() -> None:
    found = make(EqualDivergences, scales=[1.0, 2.0, 0.5])(STUDENT, TEACHERS, number(2))
    own = [soft_targets(STUDENT, teacher, number(tau)) for teacher, tau in zip(TEACHERS, (2, 4, 1), strict=True)]
    torch.testing.assert_close(found, torch.stack(own).mean(0), rtol=0, atol=1e-12)


def test_one_teacher_alone_is_plain_distillation() -> None:
    shapes = {"student": (4,), "teacher": [(4,)]}
    for kind, options in ((EqualDivergences, {}), (AgreeingDivergences, {"limit": 1.0})):
        found = make(kind, shapes, **options)(STUDENT, TEACHERS[:1], FOUR)
        torch.testing.assert_close(found, soft_targets(STUDENT, TEACHERS[0], FOUR))


# --- ae_kd


@pytest.mark.parametrize(
    ("limit", "expected", "tolerance"),
    [(0.6, [0.4, 0.6, 0.0], 1e-9), (0.5, [0.5, 0.5, 0.0], 1e-9), (1.0, [0.29975, 0.70025, 0.0], 5e-6)],
)
def test_the_weights_have_their_golden_values(limit: float, expected: list[float], tolerance: float) -> None:
    weights = agreement_weights(STUDENT, TEACHERS, FOUR, limit)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def test_the_value_is_the_weighted_sum_of_the_divergences_and_its_gradient_leaves_the_weights_alone() -> None:
    loss = make(AgreeingDivergences)
    gaps = kdx.soft_divergences(STUDENT, TEACHERS, [FOUR] * 3)
    torch.testing.assert_close(loss(STUDENT, TEACHERS, FOUR), 0.4 * gaps[:, 0] + 0.6 * gaps[:, 1])
    found = gradient(lambda student: loss(student, TEACHERS, FOUR).mean())
    parts = [gradient(lambda student, t=t: soft_targets(student, t, FOUR).mean()) for t in TEACHERS[:2]]
    torch.testing.assert_close(found, 0.4 * parts[0] + 0.6 * parts[1])


@pytest.mark.parametrize("limit", [0.35, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("teachers", [2, 3, 4, 5])
def test_the_weights_are_those_of_an_exhaustive_search(teachers: int, limit: float) -> None:
    limit = max(limit, 1 / teachers + 0.01)
    for seed in range(4):
        gradients = normal(seed, teachers, 10) + 0.5 * seed
        expected = exact(gradients, limit)
        for scale in (1.0, 1e-9, 1e6):
            found = least_norm_weights(gradients * scale, limit)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_smallest_limit_makes_all_weights_equal() -> None:
    weights = least_norm_weights(normal(0, 3, 10), 1 / 3)
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    nearly = least_norm_weights(normal(0, 3, 10), 1 / 3 + 1e-4)
    torch.testing.assert_close(nearly, weights, rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_equal_or_0_have_equal_weights(dtype: torch.dtype) -> None:
    for gradients in (torch.zeros(3, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)):
        weights = least_norm_weights(gradients, 0.6)
        torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=dtype), rtol=0, atol=1e-4)
    twice = normal(1, 2, 6).to(dtype)
    weights = least_norm_weights(torch.cat([twice, twice[:1]]), 1.0)
    torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=1e-2)


def test_more_teachers_than_classes_have_finite_weights_within_the_bounds() -> None:
    weights = least_norm_weights(normal(2, 12, 4), 0.2)
    assert weights.isfinite().all()
    assert weights.min() >= 0
    assert weights.max() <= 0.2 + 1e-9
    assert weights.sum().item() == pytest.approx(1)


def test_normalised_gradients_count_by_their_direction() -> None:
    gradients = torch.stack([(STUDENT / 4).softmax(1) - (t / 4).softmax(1) for t in TEACHERS]).mean(1)
    norms = gradients.norm(dim=1)
    expected = exact(gradients / norms[:, None], 0.6) / norms
    found = agreement_weights(STUDENT, TEACHERS, FOUR, 0.6, normalise=True)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=1e-9)
    assert not torch.allclose(found, agreement_weights(STUDENT, TEACHERS, FOUR, 0.6))


@settings(deadline=None, max_examples=6)
@given(order=st.permutations(range(3)))
def test_the_order_of_the_teachers_changes_only_the_order_of_the_weights(order: list[int]) -> None:
    shuffled = [TEACHERS[k] for k in order]
    weights = agreement_weights(STUDENT, TEACHERS, FOUR, 0.6)
    torch.testing.assert_close(agreement_weights(STUDENT, shuffled, FOUR, 0.6), weights[list(order)])
    for kind in (EqualDivergences, AgreeingDivergences):
        torch.testing.assert_close(make(kind)(STUDENT, shuffled, FOUR), make(kind)(STUDENT, TEACHERS, FOUR))


def test_a_guessing_teacher_weighs_least_where_the_student_is_near_to_the_others() -> None:
    first, _, second = teachers = answers(labels())
    student = (first + second) / 2
    weights = agreement_weights(student, teachers, ONE, 0.6)
    assert weights[1] < 0.5 * min(weights[0], weights[2])


def test_a_guessing_teacher_may_weigh_more_where_the_student_knows_nothing() -> None:
    """The rule prefers the shorter gradient, and guesses that cancel out over the batch give a short one."""
    teachers = answers(labels())
    weights = agreement_weights(torch.zeros_like(teachers[0]), teachers, ONE, 0.6)
    assert weights[1] > max(weights[0], weights[2])


# --- both


@pytest.mark.parametrize(
    ("kind", "shapes", "options", "message"),
    [
        (EqualDivergences, {**SHAPES, "student": (5,)}, {}, r"aver: the student's logits are \[5\], those of the teac"),
        (AgreeingDivergences, {**SHAPES, "student": (4, 2)}, {}, r"ae_kd needs logits of at least two classes \[K\]"),
        (EqualDivergences, SHAPES, {"scales": [1.0]}, "scales: found 1 of them for 3 teachers, expected one for each"),
        (EqualDivergences, SHAPES, {"scales": [1.0, 0.0, 1.0]}, r"scales: found \[1.0, 0.0, 1.0\], expected numbers a"),
        (AgreeingDivergences, SHAPES, {"limit": 0.3}, "limit: found 0.3, expected a weight from 0.333 to 1, for 3 te"),
        (AgreeingDivergences, SHAPES, {"limit": 1.5}, "limit: found 1.5"),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    kind: type[Any], shapes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        make(kind, shapes, **options)


def test_the_losses_keep_the_contract() -> None:
    check_loss(EqualDivergences)
    check_loss(EqualDivergences, scales=[1.0, 2.0, 0.5], temperature=1.0)
    check_loss(AgreeingDivergences)
    check_loss(AgreeingDivergences, limit=1.0, normalise=True)


def test_a_student_that_agrees_with_every_teacher_has_the_value_0() -> None:
    for kind in (EqualDivergences, AgreeingDivergences):
        value = make(kind)(STUDENT, [STUDENT + shift for shift in (0.0, 1.0, -2.0)], FOUR)
        torch.testing.assert_close(value, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


# --- ae_kd_hints

MAPS = {"student": (3, 4, 4), "teacher": [(5, 4, 4), (4, 2, 2), (3, 8, 8)]}


def hints(**options: Any) -> Any:
    torch.manual_seed(0)
    return make(AgreeingHints, MAPS, **options).double()


def maps() -> tuple[Tensor, list[Tensor]]:
    return normal(1, 6, 3, 4, 4), [normal(2 + k, 6, *shape) for k, shape in enumerate(MAPS["teacher"])]


@pytest.mark.parametrize("normalise", [False, True])
def test_the_hints_are_weighted_by_their_gradients_at_the_students_map(normalise: bool) -> None:
    (student, teachers), loss = maps(), hints(limit=0.7, normalise=normalise)
    student.requires_grad_()
    gaps = []
    for layer, theirs in zip(loss.regressors, teachers, strict=True):
        ours, theirs = kdx.pool_to_smaller(layer(kdx.pool_to_smaller(student, theirs)[0]), theirs)
        gaps.append((ours - theirs).square().mean((1, 2, 3)))
    slopes = torch.stack([torch.autograd.grad(gap.mean(), student, retain_graph=True)[0].flatten() for gap in gaps])
    norms = slopes.norm(dim=1) if normalise else torch.ones(3, dtype=torch.float64)
    weights = exact(slopes / norms.unsqueeze(1), 0.7) / norms
    expected = (torch.stack(gaps, 1) * weights / weights.sum()).sum(1)
    found = hints(limit=0.7, normalise=normalise)(student, teachers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(found.mean(), student)
    torch.testing.assert_close(slope.flatten(), weights / weights.sum() @ slopes, rtol=0, atol=1e-9)


def test_the_hints_of_equal_teachers_weigh_alike_and_without_a_gradient_all_do() -> None:
    student, teachers = maps()
    with torch.no_grad():
        gaps = [hints(limit=1.0).regressors[k](kdx.pool_to_smaller(student, t)[0]) for k, t in enumerate(teachers)]
        found = hints()(student, teachers)
    parts = [kdx.pool_to_smaller(ours, theirs) for ours, theirs in zip(gaps, teachers, strict=True)]
    expected = torch.stack([(a - b).square().mean((1, 2, 3)) for a, b in parts], 1).mean(1)
    torch.testing.assert_close(found, expected)


def test_the_hints_keep_the_contract_of_a_loss() -> None:
    check_loss(AgreeingHints, shapes=MAPS)


def test_the_hints_are_refused_for_vectors_and_for_a_limit_below_even_weights() -> None:
    with pytest.raises(kdx.PlanError, match=r"ae_kd_hints regresses maps \[C, H, W\], but was given \[3\]"):
        make(AgreeingHints, {"student": (3,), "teacher": [(5, 4, 4)]})
    with pytest.raises(kdx.ConfigError, match=r"limit: found 0.2, expected a weight from 0.333 to 1, for 3 teachers"):
        hints(limit=0.2)
