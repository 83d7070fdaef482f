"""Value and gradient are those of the ordinary operations, in blocks and on each of the other ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdx import fused
from kdx.builtin.losses import cross_entropy
from kdx.fused import cross_entropy_sum, log_mixture, log_softmax, soft_divergence

WAYS = {"few": (10**6, 10**6), "narrow": (10**6, 10**6), "whole": (0, 10**6), "blocks": (0, 0)}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-9}
TEMPERATURES = [torch.tensor(1.0), torch.tensor(4.0), torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 3.0, 1.5])]


@pytest.fixture(params=[*WAYS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sizes that send 7 rows of 13 logits through one of the ways; three rows are a block where there are several."""
    small, middle = WAYS[request.param]
    monkeypatch.setattr(fused, "SMALL", small)
    monkeypatch.setattr(fused, "MIDDLE", middle)
    monkeypatch.setattr(fused, "BLOCK", 40)
    monkeypatch.setattr(fused, "REGISTER", 128 if request.param == "narrow" else 0)
    monkeypatch.setattr(fused, "NARROW", 1)
    name: str = request.param
    return name


def logits(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    return 5 * torch.randn(*(shape or (7, 13)), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def usual_divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    tau = temperature.reshape(-1, *[1] * (student.ndim - 1)) if temperature.ndim else temperature
    log_q, p = F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1)
    values = F.kl_div(log_q, p, reduction="none").sum(1)
    return values * (temperature.reshape(-1, *[1] * (values.ndim - 1)) if temperature.ndim else temperature) ** 2


def with_gradient(function: Callable[..., Tensor], student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of a sum in which each value counts differently."""
    student = student.clone().requires_grad_()
    value = function(student, *rest)
    (gradient,) = torch.autograd.grad((value * torch.arange(1, value.numel() + 1).reshape(value.shape)).sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [*TOLERANCE])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_divergence_is_that_of_the_ordinary_operations(way: str, temperature: Tensor, dtype: torch.dtype) -> None:
    student, teacher = logits(dtype, 0), logits(dtype, 1)
    found = with_gradient(soft_divergence, student, teacher, temperature.to(dtype))
    expected = with_gradient(usual_divergence, student, teacher, temperature.to(dtype))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("apart", [0.01, 1.0])
def test_float32_gives_the_numbers_of_float64_for_a_thousand_classes(way: str, apart: float) -> None:
    teacher = logits(torch.float64, 1, 64, 1000)
    student = teacher + apart * logits(torch.float64, 0, 64, 1000)
    temperature = torch.tensor(4.0)
    exact = with_gradient(usual_divergence, student, teacher, temperature.double())
    found = with_gradient(soft_divergence, student.float(), teacher.float(), temperature)
    torch.testing.assert_close(found[0].double() / 16, exact[0] / 16, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-6 * student.abs().max().item())


def test_positions_beside_the_classes_have_values_of_their_own(way: str) -> None:
    student, teacher = logits(torch.float64, 0, 7, 5, 3), logits(torch.float64, 1, 7, 5, 3)
    for temperature in (torch.tensor(2.0), torch.rand(7) + 1):
        found = with_gradient(soft_divergence, student, teacher, temperature.double())
        expected = with_gradient(usual_divergence, student, teacher, temperature.double())
        assert found[0].shape == (7, 3)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_student_with_the_answers_of_its_teacher_is_at_zero(way: str) -> None:
    same = logits(torch.float32, 0)
    value, gradient = with_gradient(soft_divergence, same, same, torch.tensor(4.0))
    assert value.abs().max() == 0
    assert gradient.abs().max() < 1e-5


def test_logits_that_no_exponential_holds_give_finite_numbers(way: str) -> None:
    student, teacher = 40 * logits(torch.float32, 0) + 300, 40 * logits(torch.float32, 1)
    found = with_gradient(soft_divergence, student, teacher, torch.tensor(1.0))
    expected = with_gradient(usual_divergence, student, teacher, torch.tensor(1.0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_temperature_that_learns_gets_its_gradient(way: str) -> None:
    student, teacher = logits(torch.float64, 0).requires_grad_(), logits(torch.float64, 1)
    for number in (torch.tensor(2.0), torch.rand(7) + 1):
        temperature = number.double().requires_grad_()
        ours = torch.autograd.grad(soft_divergence(student, teacher, temperature).sum(), [student, temperature])
        theirs = torch.autograd.grad(usual_divergence(student, teacher, temperature).sum(), [student, temperature])
        torch.testing.assert_close(ours, theirs)
        assert ours[1].abs().max() > 0


def test_the_teacher_gets_no_gradient(way: str) -> None:
    student, teacher = logits(torch.float32, 0).requires_grad_(), logits(torch.float32, 1).requires_grad_()
    soft_divergence(student, teacher, torch.tensor(2.0)).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_second_derivatives_are_right(way: str) -> None:
    student, teacher = logits(torch.float64, 0).requires_grad_(), logits(torch.float64, 1)
    label = torch.tensor([0, 3, -1, 12, 5, -1, 7])
    tau = torch.tensor(2.0, dtype=torch.float64)

    def both(x: Tensor) -> Tensor:
        return soft_divergence(x, teacher, tau).square().sum() + cross_entropy_sum(x, label, 0.1).square()

    assert torch.autograd.gradcheck(both, student)
    assert torch.autograd.gradgradcheck(both, student)


def test_a_second_derivative_leaves_the_teacher_alone(way: str) -> None:
    student, teacher = logits(torch.float32, 0).requires_grad_(), logits(torch.float32, 1).requires_grad_()
    value = soft_divergence(student, teacher, torch.tensor(2.0)).sum()
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    gradient.square().sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_a_teacher_may_have_run_in_inference_mode(way: str) -> None:
    student, teacher = logits(torch.float32, 0), logits(torch.float32, 1)
    with torch.inference_mode():
        answers = teacher + 0
    found = with_gradient(soft_divergence, student, answers, torch.tensor(2.0))
    torch.testing.assert_close(found, with_gradient(soft_divergence, student, teacher, torch.tensor(2.0)))


def test_the_transforms_of_torch_go_through(way: str) -> None:
    student, teacher = logits(torch.float64, 0), logits(torch.float64, 1)
    label, tau = torch.tensor([0, 3, -1, 12, 5, -1, 7]), torch.tensor(2.0)

    def total(x: Tensor) -> Tensor:
        mixture = log_mixture([teacher, x], [-0.7, -0.7], tau)
        return (soft_divergence(x, teacher, tau) + mixture.sum(1)).sum() + cross_entropy_sum(x, label)

    _, expected = with_gradient(total, student)
    torch.testing.assert_close(torch.func.grad(total)(student), expected)
    several = torch.vmap(torch.func.grad(total))(torch.stack([student, student]))
    torch.testing.assert_close(several, torch.stack([expected, expected]))


def test_a_temperature_may_be_more_exact_than_the_logits(way: str) -> None:
    student, teacher = logits(torch.float32, 0), logits(torch.float32, 1)
    tau = torch.arange(1.0, 8.0)
    value, gradient = with_gradient(soft_divergence, student, teacher, tau.double())
    expected = with_gradient(soft_divergence, student, teacher, tau)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close((value.float(), gradient), expected, rtol=1e-4, atol=1e-4)


def test_two_backward_passes_through_one_graph_give_the_gradient_twice(way: str) -> None:
    student, teacher = logits(torch.float32, 0).requires_grad_(), logits(torch.float32, 1)
    label = torch.tensor([0, 3, -1, 12, 5, -1, 7])
    value = soft_divergence(student, teacher, torch.tensor(2.0)).sum() + cross_entropy_sum(student, label)
    (once,) = torch.autograd.grad(value, student, retain_graph=True)
    (again,) = torch.autograd.grad(value, student)
    assert torch.equal(once, again)


def test_without_a_graph_the_value_is_the_same(way: str) -> None:
    student, teacher = logits(torch.float32, 0).requires_grad_(), logits(torch.float32, 1)
    with torch.no_grad():
        bare = soft_divergence(student, teacher, torch.tensor(2.0))
    assert not bare.requires_grad
    assert torch.equal(bare, soft_divergence(student, teacher, torch.tensor(2.0)).detach())


def test_half_precision_and_mixed_types_take_the_ordinary_operations(way: str) -> None:
    student, teacher = logits(torch.bfloat16, 0), logits(torch.float32, 1)
    value, gradient = with_gradient(soft_divergence, student, teacher, torch.tensor(2.0))
    assert value.isfinite().all()
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [*TOLERANCE])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [[0, 3, 2, 12, 5, 5, 7], [0, -1, -1, 12, 5, -1, 7], [-1] * 7])
def test_cross_entropy_is_that_of_torch(way: str, label: list[int], smoothing: float, dtype: torch.dtype) -> None:
    def usual(student: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(student, label, ignore_index=-1, reduction="sum", label_smoothing=smoothing)

    found = with_gradient(lambda x, y: cross_entropy_sum(x, y, smoothing), logits(dtype, 0), torch.tensor(label))
    expected = with_gradient(usual, logits(dtype, 0), torch.tensor(label))
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_over_samples_that_all_have_a_label_is_that_of_torch(way: str, smoothing: float) -> None:
    label = torch.tensor([0, 3, 2, 12, 5, 5, 7])

    def usual(student: Tensor) -> Tensor:
        return F.cross_entropy(student, label, label_smoothing=smoothing)

    def ours(student: Tensor) -> Tensor:
        return cross_entropy(student, label, smoothing, labelled=True)

    found, expected = (with_gradient(one, logits(torch.float64, 0)) for one in (ours, usual))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 10, 15])
def test_short_rows_have_the_log_softmax_of_torch(classes: int) -> None:
    rows = logits(torch.float32, 0, 512, classes).requires_grad_()
    assert fused._is_narrow(rows)
    above = torch.randn(512, classes, generator=torch.Generator().manual_seed(1))
    found, expected = log_softmax(rows), rows.log_softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    one, two = (torch.autograd.grad(value, rows, above) for value in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_a_label_beyond_the_classes_is_refused(way: str) -> None:
    student = logits(torch.float32, 0).requires_grad_()
    for wrong in (13, -2):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            cross_entropy_sum(student, torch.tensor([0, 1, 2, 3, 4, 5, wrong]))


@pytest.mark.parametrize("scale", [1, 40])
def test_a_mixture_is_that_of_the_probabilities(way: str, scale: int) -> None:
    teachers = [scale * logits(torch.float64, seed) for seed in (1, 2, 3)]
    weights = torch.log_softmax(logits(torch.float64, 4, 7, 3), 1).unbind(1)
    for temperature in (torch.tensor(2.0).double(), torch.rand(7).double() + 1):
        tau = temperature.reshape(-1, 1) if temperature.ndim else temperature
        parts = [torch.log_softmax(z / tau, 1) + w.unsqueeze(1) for z, w in zip(teachers, weights, strict=True)]
        expected = tau * torch.logsumexp(torch.stack(parts), 0)
        found = log_mixture(teachers, weights, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_probabilities_that_no_number_holds_leave_a_mixture_finite(way: str) -> None:
    teachers = [torch.tensor([[0.0, 1000.0], [500.0, 0.0]]).repeat(4, 7) for _ in range(2)]
    found = log_mixture(teachers, [-0.7, -0.7], torch.tensor(1.0))
    assert found.isfinite().all()
    assert found.softmax(1)[0].sum().item() == pytest.approx(1.0)
    assert found[0, 0] < -80


def test_a_mixture_whose_weights_learn_has_a_graph(way: str) -> None:
    teachers = [logits(torch.float32, seed) for seed in (1, 2)]
    weight = torch.full((7,), -0.7, requires_grad=True)
    log_mixture(teachers, [weight, -0.7], torch.tensor(2.0)).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_a_large_vocabulary_leaves_nothing_of_its_size_in_the_graph() -> None:
    student, teacher = logits(torch.float32, 0, 40, 32_000).requires_grad_(), logits(torch.float32, 1, 40, 32_000)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        soft_divergence(student, teacher, torch.tensor(4.0)).mean() + cross_entropy_sum(student, torch.arange(40))
    inputs = {student.data_ptr(), teacher.data_ptr()}
    large = [x for x in kept if x.numel() >= student.numel() and x.data_ptr() not in inputs]
    assert len(kept) > 2
    assert not large
