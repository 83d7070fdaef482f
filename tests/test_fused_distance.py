"""Facts of `kdx/fused_distance.py`: the squared distance of features is that of ordinary operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdx import fused_distance
from kdx.fused_distance import squared_distance


@pytest.fixture(params=["small", "large"], autouse=True)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way for features of any size."""
    monkeypatch.setattr(fused_distance, "SMALL", 1 << 15 if request.param == "small" else -1)


def composed(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher.detach()).square().flatten(1).mean(1)


def features(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 4, 4), (1, 2, 6), (0, 3)])
def test_value_and_gradient_are_those_of_ordinary_operations(shape: tuple[int, ...]) -> None:
    student, teacher = features(*shape)
    weights = torch.arange(1.0, shape[0] + 1, dtype=torch.float64)
    found, expected = squared_distance(student, teacher), composed(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (mine,) = torch.autograd.grad((weights * found).sum(), student)
    (theirs,) = torch.autograd.grad((weights * expected).sum(), student)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert teacher.grad is None


def test_it_has_second_derivatives() -> None:
    student, teacher = features(3, 4)
    assert torch.autograd.gradgradcheck(lambda x: squared_distance(x, teacher), (student,))


def test_the_transforms_of_torch_go_through() -> None:
    student, teacher = (one.detach() for one in features(3, 4))
    found = torch.func.grad(lambda x: squared_distance(x, teacher).sum())(student)
    torch.testing.assert_close(found, (student - teacher) / 2)


def test_a_teacher_may_have_run_in_inference_mode() -> None:
    student, teacher = features(3, 4)
    with torch.inference_mode():
        answers = teacher.detach() + 0
    (found,) = torch.autograd.grad(squared_distance(student, answers).sum(), student)
    torch.testing.assert_close(found, ((student - teacher) / 2).detach())


def test_other_layouts_and_types_give_the_same() -> None:
    student, teacher = features(4, 3, 5, 5, dtype=torch.float32)
    expected = composed(student, teacher)
    last = squared_distance(student.to(memory_format=torch.channels_last), teacher)
    torch.testing.assert_close(last, expected)
    half = squared_distance(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=2e-2)
    assert squared_distance(student, teacher.double()).dtype == torch.float64
