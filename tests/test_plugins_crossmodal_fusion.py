"""Imagined maps, composed embeddings, and what two modalities share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_inputs import LABEL, STUDENT, TEACHER, normal, number
from kdx_plugins.crossmodal_fusion import (
    CompositionalContrast,
    Hallucination,
    ModalityFocus,
    class_contrast,
    shuffled_change,
    sigmoid_distance,
    symmetric_divergence,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

CLASSES = torch.tensor([0, 1, 0, 1])


def wave(function: str, *shape: int) -> Tensor:
    found: Tensor = getattr(torch.arange(math.prod(shape), dtype=torch.float64) * 0.1, function)()
    return found.reshape(shape)


def test_hallucination_keeps_the_contract_of_a_loss() -> None:
    check_loss(Hallucination, shapes={"student": (4, 3, 3), "teacher": (4, 3, 3)}, zero_at_equality=True)


def test_imagined_maps_have_their_golden_value() -> None:
    value = sigmoid_distance(wave("sin", 2, 3, 4, 4), wave("cos", 2, 3, 4, 4))
    assert value.sum().item() == pytest.approx(5.3182498735, abs=1e-9)  # the sheet sums over the batch as well


def test_the_contrast_by_classes_has_its_golden_value() -> None:
    value = class_contrast(wave("sin", 4, 5), wave("cos", 4, 5), CLASSES, number(0.5))
    assert value.mean().item() == pytest.approx(2.2675621942, abs=1e-9)


def test_the_symmetric_divergence_has_its_golden_value() -> None:
    assert symmetric_divergence(STUDENT, TEACHER).mean().item() == pytest.approx(0.3083647901, abs=1e-9)


def test_unlabelled_rows_take_no_part_in_the_contrast() -> None:
    a, b = normal(0, 6, 5), normal(1, 6, 5)
    label = torch.tensor([0, -1, 1, 0, -1, 1])
    rows = label >= 0
    value = class_contrast(a, b, label, number(0.5))
    torch.testing.assert_close(value[rows], class_contrast(a[rows], b[rows], label[rows], number(0.5)))
    assert not value[~rows].any()


@pytest.mark.parametrize("label", [[0, 0, 0, 0], [-1, -1, -1, -1], [0, 1, 2, -1]])
def test_a_batch_without_a_negative_has_a_finite_contrast(label: list[int]) -> None:
    a = normal(2, 4, 5).requires_grad_()
    value = class_contrast(a, a * 3, torch.tensor(label), number(0.01))
    value.sum().backward()
    assert value.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_ccl_keeps_the_contract_of_a_loss() -> None:
    for shapes in ({"student": (6,), "teacher": [(6,)]}, {"student": (6,), "teacher": [(4,), (6,)]}):
        check_loss(CompositionalContrast, shapes=shapes)


def ccl(teachers: int = 1) -> CompositionalContrast:
    shapes = {"student": (5,), "student_logits": (4,), "teacher": [(5,)] * teachers, "label": ()}
    torch.manual_seed(0)
    return CompositionalContrast(CompositionalContrast.Config(), kdx.Given(shapes)).double()


def test_the_student_learns_from_its_own_terms_and_the_composition_from_all() -> None:
    node, teacher, tau = ccl(), normal(3, 3, 5), number(0.5)
    student, logits = normal(4, 3, 5).requires_grad_(), STUDENT.clone().requires_grad_()
    composition = node.compositions[0]

    def both(a: Tensor, b: Tensor) -> Tensor:
        return (class_contrast(a, b, LABEL, tau) + class_contrast(b, a, LABEL, tau)).mean()

    composed, said = composition(teacher, student)
    first = both(student, composed) + both(student, teacher) + symmetric_divergence(logits, said).mean()
    second = F.cross_entropy(said, LABEL) + both(student, composed) + both(composed, teacher)
    second = second + symmetric_divergence(logits, said).mean()
    weights = list(composition.parameters())
    ours = torch.autograd.grad(first, [student, logits], retain_graph=True)
    theirs = torch.autograd.grad(first + second, weights)
    value = node(student, logits, [teacher], LABEL, tau).mean()
    torch.testing.assert_close(value, first + second)
    found = torch.autograd.grad(value, [student, logits, *weights])
    for one, other in zip(found, (*ours, *theirs), strict=True):
        torch.testing.assert_close(one, other)


def test_terms_of_several_teachers_are_averaged_and_an_absent_one_is_left_out() -> None:
    node, teachers, tau = ccl(2), [normal(5, 3, 5), normal(6, 3, 5)], number(0.5)
    student = normal(7, 3, 5)
    both = node(student, STUDENT, teachers, LABEL, tau)
    here = torch.tensor([[True, True], [True, False], [True, True]])
    moved = [teachers[0], torch.where(here[:, 1:], teachers[1], 9.0)]
    value = node(student, STUDENT, moved, LABEL, tau, present=here)
    torch.testing.assert_close(value, node(student, STUDENT, teachers, LABEL, tau, present=here))
    assert not torch.allclose(value.mean(), both.mean())
    rows = [0, 2]
    second = node._one(
        node.compositions[1], student[rows], STUDENT[rows], teachers[1][rows], LABEL[rows], tau, here[rows, 1]
    )
    first = node._one(node.compositions[0], student, STUDENT, teachers[0], LABEL, tau, here[:, 0])
    torch.testing.assert_close(value.mean(), (first.mean() + second.mean()) / 2)


def test_ccl_needs_embeddings() -> None:
    shapes = {"student": (5,), "student_logits": (4,), "teacher": [(5, 2)], "label": ()}
    with pytest.raises(kdx.PlanError, match=r"ccl: found \[5, 2\] for one sample, expected embeddings"):
        CompositionalContrast(CompositionalContrast.Config(), kdx.Given(shapes))


def test_mfh_keeps_the_contract_of_a_loss() -> None:
    check_loss(ModalityFocus, shapes={"teacher": (6,), "other": (5,)}, modules={"head": nn.Linear(6, 5)})


def focus(share: float = 0.5) -> ModalityFocus:
    given = kdx.Given({"student": (4,), "teacher": (6,), "other": (4,)}, generator=torch.Generator().manual_seed(0))
    return ModalityFocus(ModalityFocus.Config(share, 3), given)


def head() -> nn.Linear:
    """Reads six numbers; the first three say the class, the others next to nothing."""
    made = nn.Linear(6, 4, bias=False).requires_grad_(False)
    made.weight.copy_(torch.cat([3 * torch.eye(4, 3), 0.01 * torch.ones(4, 3)], 1))
    return made


def test_numbers_whose_shuffling_harms_the_agreement_are_kept() -> None:
    features = normal(8, 40, 6).float()
    node, made = focus(), head()
    for part in features.split(20):
        node.calibrate(student=torch.zeros(20, 4), teacher=part, other=made(part), head=made)
    assert node.kept.tolist() == [1, 1, 1, 0, 0, 0]
    change = shuffled_change(features, made(features), made, torch.Generator().manual_seed(1), 2)
    assert change[:3].min() > 10 * change[3:].max()


def test_the_student_learns_what_the_rest_of_the_teacher_says() -> None:
    features, made, node = normal(9, 3, 6).float(), head(), focus()
    node.kept.copy_(torch.tensor([1, 0, 1, 0, 1, 0]))
    said = made(features * node.kept)
    assert node(said, features, STUDENT, made).abs().max() < 1e-6
    slow = F.kl_div(STUDENT.float().log_softmax(1), said.softmax(1), reduction="batchmean")
    torch.testing.assert_close(node(STUDENT.float(), features, STUDENT, made).mean(), slow)


def test_nothing_is_left_out_before_anything_is_known() -> None:
    assert focus().kept.tolist() == [1] * 6
    node = focus(0.0)
    node.calibrate(student=None, teacher=normal(10, 8, 6).float(), other=torch.zeros(8, 4), head=head())
    assert node.kept.tolist() == [1] * 6


def test_mfh_refuses_options_and_shapes_that_it_cannot_use() -> None:
    with pytest.raises(kdx.ConfigError, match=r"share: found 1.0"):
        focus(1.0)
    with pytest.raises(kdx.PlanError, match=r"a teacher of \[6, 2\] and other logits of \[4\]"):
        ModalityFocus(ModalityFocus.Config(), kdx.Given({"student": (4,), "teacher": (6, 2), "other": (4,)}))
    with pytest.raises(kdx.ConfigError, match="rounds: found 0"):
        ModalityFocus(ModalityFocus.Config(rounds=0), kdx.Given({"student": (4,), "teacher": (6,), "other": (4,)}))
