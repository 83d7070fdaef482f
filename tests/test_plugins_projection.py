"""Losses on pooled features behind a projector: golden values, orthogonality and slow references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kdx_plugins.projection import (
    InformationTheoretic,
    OrthogonalDistillation,
    OrthogonalProjector,
    SimpleProjector,
    SoftmaxRegression,
    channel_correlation,
    log_distance,
    mutual_information,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

STEPS = 0.1 * torch.arange(20, dtype=torch.float64).reshape(4, 5)
STUDENT, TEACHER = STEPS.sin(), STEPS.cos()
ONE = torch.tensor(1.0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: type[Any], student: Any, teacher: Any, **options: Any) -> Any:
    shapes = {"student": student, "teacher": teacher, "teacher_logits": (5,)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.Config(**options), kdx.Given(shapes=shapes))


def test_softmax_regression_compares_features_and_what_the_classifier_makes_of_them() -> None:
    loss = make(SoftmaxRegression, (3, 2, 2), (4,)).eval()
    head, student, teacher, logits = nn.Linear(4, 5), normal(0, 2, 3, 2, 2), normal(1, 2, 4), normal(2, 2, 5)
    layer, norm = loss.connector
    with torch.no_grad():
        norm.running_mean.copy_(normal(3, 4))
    connected = torch.einsum("ec,bchw->behw", layer.weight[:, :, 0], student) - norm.running_mean[:, None, None]
    pooled = (connected / (1 + norm.eps) ** 0.5).relu().mean((2, 3))
    gaps = F.mse_loss(pooled, teacher, reduction="none"), F.mse_loss(head(pooled), logits, reduction="none")
    value = loss(student, teacher, logits, torch.tensor(2.0), torch.tensor(3.0), head)
    torch.testing.assert_close(value, 2 * gaps[0].mean(1) + 3 * gaps[1].mean(1))


def test_the_gradient_passes_the_teachers_classifier() -> None:
    loss, head = make(SoftmaxRegression, (3,), (4,)), nn.Linear(4, 5).requires_grad_(False)
    student = normal(0, 6, 3).requires_grad_()
    loss(student, normal(1, 6, 4), normal(2, 6, 5), torch.tensor(0.0), ONE, head).mean().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert loss.connector[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize(("lowest", "rectified"), [(0.0, True), (-0.1, False)])
def test_a_teacher_with_negative_embeddings_is_matched_without_a_relu(lowest: float, rectified: bool) -> None:
    loss, head = make(SoftmaxRegression, (3,), (4,)).eval(), nn.Linear(4, 5)
    for value in (1.0, lowest, 2.0):
        loss.calibrate(teacher=torch.full((2, 4), value), student=torch.zeros(2, 3))
    student = normal(0, 2, 3)
    connected = loss.connector(student[:, :, None])[:, :, 0]
    expected = connected.relu() if rectified else connected
    value = loss(student, expected.detach(), head(expected).detach(), ONE, ONE, head)
    assert value.abs().max() < 1e-12
    assert (connected < 0).any()


def test_a_teacher_without_a_vector_for_its_classifier_is_refused() -> None:
    with pytest.raises(
        kdx.PlanError, match=r"srrl feeds a vector to the teacher's classifier, but teacher is \[4, 2, 2\]"
    ):
        make(SoftmaxRegression, (3, 2, 2), (4, 2, 2))


@pytest.mark.parametrize(("source", "wanted"), [(3, 7), (7, 3), (4, 4)])
def test_the_projector_is_orthogonal_after_every_step(source: int, wanted: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = OrthogonalProjector(source, wanted)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    x, y = normal(0, 9, source), normal(1, 9, wanted)
    values = []
    for _ in range(5):
        value = (projector(x) - y).square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
        matrix = projector.matrix()
        assert matrix.shape == (wanted, source)
        narrow = matrix @ matrix.T if wanted < source else matrix.T @ matrix
        torch.testing.assert_close(narrow, torch.eye(min(source, wanted)), atol=1e-5, rtol=0)
    assert values[-1] < values[0]


def test_the_projector_moves_smoothly_with_its_weights() -> None:
    projector = OrthogonalProjector(5, 3)
    matrices = []
    for value in (1e-4, -1e-4):  # where LAPACK flips the sign of a column
        with torch.no_grad():
            projector.raw[0, 0] = value
        matrices.append(projector.matrix().detach())
    assert (matrices[0] - matrices[1]).abs().max() < 1e-2


def test_orthogonal_distillation_standardises_the_teacher() -> None:
    loss = make(OrthogonalDistillation, (3, 2, 2), (6, 4))
    student, teacher = normal(0, 2, 3, 2, 2), normal(1, 2, 6, 4)
    wanted = teacher.mean(1)
    wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    projected = student.mean((2, 3)) @ loss.projector.matrix().T
    torch.testing.assert_close(loss(student, teacher), F.smooth_l1_loss(projected, wanted, reduction="none").mean(1))
    torch.testing.assert_close(loss(student, 3 * teacher + 1), loss(student, teacher), rtol=1e-3, atol=1e-4)


def test_the_log_distance_has_its_golden_value() -> None:
    assert log_distance(STUDENT, TEACHER).item() == pytest.approx(2.4208462508, abs=1e-9)


def test_a_simple_projector_does_not_see_a_shift_or_a_factor_of_a_channel() -> None:
    loss = make(SimpleProjector, (3,), (4,))
    student, teacher = normal(0, 16, 3), 10 * normal(1, 16, 4)
    moved = teacher * torch.tensor([1.0, 2.0, 3.0, 4.0]) + normal(2, 4)
    torch.testing.assert_close(loss(student, moved), loss(student, teacher), rtol=1e-3, atol=1e-3)


def test_information_terms_have_their_golden_values() -> None:
    assert channel_correlation(STUDENT, TEACHER, 1.01).item() == pytest.approx(3.7964267802, abs=1e-9)
    assert mutual_information(STUDENT, TEACHER).item() == pytest.approx(0.2491724214, abs=1e-9)


def test_a_constant_channel_gives_no_gradient_and_no_nan() -> None:
    student = torch.cat([normal(0, 6, 2), torch.ones(6, 1)], 1).requires_grad_()
    channel_correlation(student, normal(1, 6, 3)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[:, 2].abs().max() == 0
    assert student.grad[:, :2].abs().max() > 0


@pytest.mark.parametrize("width", [4, 6])
def test_information_terms_add_up_with_their_weights(width: int) -> None:
    loss = make(InformationTheoretic, (width,), (4,))
    student, teacher = normal(0, 8, width), normal(1, 8, 4)
    projected = loss.projector(student)
    mutual = mutual_information(student if width == 4 else projected, teacher)
    expected = 2 * channel_correlation(projected, teacher) + 3 * mutual
    torch.testing.assert_close(loss(student, teacher, torch.tensor(2.0), torch.tensor(3.0)), expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SimpleProjector, {"power": 1.0}, "power: found 1.0, expected a number above 1"),
        (InformationTheoretic, {"alpha": 0.5}, "alpha: found 0.5, expected a number from 1"),
    ],
)
def test_powers_without_meaning_are_refused(kind: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=f"^{message}"):
        make(kind, (3,), (4,), **options)


@pytest.mark.parametrize("kind", [SoftmaxRegression, OrthogonalDistillation, SimpleProjector, InformationTheoretic])
def test_what_is_no_feature_is_refused(kind: type[Any]) -> None:
    with pytest.raises(kdx.PlanError, match=rf"{kind.name} .*\[2, 3, 4, 5\]"):
        make(kind, (2, 3, 4, 5), (4,))


@pytest.mark.parametrize("student", [(6,), (9, 6), (6, 3, 3)])
def test_losses_behind_projectors_keep_the_contract(student: kdx.Shape) -> None:
    shapes = {"student": student, "teacher": (8,)}
    check_loss(SoftmaxRegression, shapes=shapes, modules={"head": nn.Linear(8, 5)}, regression=5.0)
    check_loss(OrthogonalDistillation, shapes={**shapes, "teacher": (8, 3, 3)})
    check_loss(SimpleProjector, shapes=shapes)
    check_loss(InformationTheoretic, shapes=shapes, alpha=1.5)
