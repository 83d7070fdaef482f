"""Losses that take the true class apart: golden values, decompositions, regions, and samples without a label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import NET, batch, forward, plan_of
from golden_inputs import LABEL, LOGITS, STUDENT, TEACHER, normal, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.decoupled import (
    WRAPPED,
    Decoupled,
    Normalised,
    Refined,
    ScaleDecoupled,
    decoupled,
    margin,
    masked_correlation,
    normalised,
    other_divergence,
    others,
    region_logits,
    sample_confidence,
    target_divergence,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss


def dkd(student: Tensor, teacher: Tensor, label: Tensor, temperature: float = 4.0) -> Tensor:
    return decoupled(student, teacher, label, number(temperature), alpha=1.0, beta=8.0)


def rld(student: Tensor, teacher: Tensor, label: Tensor, confidence_temperature: float) -> Tensor:
    loss = Refined(Refined.Config(), LOGITS)
    knobs = {"temperature": 4.0, "confidence_temperature": confidence_temperature, "alpha": 1.0, "beta": 8.0}
    value: Tensor = loss(student, teacher, label, **{name: number(knob) for name, knob in knobs.items()})
    return value


def test_golden_values() -> None:
    for value, golden in (
        (dkd(STUDENT, TEACHER, LABEL), 2.0559218511),
        (target_divergence(STUDENT, TEACHER, LABEL, number(4.0)), 0.0943284310),
        (other_divergence(STUDENT, TEACHER, LABEL, number(4.0)), 0.2451991775),
        (normalised(STUDENT, TEACHER, LABEL, number(1.0), gamma=1.5), 2.2187703843),
        (rld(STUDENT, TEACHER, LABEL, 1.0), 2.0585938793),
    ):
        assert value.shape == (3,)
        assert value.mean().item() == pytest.approx(golden, abs=1e-9)


def test_the_log_odds_are_those_of_the_class_and_the_others_keep_their_order() -> None:
    p = STUDENT.softmax(1).gather(1, LABEL[:, None])[:, 0]
    torch.testing.assert_close(margin(STUDENT, LABEL), (p / (1 - p)).log())
    assert others(STUDENT, torch.tensor([3, 0, 1])).tolist() == [[2.0, 1.0, 0.0], [0.5, -0.5, 1.0], [1.0, 2.0, 0.0]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 20))
def test_soft_targets_are_the_true_class_plus_the_rest_weighted_by_its_probability(
    seed: int, temperature: float
) -> None:
    student, teacher, label = normal(seed, 6, 5), normal(seed + 1, 6, 5), torch.arange(6) % 5
    ours, theirs = (logits / temperature for logits in (student, teacher))
    whole = (theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1) * temperature**2
    rest = 1 - theirs.softmax(1).gather(1, label[:, None])[:, 0]
    tau = number(temperature)
    parts = target_divergence(student, teacher, label, tau) + rest * other_divergence(student, teacher, label, tau)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(decoupled(student, teacher, label, tau, alpha=number(1.0), beta=rest), whole)


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    rows = torch.tensor([[5.0], [-3.0], [40.0]], dtype=torch.float64)
    for loss in (dkd, lambda s, t, y: normalised(s, t, y, number(2.0), gamma=1.0), lambda s, t, y: rld(s, t, y, 2.0)):
        torch.testing.assert_close(loss(STUDENT + rows, TEACHER - rows, LABEL), loss(STUDENT, TEACHER, LABEL))


def test_the_gradient_of_the_normalised_loss_on_the_others_vanishes_for_a_perfect_student() -> None:
    student = TEACHER.clone().requires_grad_()
    value = normalised(student, TEACHER, LABEL, number(2.0), gamma=3.0).sum()
    first = (-margin(TEACHER, LABEL).sigmoid() * nn.functional.logsigmoid(margin(student, LABEL))).sum()
    (gradient,) = torch.autograd.grad(value - first, student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_with_a_teacher_that_is_right_everywhere_the_refined_loss_is_the_decoupled_one() -> None:
    torch.testing.assert_close(rld(STUDENT, TEACHER, LABEL, 4.0), dkd(STUDENT, TEACHER, LABEL))


def test_classes_that_the_teacher_prefers_to_the_true_one_do_not_count() -> None:
    label = torch.tensor([1, 3, 3])  # the teacher puts 1, 1 and 3 classes above these
    value = masked_correlation(STUDENT, TEACHER, label, number(2.0))
    first = (TEACHER[0, 2:] / 2).log_softmax(0)
    expected = 4 * (first.exp() * (first - (STUDENT[0, 2:] / 2).log_softmax(0))).sum()
    assert value[0].item() == pytest.approx(expected.item(), abs=1e-12)
    assert value[2].item() == 0
    student = STUDENT.clone().requires_grad_()
    masked_correlation(student, TEACHER, label, number(2.0)).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[2].any()
    assert not student.grad[0, :2].any()
    assert student.grad[1].any()


def test_the_refined_loss_compares_the_teachers_first_choice_with_the_students_true_class() -> None:
    label = torch.tensor([1, 3, 0])
    q, p = TEACHER.softmax(1).amax(1), STUDENT.softmax(1).gather(1, label[:, None])[:, 0]
    expected = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(sample_confidence(STUDENT, TEACHER, label, number(1.0)), expected)


def test_samples_without_a_label_count_nothing_and_the_mean_is_that_of_the_others() -> None:
    label = torch.tensor([0, -1, 2])
    kept = torch.tensor([0, 2])
    for component in (Decoupled, Normalised, Refined):
        loss = component(component.Config(), LOGITS)
        knobs = {name: number(knob.default) for name, knob in component.knobs.items()}
        value = loss(STUDENT, TEACHER, label, **knobs)
        alone = loss(STUDENT[kept], TEACHER[kept], LABEL[kept], **knobs)
        assert value[1].item() == 0
        torch.testing.assert_close(value.mean(), alone.mean())


def maps(channels: int, seed: int) -> Tensor:
    return normal(seed, 3, channels, 4, 4)


def heads() -> tuple[nn.Linear, nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(6, 4).double(), nn.Linear(8, 4).double()


HALVES = (slice(0, 2), slice(2, 4))
STRIDED: dict[str, Any] = {
    "student": {"args": {"output_stride": 8}},
    "teachers": {"big": {**NET, "args": {**NET["args"], "output_stride": 8}}},
}
REGIONS = kdx.Given(
    {"student": (6, 4, 4), "teacher": (8, 4, 4), "student_logits": (4,), "teacher_logits": (4,), "label": ()}
)


def sdd(label: Tensor, **options: object) -> Tensor:
    ours, theirs = maps(6, 0), maps(8, 1)
    student_head, teacher_head = heads()
    loss = ScaleDecoupled(ScaleDecoupled.Config(**options), REGIONS)  # type: ignore[arg-type]
    logits = student_head(ours.mean((2, 3))), teacher_head(theirs.mean((2, 3)))
    value: Tensor = loss(ours, theirs, *logits, label, number(2.0), student_head, teacher_head)
    return value


def test_regions_on_one_cell_are_the_wrapped_loss() -> None:
    student_head, teacher_head = heads()
    student, teacher = student_head(maps(6, 0).mean((2, 3))), teacher_head(maps(8, 1).mean((2, 3)))
    torch.testing.assert_close(sdd(LABEL, grids=[1]), dkd(student, teacher, LABEL, 2.0))
    torch.testing.assert_close(
        sdd(LABEL, grids=[1], wraps="nkd", gamma=2.0), normalised(student, teacher, LABEL, number(2.0), gamma=2.0)
    )
    soft = (teacher / 2).softmax(1) * ((teacher / 2).log_softmax(1) - (student / 2).log_softmax(1))
    torch.testing.assert_close(sdd(LABEL, grids=[1], wraps="kd"), 4 * soft.sum(1))
    whole = decoupled(student, teacher, LABEL, number(2.0), alpha=0.5, beta=2.0)
    torch.testing.assert_close(sdd(LABEL, grids=[1], alpha=0.5, beta=2.0), whole)


def test_regions_agree_with_a_slow_reference() -> None:
    student_head, teacher_head = heads()
    for label in (LABEL, torch.tensor([3, 3, 0])):
        expected = torch.zeros(3, dtype=torch.float64)
        right = teacher_head(maps(8, 1).mean((2, 3))).argmax(1) == label
        for grid in (1, 2):
            side = 4 // grid
            for row in range(0, 4, side):
                for column in range(0, 4, side):
                    cell = (..., slice(row, row + side), slice(column, column + side))
                    student = student_head(maps(6, 0)[cell].mean((2, 3)))
                    teacher = teacher_head(maps(8, 1)[cell].mean((2, 3)))
                    count = torch.where((teacher.argmax(1) == label) == right, 1, 2)
                    expected += count * dkd(student, teacher, label, 2.0)
        torch.testing.assert_close(sdd(label, grids=[1, 2]), expected)


def test_the_students_classifier_learns_from_regions_as_in_a_slow_reference() -> None:
    student_head, teacher_head = heads()
    ours, theirs = maps(6, 0), maps(8, 1)
    loss = ScaleDecoupled(ScaleDecoupled.Config(grids=[1, 2], wraps="kd"), REGIONS)
    whole = student_head(ours.mean((2, 3))), teacher_head(theirs.mean((2, 3)))
    value = loss(ours, theirs, *whole, LABEL, number(2.0), student_head, teacher_head)
    right = whole[1].argmax(1) == LABEL
    expected = torch.zeros(3, dtype=torch.float64)
    for cell in [(..., rows, columns) for rows in HALVES for columns in HALVES] + [...]:
        student, teacher = student_head(ours[cell].mean((2, 3))) / 2, teacher_head(theirs[cell].mean((2, 3))) / 2
        count = torch.where((teacher.argmax(1) == LABEL) == right, 1, 2)
        wanted = teacher.detach().softmax(1)
        expected += count * 4 * (wanted * (wanted.log() - student.log_softmax(1))).sum(1)
    weights = [*student_head.parameters()]
    for found, reference in zip(
        torch.autograd.grad(value.sum(), weights, retain_graph=True),
        torch.autograd.grad(expected.sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(found, reference)
    value.sum().backward()
    assert all(weight.grad is None for weight in teacher_head.parameters())


def gradients(loss: dict[str, Any]) -> tuple[float, dict[str, Tensor | None], nn.Module]:
    """The value of one loss in a run, the student's gradients, and the teacher's classifier."""
    plan = plan_of(STRIDED, {"losses": {"ce": None, "one": loss}})
    _, losses = forward(plan, batch())
    losses.total.backward()
    student = plan.student.network.net
    teacher = plan.teachers["big"].network.net
    return losses.total.item(), {name: weight.grad for name, weight in student.named_parameters()}, teacher.fc


def test_a_run_with_one_cell_has_the_value_and_the_gradients_of_the_wrapped_loss() -> None:
    value, found, _ = gradients({"use": "sdd", "grids": [1], "wraps": "dkd"})
    expected, wrapped, _ = gradients({"use": "dkd"})
    assert value == pytest.approx(expected, rel=1e-6)
    assert wrapped["fc.weight"] is not None
    assert wrapped["fc.weight"].any()
    for name, gradient in wrapped.items():
        torch.testing.assert_close(found[name], gradient)


def test_regions_train_the_students_classifier_in_a_run_and_leave_the_teachers_alone() -> None:
    only_regions = {"use": "sdd", "grids": [1, 2], "inputs": {"student_logits": "big.logits"}}
    _, found, teacher = gradients(only_regions)
    assert found["fc.weight"] is not None
    assert found["fc.weight"].any()
    assert found["conv1.weight"] is not None
    assert found["conv1.weight"].any()
    assert all(weight.grad is None for weight in teacher.parameters())
    _, found, _ = gradients({**only_regions, "weight": 0.0})
    assert found["fc.weight"] is not None
    assert not found["fc.weight"].any()


def test_the_first_region_is_the_nets_own_answer() -> None:
    whole = normal(5, 3, 4)
    regions = region_logits(maps(6, 0), whole, heads()[0], (1, 2, 4))
    assert regions.shape == (3, 21, 4)
    assert torch.equal(regions[:, 0], whole)


def test_regions_of_a_perfect_student_are_worth_nothing() -> None:
    head = heads()[1]
    shared = kdx.Given({**REGIONS.shapes, "student": (8, 4, 4)})
    for wraps in ("kd", "dkd"):
        loss = ScaleDecoupled(ScaleDecoupled.Config(wraps=wraps), shared)
        logits = head(maps(8, 1).mean((2, 3)))
        value = loss(maps(8, 1), maps(8, 1), logits, logits, LABEL, number(4.0), head, head)
        assert not value.any()


def test_logits_that_are_not_the_classifiers_answer_to_the_mean_of_the_map_are_refused() -> None:
    loss = ScaleDecoupled(ScaleDecoupled.Config(), REGIONS)
    student_head, teacher_head = heads()
    tensors = {
        "student": maps(6, 0),
        "teacher": maps(8, 1),
        "student_logits": student_head.float()(maps(6, 0).mean((2, 3)).float()),
        "teacher_logits": teacher_head.float()(maps(8, 1).mean((2, 3)).float()),
    }
    parts = {"student_head": student_head, "teacher_head": teacher_head, "label": LABEL}
    loss.calibrate(**tensors, **parts)
    with pytest.raises(kdx.PlanError, match="the logits of teacher are not what its classifier makes of the mean"):
        loss.calibrate(**tensors | {"teacher_logits": tensors["teacher_logits"] + 1}, **parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wraps": "dist"}, "wraps: found 'dist', expected one of kd, dkd, nkd"),
        ({"gamma": 1.0}, "gamma: `wraps: dkd` does not read it"),
        ({"wraps": "kd", "beta": 1.0}, "beta: `wraps: kd` does not read it"),
        ({"alpha": -1.0}, "alpha: found -1.0, expected at least 0"),
        ({"grids": [2, 4]}, r"grids: found \[2, 4\], expected rising numbers that begin with 1"),
        ({"grids": [1, 2, 2]}, r"grids: found \[1, 2, 2\], expected rising numbers"),
    ],
)
def test_a_wrong_option_for_regions_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=message):
        ScaleDecoupled(ScaleDecoupled.Config(**options), REGIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8, 2, 2), (17, 8), (8,)])
def test_what_cannot_be_cut_into_the_regions_is_refused(shape: kdx.Shape) -> None:
    with pytest.raises(
        kdx.PlanError, match=r"grids of up to 4 cells along an axis on maps \[C, H, W\], but teacher is"
    ):
        ScaleDecoupled(ScaleDecoupled.Config(), kdx.Given({**REGIONS.shapes, "teacher": shape}))


def test_logits_of_one_class_or_with_positions_are_refused() -> None:
    for component in (Decoupled, Normalised, Refined):
        for shape in ((1,), (4, 2, 2)):
            with pytest.raises(kdx.PlanError, match=rf"^{component.name} needs logits of at least two classes \[K\]"):
                component(component.Config(), kdx.Given({"student": shape, "teacher": shape}))


def test_losses_keep_the_contract() -> None:
    check_loss(Decoupled, zero_at_equality=True)
    check_loss(Decoupled, zero_at_equality=True, temperature=1.0, beta=0.5)
    check_loss(Normalised)
    check_loss(Refined)
    shapes = {"student": (6, 4, 4), "teacher": (8, 4, 4)}
    with torch.random.fork_rng(devices=[]):
        modules = {"student_head": nn.Linear(6, 5), "teacher_head": nn.Linear(8, 5)}
    for wraps in WRAPPED:
        check_loss(ScaleDecoupled, shapes=shapes, modules=modules, wraps=wraps)
