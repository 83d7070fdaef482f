"""Weights of teachers from labels: published values, what reaches them, and what a teacher that guesses gets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import NET, plan_of
from golden_inputs import LABEL, STUDENT, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.ensemble import Mean
from kdx_plugins.logit import soft_targets
from kdx_plugins.teacher_terms import WeightedDivergences
from kdx_plugins.teacher_weights import (
    AccuracyWeighted,
    ConfidenceWeights,
    LearnedMean,
    accuracy_weights,
    errors,
    kdx_plan_ready,
)
from synthetic_teachers import answers, labels
from test_plugins_ensemble import TEACHERS
from torch import Tensor

import kdx
from kdx.testing import check_target

ONE, FOUR = number(1), number(4)
CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (ConfidenceWeights, {"label": LABEL, "temperature": FOUR}),
    (AccuracyWeighted, {"label": LABEL, "sharpness": FOUR, "temperature": FOUR}),
    (LearnedMean, {"temperature": FOUR}),
]


def make(kind: type[Any], count: int = 3, classes: int = 4, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes={"logits": [(classes,)] * count, "label": ()})).double()


# --- ca_mkd


def test_the_confidence_weights_have_their_golden_values() -> None:
    expected = [
        [0.45974892, 0.39901204, 0.42643473],
        [0.42161871, 0.18281218, 0.35289949],
        [0.11863238, 0.41817578, 0.22066578],
    ]
    weights = make(ConfidenceWeights)(TEACHERS, LABEL, FOUR)["weights"]
    torch.testing.assert_close(weights.T, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


def test_the_published_term_of_the_logits_has_its_golden_value() -> None:
    out = make(ConfidenceWeights)(TEACHERS, LABEL, FOUR)
    shapes = {"student": (4,), "teacher": [(4,)] * 3, "weights": (3,)}
    loss = WeightedDivergences(WeightedDivergences.Config(), kdx.Given(shapes))
    student = STUDENT.clone().requires_grad_()
    term = (loss(student, TEACHERS, out["weights"], FOUR) / 3).mean()
    assert term.item() == pytest.approx(0.1017590819, abs=1e-9)
    of_mixture = soft_targets(student, out["logits"], FOUR).mean() / 3
    (expected,) = torch.autograd.grad(term, student)
    (found,) = torch.autograd.grad(of_mixture, student)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_sample_without_a_label_has_equal_weights() -> None:
    weights = make(ConfidenceWeights)(TEACHERS, torch.tensor([0, -1, 2]), FOUR)["weights"]
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert not torch.allclose(weights[0], weights[1])


def test_the_teacher_with_the_smaller_error_weighs_more() -> None:
    weights = kdx.confidence_weights(torch.tensor([[0.1, 1.0, 3.0], [1.0, 1.0, 1.0]]))
    assert weights[0, 0] > weights[0, 1] > weights[0, 2]
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3))


# --- accuracy_weighted


def test_accuracies_are_counted_over_the_labelled_samples_and_kept() -> None:
    node = make(AccuracyWeighted)
    label = torch.tensor([0, 1, 2, -1])
    logits = [torch.eye(4)[answer].double() for answer in ([0, 1, 2, 0], [0, 1, 0, 1], [3, 3, 3, 3])]
    for _ in range(2):
        node.calibrate(logits=logits, label=label, sharpness=ONE, temperature=ONE)
    assert node.right.tolist() == [6, 4, 0]
    assert node.seen.tolist() == [6, 6, 6]
    weights = node(logits, label, ONE, ONE)["weights"]
    torch.testing.assert_close(weights, torch.tensor([[7.0, 5.0, 1.0]] * 4, dtype=torch.float64) / 13)
    other = make(AccuracyWeighted)
    other.load_state_dict(node.state_dict())
    assert torch.equal(other(logits, label, ONE, ONE)["weights"], weights)


def test_without_labelled_samples_accuracies_are_those_of_guessing_and_weights_equal() -> None:
    node = make(AccuracyWeighted, form="softmax")
    node.calibrate(logits=TEACHERS, label=torch.full((3,), -1))
    torch.testing.assert_close(
        node(TEACHERS, LABEL, FOUR, ONE)["weights"], torch.full((3, 3), 1 / 3, dtype=torch.float64)
    )


def test_both_forms_follow_their_formulas() -> None:
    right, seen = torch.tensor([7.0, 3.0]), torch.tensor(8.0)
    accuracy = torch.tensor([8.0, 4.0]) / 12
    two = torch.tensor(2.0)
    squares = accuracy_weights(right, seen, 4, two, "proportional")
    torch.testing.assert_close(squares, accuracy.square() / accuracy.square().sum())
    torch.testing.assert_close(accuracy_weights(right, seen, 4, two, "softmax"), (2 * accuracy).softmax(0))
    per_sample = accuracy_weights(right, seen, 4, torch.tensor([0.0, 2.0]), "proportional")
    torch.testing.assert_close(per_sample, torch.stack([torch.full((2,), 0.5), squares]))


# --- learned_mean


def test_the_learned_weights_are_equal_at_first() -> None:
    out, mean = make(LearnedMean)(TEACHERS, FOUR), make(Mean)(TEACHERS, FOUR)
    torch.testing.assert_close(out["weights"], torch.full((3, 3), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(out["logits"], mean["logits"])
    torch.testing.assert_close(out["mixture"].exp(), torch.stack(TEACHERS).softmax(2).mean(0))


def test_only_the_mixture_has_a_gradient_and_no_teacher_gets_one() -> None:
    node = make(LearnedMean)
    teachers = [teacher.clone().requires_grad_() for teacher in TEACHERS]
    out = node(teachers, FOUR)
    assert not out["logits"].requires_grad
    assert not out["weights"].requires_grad
    out["mixture"][0, 0].backward()
    assert node.scores.grad is not None
    assert node.scores.grad.any()
    assert all(teacher.grad is None for teacher in teachers)


def test_every_teacher_keeps_the_least_weight() -> None:
    node = make(LearnedMean, least=0.1)
    with torch.no_grad():
        node.scores.copy_(torch.tensor([50.0, 0.0, 0.0]))
    torch.testing.assert_close(node(TEACHERS, FOUR)["weights"][0], torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64))


def learned(mixture: str) -> dict[str, Any]:
    return {
        "teachers": {"a": NET, "b": NET},
        "targets": {"committee": {"use": "learned_mean"}},
        "losses": {
            "own": {"use": "cross_entropy", "inputs": {"student": mixture}},
            "kd": {"use": "kd", "inputs": {"teacher": "committee.logits"}},
        },
    }


def test_a_run_that_does_not_train_the_weights_is_refused() -> None:
    kdx_plan_ready(plan_of(learned("committee.mixture")))
    with pytest.raises(kdx.PlanError, match=r"targets\.committee: its weights learn through `mixture`, which no loss"):
        kdx_plan_ready(plan_of(learned("student.logits")))


# --- one of three teachers guesses


def test_the_confidence_weights_of_a_guessing_teacher_are_the_smallest() -> None:
    label = labels()
    weights = make(ConfidenceWeights, classes=5)(answers(label), label, FOUR)["weights"].mean(0)
    assert weights[1] < weights[0] - 0.1
    assert weights[1] < weights[2] - 0.1


@pytest.mark.parametrize("form", ["proportional", "softmax"])
def test_the_accuracy_weight_of_a_guessing_teacher_is_the_smallest(form: str) -> None:
    label = labels()
    node = make(AccuracyWeighted, classes=5, form=form)
    node.calibrate(logits=answers(label), label=label)
    weights = node(answers(label), label, FOUR, ONE)["weights"][0]
    assert weights[1] < 0.5 * min(weights[0], weights[2])


def test_the_learned_weight_of_a_guessing_teacher_falls_below_those_of_the_others() -> None:
    label = labels()
    node = make(LearnedMean, classes=5)
    optimizer = torch.optim.SGD(node.parameters(), lr=1.0)
    before = None
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(node(answers(label), ONE)["mixture"], label)
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = node(answers(label), ONE)["weights"][0]
    assert weights[1] < 0.5 * min(weights[0], weights[2])
    assert loss.item() < before


# --- the contract


@pytest.mark.parametrize(("kind", "rest"), CASES)
@settings(deadline=None, max_examples=6)
@given(order=st.permutations(range(3)))
def test_the_order_of_the_teachers_changes_only_the_order_of_the_weights(
    kind: type[Any], rest: dict[str, Any], order: list[int]
) -> None:
    node, shuffled = make(kind), make(kind)
    with torch.no_grad():
        for name, value in (*node.named_parameters(), *node.named_buffers()):
            if value.ndim:
                value.copy_(torch.tensor([3.0, 1.0, 2.0]))
                shuffled.state_dict()[name].copy_(value[list(order)])
    out, again = node(TEACHERS, **rest), shuffled([TEACHERS[k] for k in order], **rest)
    torch.testing.assert_close(again["weights"], out["weights"][:, list(order)])
    torch.testing.assert_close(again["logits"], out["logits"])


def test_half_precision_teachers_are_weighed_in_single_precision() -> None:
    half = [teacher.to(torch.bfloat16) for teacher in TEACHERS]
    for kind, rest in CASES:
        out = copy.deepcopy(make(kind)).float()(half, **{k: v.float() if v.is_floating_point() else v
                                                        for k, v in rest.items()})  # fmt: skip
        assert {value.dtype for value in out.values()} == {torch.float32}
    assert errors(TEACHERS, LABEL).shape == (3, 3)


@pytest.mark.parametrize(
    ("kind", "shapes", "options", "message"),
    [
        (ConfidenceWeights, [(4,)], {}, "ca_mkd weighs teachers against each other, but it was given one"),
        (ConfidenceWeights, [(4,), (5,)], {}, r"logits: found \[4\], \[5\] for one sample, expected \[K\] with the s"),
        (AccuracyWeighted, [(4, 2)] * 2, {}, r"logits: found \[4, 2\], \[4, 2\]"),
        (AccuracyWeighted, [(4,)] * 2, {"form": "soft"}, "form: found 'soft', expected one of proportional, softmax"),
        (LearnedMean, [(4,)] * 2, {"least": 0.5}, "least: found 0.5, expected a share from 0 and below 0.5"),
        (LearnedMean, [(4,)] * 2, {"least": -0.1}, "least: found -0.1"),
    ],
)
def test_what_cannot_be_weighed_is_refused(
    kind: type[Any], shapes: list[kdx.Shape], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        kind(kind.Config(**options), kdx.Given(shapes={"logits": shapes, "label": ()}))


def test_the_targets_keep_the_contract() -> None:
    check_target(ConfidenceWeights)
    check_target(AccuracyWeighted)
    check_target(AccuracyWeighted, form="softmax", sharpness=8.0, temperature=4.0)
    check_target(LearnedMean, least=0.1, temperature=4.0)


def test_a_gradient_that_reached_the_weights_would_favour_the_teacher_that_agrees() -> None:
    """Why none does: the divergence falls when the weights move to the teacher that the student resembles."""
    student: Tensor = TEACHERS[2].clone()
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gaps = torch.stack([soft_targets(student, teacher, FOUR) for teacher in TEACHERS], 1)
    (gradient,) = torch.autograd.grad((scores.softmax(0) * gaps).sum(1).mean(), scores)
    assert gradient.argmin() == 2
