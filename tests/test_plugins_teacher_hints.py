"""Hints of several teachers: what they average, what their weights are, and that everything learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import NET, VIT, batch, forward, plan_of
from golden_inputs import normal
from kdx_plugins.teacher_hints import ConfidenceHints, TeacherHints, distances
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

SHAPES = {"student": (3, 4, 4), "teacher": [(3, 4, 4), (5, 4, 4), (6, 2, 2)]}
LABEL = torch.tensor([0, 3, -1, 1])
BOTH: dict[str, Any] = {
    "teachers": {"a": NET, "b": NET, "v": VIT},
    "losses": {"hints": {"use": "ca_mkd_hints"}, "mean": {"use": "fitnet_mkd"}},
}


def wave(of: Any, *shape: int) -> Tensor:
    numbers: Tensor = of(0.1 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64))
    return numbers.reshape(shape)


def make(kind: type[Any], shapes: dict[str, Any] = SHAPES, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(kind.Config(**options), kdx.Given({**shapes, "label": ()})).double()


def maps() -> tuple[Tensor, list[Tensor]]:
    return normal(0, 4, *SHAPES["student"]), [normal(k + 1, 4, *s) for k, s in enumerate(SHAPES["teacher"])]


def heads(classes: int = 4) -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Linear(shape[0], classes).double().requires_grad_(False) for shape in SHAPES["teacher"]]


# --- fitnet_mkd


def test_without_regressors_the_value_is_the_mean_of_the_golden_distances() -> None:
    loss = make(TeacherHints, {"student": (3, 4, 4), "teacher": [(3, 4, 4)] * 2})
    loss.regressors = nn.ModuleList([nn.Identity(), nn.Identity()])
    student, teacher = wave(torch.sin, 2, 3, 4, 4), wave(torch.cos, 2, 3, 4, 4)
    assert loss(student, [teacher, teacher]).mean().item() == pytest.approx(0.9986330507, abs=1e-9)
    assert loss(student, [teacher, student]).mean().item() == pytest.approx(0.9986330507 / 2, abs=1e-9)


def test_the_larger_map_of_a_pair_is_pooled_to_the_smaller_one() -> None:
    large, small = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 2, 2)
    pooled = (F.adaptive_avg_pool2d(large, 2) - small).square().mean((1, 2, 3))
    torch.testing.assert_close(distances([large, small], [small, large]), torch.stack([pooled, pooled], 1))


def test_the_gradient_reaches_the_student_and_every_regressor() -> None:
    loss = make(TeacherHints)
    student, teachers = maps()
    student.requires_grad_()
    loss(student, teachers).sum().backward()
    assert student.grad is not None
    assert student.grad.any()
    before = [weight.detach().clone() for weight in loss.parameters()]
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert all((old != new).any() for old, new in zip(before, loss.parameters(), strict=True))


def test_a_student_that_meets_every_teacher_has_the_value_0() -> None:
    shapes = {"student": (3, 4, 4), "teacher": [(3, 4, 4), (5, 4, 4)]}
    student, _ = maps()
    loss = make(TeacherHints, shapes)
    targets = [layer(student).detach() for layer in loss.regressors]
    torch.testing.assert_close(loss(student, targets), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-20)
    own = make(ConfidenceHints, shapes, relu=False)
    targets = [layer(student).detach() for layer in own.regressors]
    value = own(student, targets, LABEL, heads()[:2])
    torch.testing.assert_close(value, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-20)


# --- ca_mkd_hints


def errors_of(logits: list[Tensor], label: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(z, label, reduction="none", ignore_index=-1) for z in logits], 1)


def test_the_weights_are_those_of_the_published_rule_and_equal_without_a_label() -> None:
    logits = [normal(seed, 4, 4) for seed in range(3)]
    weights = kdx.confidence_weights(errors_of(logits, LABEL))
    for row, label in enumerate(LABEL.tolist()):
        if label < 0:
            expected = torch.full((3,), 1 / 3, dtype=torch.float64)
        else:
            errors = torch.stack([-z[row].log_softmax(0)[label] for z in logits])
            expected = (1 - errors.exp() / errors.exp().sum()) / 2
        torch.testing.assert_close(weights[row], expected)


def test_the_value_follows_a_slow_reference() -> None:
    loss, lent = make(ConfidenceHints), heads()
    student, teachers = maps()
    found = loss(student, teachers, LABEL, lent)
    regressed = [layer(F.adaptive_avg_pool2d(student, t.shape[2])).relu()
                 for layer, t in zip(loss.regressors, teachers, strict=True)]  # fmt: skip
    for row, label in enumerate(LABEL.tolist()):
        errors, gaps = [], []
        for head, ours, theirs in zip(lent, regressed, teachers, strict=True):
            logits = head(ours[row].flatten(1).mean(1)[None])[0]
            errors.append(logits.new_zeros(()) if label < 0 else logits.logsumexp(0) - logits[label])
            gaps.append((ours[row] - theirs[row]).square().mean())
        share = torch.stack(errors).exp() / torch.stack(errors).exp().sum()
        expected = sum((1 - w) / 2 * gap for w, gap in zip(share, gaps, strict=True)) / 3
        torch.testing.assert_close(found[row], expected)


def test_the_gradient_goes_through_the_weights_unless_they_are_detached() -> None:
    student, teachers = maps()
    student.requires_grad_()
    values, gradients = [], []
    for detach in (False, True):
        value = make(ConfidenceHints, detach_weights=detach)(student, teachers, LABEL, heads())
        (gradient,) = torch.autograd.grad(value.sum(), student)
        values.append(value)
        gradients.append(gradient)
    torch.testing.assert_close(values[0], values[1])
    assert not torch.allclose(gradients[0], gradients[1])


def test_a_relu_ends_the_regressors_of_teachers_without_negative_values() -> None:
    student, teachers = maps()
    loss = make(ConfidenceHints)
    loss.calibrate(student=student, teacher=[teachers[0].abs(), teachers[1], teachers[2].abs()], label=LABEL)
    assert loss.rectify.tolist() == [True, False, True]
    always, never = make(ConfidenceHints, relu=True), make(ConfidenceHints, relu=False)
    for fixed in (always, never):
        fixed.calibrate(student=student, teacher=teachers, label=LABEL)
    assert always.rectify.all()
    assert not never.rectify.any()


def test_a_teacher_whose_classifier_guesses_gets_less_weight() -> None:
    label = torch.arange(40) % 4
    good = 3 * torch.eye(4, dtype=torch.float64)[label]
    guess = (
        3 * torch.eye(4, dtype=torch.float64)[torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(3))]
    )
    answers = [good + normal(0, 40, 4), guess, good + normal(1, 40, 4)]
    weights = kdx.confidence_weights(errors_of(answers, label)).mean(0)
    assert weights[1] < min(weights[0], weights[2]) - 0.1


def test_the_order_of_the_teachers_does_not_change_the_value() -> None:
    student, teachers = maps()
    loss, lent, order = make(ConfidenceHints), heads(), [2, 0, 1]
    value = loss(student, teachers, LABEL, lent)
    loss.regressors = nn.ModuleList(loss.regressors[k] for k in order)
    again = loss(student, [teachers[k] for k in order], LABEL, [lent[k] for k in order])
    torch.testing.assert_close(again, value)


def test_in_a_run_the_classifiers_of_all_teachers_are_lent_and_none_is_trained() -> None:
    plan = plan_of(BOTH)
    lent = plan.loss_calls[[call.name for call in plan.loss_calls].index("losses.hints")].borrowed
    assert [type(part.module).__name__ for part in lent] == ["Linear", "Linear", "Linear"]
    assert len({id(part.module) for part in lent}) == 3
    learner, losses = forward(plan, batch())
    losses.total.backward()
    assert all(weight.grad is None for part in lent for weight in part.module.parameters())
    trained = [name for name, weight in learner.named_parameters() if "hints" in name and weight.grad is not None]
    assert len(trained) == 9
    assert plan.student.network.net.conv1.weight.grad.any()


@pytest.mark.parametrize(
    ("kind", "shapes", "options", "message"),
    [
        (
            TeacherHints,
            {"student": (8,), "teacher": [(3, 4, 4)]},
            {},
            r"fitnet_mkd regresses maps \[C, H, W\], but one",
        ),
        (ConfidenceHints, {"student": (3, 4, 4), "teacher": [(3, 4, 4), (8,)]}, {}, r"but one of teacher is \[8\]"),
        (ConfidenceHints, {"student": (3, 4, 4), "teacher": [(3, 4, 4)]}, {}, "but it was given one; expected two or"),
        (ConfidenceHints, SHAPES, {"regressor": "conv"}, "regressor: found 'conv', expected one of conv1x1, bottlen"),
    ],
)
def test_what_cannot_be_regressed_is_refused(
    kind: type[Any], shapes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        make(kind, shapes, **options)


def test_as_many_classifiers_as_maps_are_needed() -> None:
    layer = {"losses": {"hints": {"borrows": {"heads": ["a.classifier", "b.classifier"]}}}}
    with pytest.raises(kdx.PlanError, match="there are 3 maps and 2 in `borrows: heads`; name as many of each"):
        plan_of(BOTH, layer)


def test_the_losses_keep_the_contract() -> None:
    torch.manual_seed(0)
    lent = [nn.Linear(shape[0], 5).requires_grad_(False) for shape in SHAPES["teacher"]]
    check_loss(TeacherHints, shapes=SHAPES)
    for options in ({}, {"regressor": "bottleneck", "detach_weights": True, "relu": False}):
        check_loss(ConfidenceHints, shapes=SHAPES, modules={"heads": lent}, **options)
