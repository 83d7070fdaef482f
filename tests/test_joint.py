"""Cross-entropy and a divergence of the same logits in one call are what they are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import NET, batch, forward, plan_of
from torch import Tensor

from kdx import fused
from kdx.fused import cross_entropy_and_divergence, soft_divergence
from kdx.joint import JointCall, joined
from kdx.modules import Learner

LABEL = torch.tensor([0, 3, -1, 12, 5, -1, 7])
BOTH: dict[str, Any] = {"teachers": {"big": NET}, "losses": {"kd": {"use": "kd"}}}


@pytest.fixture(autouse=True, params=["whole", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few logits go through as more do: whole, or in blocks of a few rows."""
    for name, size in (("SMALL", 0), ("MIDDLE", 10**6 if request.param == "whole" else 0), ("BLOCK", 40)):
        monkeypatch.setattr(fused, name, size)


def logits(seed: int) -> Tensor:
    return 5 * torch.randn(7, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("label", "labelled"), [(LABEL, False), (LABEL.abs(), False), (torch.full((7,), -1), False), (LABEL.abs(), True)]
)
@pytest.mark.parametrize("temperature", [torch.tensor(4.0), torch.arange(1.0, 8.0)])
def test_values_and_the_gradient_of_any_weights_are_those_of_two_losses(
    temperature: Tensor, label: Tensor, labelled: bool, smoothing: float
) -> None:
    student, teacher, tau = logits(0).requires_grad_(), logits(1), temperature.double()
    found = cross_entropy_and_divergence(student, label, teacher, tau, smoothing, labelled=labelled)
    assert found is not None
    usual = F.cross_entropy(student, label, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
    apart = usual / (label != -1).sum().clamp(min=1), soft_divergence(student, teacher, tau)
    torch.testing.assert_close(found, apart, rtol=1e-12, atol=1e-12)
    for hard, soft in ((1.0, 1.0), (0.0, 0.9), (0.1, 0.0), (0.3, torch.arange(7.0))):
        one, two = (
            torch.autograd.grad(hard * a + (soft * b).sum(), student, retain_graph=True) for a, b in (found, apart)
        )
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("label", "labelled"), [(LABEL, False), (LABEL.abs(), True)])
def test_second_derivatives_are_right(label: Tensor, labelled: bool) -> None:
    tau = torch.tensor(2.0, dtype=torch.float64)

    def total(x: Tensor) -> Tensor:
        found = cross_entropy_and_divergence(x, label, logits(1), tau, 0.1, labelled=labelled)
        assert found is not None
        return found[0].square() + found[1].square().sum()

    assert torch.autograd.gradcheck(total, logits(0).requires_grad_())
    assert torch.autograd.gradgradcheck(total, logits(0).requires_grad_())


def test_a_second_derivative_leaves_the_teacher_alone() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    found = cross_entropy_and_divergence(student, LABEL, teacher, torch.tensor(2.0))
    assert found is not None
    (gradient,) = torch.autograd.grad(found[0] + found[1].sum(), student, create_graph=True)
    gradient.square().sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_teacher_may_have_run_in_inference_mode_and_a_temperature_be_more_exact() -> None:
    student, teacher, tau = logits(0).float().requires_grad_(), logits(1).float(), torch.arange(1.0, 8.0)
    with torch.inference_mode():
        answers = teacher + 0
    gradients = []
    for theirs, temperature in ((teacher, tau), (answers, tau.double())):
        found = cross_entropy_and_divergence(student, LABEL, theirs, temperature)
        assert found is not None
        gradients.append(torch.autograd.grad(found[0] + found[1].sum(), student))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_logits_far_from_zero_have_the_cross_entropy_of_torch_in_float32() -> None:
    student, teacher = (logits(0).float() + 300).requires_grad_(), logits(1).float()
    found = cross_entropy_and_divergence(student, LABEL, teacher, torch.tensor(4.0))
    assert found is not None
    torch.testing.assert_close(found[0], F.cross_entropy(student, LABEL, ignore_index=-1), rtol=1e-6, atol=0)


def test_what_gains_nothing_is_left_to_two_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    student, tau = logits(0).requires_grad_(), torch.tensor(2.0, dtype=torch.float64)
    learns = tau.clone().requires_grad_()
    assert cross_entropy_and_divergence(student, LABEL, logits(1), learns) is None
    assert cross_entropy_and_divergence(student, student.detach().softmax(1), logits(1), tau) is None
    assert cross_entropy_and_divergence(student.detach(), LABEL, logits(1), tau) is None
    monkeypatch.setattr(fused, "SMALL", 1000)
    assert cross_entropy_and_divergence(student, LABEL, logits(1), tau) is None


def gradients(learner: Learner, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, [*learner.student.parameters()]))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"losses": {"ce": {"weight": 0.25, "label_smoothing": 0.1}, "kd": {"weight": 0.75, "temperature": 2.0}}},
        {"losses": {"ce": {"weight": {"use": "linear", "start": 1.0, "end": 0.0}}}},
        {"losses": {"near": {"use": "mse_logits", "inputs": {"teacher": "big.logits"}}}},
    ],
)
def test_a_plan_gives_the_same_terms_and_gradient(more: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch()
    plan = plan_of(BOTH, more)
    assert any(isinstance(call, JointCall) for call in joined(plan))
    learner, found = forward(plan, given)
    one = gradients(learner, found.total)
    monkeypatch.setattr(fused, "SMALL", 10**6)
    learner, apart = forward(plan, given)
    two = gradients(learner, apart.total)
    assert list(found.parts) == list(apart.parts) == list(plan.spec.losses)
    for ours, theirs in ((found.terms, apart.terms), (found.parts, apart.parts)):
        torch.testing.assert_close(dict(ours), dict(theirs), rtol=1e-6, atol=5e-6)  # the square of 4 times rounding
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        {"train": {"updater": {"use": "pcgrad"}}},
        {"losses": {"kd": {"divergence": "reverse_kl"}}},
        {"losses": {"kd": {"reduction": "mean"}}},
        {
            "teachers": {"other": NET},
            "losses": {"kd": {"inputs": {"student": "other.logits", "teacher": "big.logits"}}},
        },
    ],
)
def test_other_losses_stay_apart(more: Mapping[str, Any]) -> None:
    plan = plan_of(BOTH, more)
    assert joined(plan) == plan.loss_calls


def test_losses_of_which_samples_may_be_absent_stay_apart() -> None:
    plan = plan_of(BOTH)
    absent = tuple(replace(call, presence=frozenset({frozenset({"batch.heard"})})) for call in plan.loss_calls)
    gappy = replace(plan, loss_calls=absent)
    assert joined(gappy) == absent


def test_a_label_beyond_the_classes_names_both_losses() -> None:
    plan, given = plan_of(BOTH), batch()
    given["label"] = torch.full_like(given["label"], 1000)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds") as error:
        forward(plan, given)
    assert any("losses.ce" in note and "losses.kd" in note for note in error.value.__notes__)
