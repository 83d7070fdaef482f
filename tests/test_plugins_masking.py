"""Losses with hidden parts: what is hidden, what is compared, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kdx_plugins.masking import MaskedGeneration, VitDistillation
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

VIT: dict[str, Any] = {
    "student": (4, 3, 3),
    "teacher": (6, 3, 3),
    "student_shallow": [(4, 3, 3)] * 2,
    "teacher_shallow": [(6, 3, 3), (4, 3, 3)],
}
ZERO, ONE = torch.tensor(0.0), torch.tensor(1.0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: type[Any], shapes: dict[str, Any], **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes=shapes, generator=torch.Generator().manual_seed(0)))


def masked(student: kdx.Shape, teacher: kdx.Shape, **options: Any) -> Any:
    return make(MaskedGeneration, {"student": student, "teacher": teacher}, **options)


def test_without_a_mask_the_whole_map_is_generated_and_summed() -> None:
    loss = masked((3, 8, 8), (5, 4, 4), drop=0.0)
    student, teacher = normal(0, 2, 3, 8, 8), normal(1, 2, 5, 4, 4)
    pooled = student.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    expected = (loss.generator(loss.connector(pooled)) - teacher).square().sum((1, 2, 3))
    torch.testing.assert_close(loss(student, teacher), expected)


@pytest.mark.parametrize(("mask", "axes"), [("channels", (2, 3)), ("positions", (1,))])
def test_whole_channels_or_whole_positions_are_hidden(mask: str, axes: tuple[int, ...]) -> None:
    loss = masked((40, 6, 6), (40, 6, 6), mask=mask, drop=0.4)
    assert isinstance(loss.connector, nn.Identity)
    student = normal(0, 8, 40, 6, 6).requires_grad_()
    loss(student, normal(1, 8, 40, 6, 6)).sum().backward()
    assert student.grad is not None
    hidden = student.grad == 0
    assert (hidden.all(axes) == hidden.any(axes)).all()
    assert hidden.float().mean().item() == pytest.approx(0.4, abs=0.06)


def test_each_step_hides_something_else() -> None:
    loss, student, teacher = masked((8, 3, 3), (8, 3, 3), drop=0.5), normal(0, 2, 8, 3, 3), normal(1, 2, 8, 3, 3)
    assert not torch.equal(loss(student, teacher), loss(student, teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((9, 4), (5, 3, 3), {}, r"mgd needs maps .* student is \[9, 4\]; tap a stage, as in student.depth_50"),
        ((3, 3, 3), (5, 3, 3), {"mask": "rows"}, "mask: found 'rows', expected one of channels, positions"),
        ((3, 3, 3), (5, 3, 3), {"drop": 1.0}, "drop: found 1.0, expected a chance from 0 and below 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    student: kdx.Shape, teacher: kdx.Shape, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        masked(student, teacher, **options)


def vit_tensors(size: int = 4) -> dict[str, Any]:
    return {
        name: [normal(place, size, *one) for place, one in enumerate(shape)]
        if isinstance(shape, list)
        else normal(9, size, *shape)
        for name, shape in VIT.items()
    }


def test_shallow_features_are_mimicked_through_one_linear_layer_each() -> None:
    loss, tensors = make(VitDistillation, VIT), vit_tensors()
    first, second, _ = loss.connectors
    tokens = tensors["student_shallow"][0].flatten(2).transpose(1, 2)
    linear = tokens @ first.weight[:, :, 0, 0].T + first.bias
    expected = (linear - tensors["teacher_shallow"][0].flatten(2).transpose(1, 2)).square().sum((1, 2))
    assert isinstance(second, nn.Identity)
    expected = expected + (tensors["student_shallow"][1] - tensors["teacher_shallow"][1]).square().sum((1, 2, 3))
    torch.testing.assert_close(loss(**tensors, mimic=ONE, generation=ZERO), expected)


@pytest.mark.parametrize(("drop", "hidden"), [(0.5, 5), (0.1, 1), (0.9, 9)])
def test_the_same_number_of_places_is_hidden_of_each_sample_and_they_alone_are_compared(
    drop: float, hidden: int
) -> None:
    loss, tensors = make(VitDistillation, VIT, drop=drop), vit_tensors()
    with torch.no_grad():
        for weight in loss.generator.parameters():
            weight.zero_()
    tensors["teacher"] = torch.ones_like(tensors["teacher"])
    expected = torch.full((4,), 6 * hidden / drop)
    torch.testing.assert_close(loss(**tensors, mimic=ZERO, generation=ONE), expected)


def test_a_learnt_token_stands_in_for_what_is_hidden() -> None:
    loss, tensors = make(VitDistillation, VIT), vit_tensors()
    tensors["student"].requires_grad_()
    loss(**tensors, mimic=ZERO, generation=ONE).sum().backward()
    unused = (tensors["student"].grad == 0).all(1).flatten(1).sum(1)
    assert unused.tolist() == [5, 5, 5, 5]
    assert loss.token.grad.any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"student": (4, 6, 6)},
            r"student \[4, 6, 6\] has 6x6 and teacher \[6, 3, 3\] has 3x3; use nets with the same",
        ),
        ({"student_shallow": [(4, 3, 3)]}, "there are 1 of the student and 2 of the teacher; name as many of each"),
        ({"teacher": (9, 6)}, r"vitkd needs maps .* teacher is \[9, 6\]"),
    ],
)
def test_features_of_other_grids_are_refused(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        make(VitDistillation, VIT | shapes)


def test_a_share_of_places_must_be_one() -> None:
    with pytest.raises(kdx.ConfigError, match=r"drop: found 1\.0, expected a share between 0 and 1"):
        make(VitDistillation, VIT, drop=1.0)


def test_masked_losses_keep_the_contract() -> None:
    for mask in ("channels", "positions"):
        shapes: dict[str, Any] = {"student": (4, 6, 6), "teacher": (5, 3, 3)}
        check_loss(MaskedGeneration, shapes=shapes, order_matters=True, mask=mask)
    check_loss(VitDistillation, shapes=VIT, order_matters=True, mimic=1.0, generation=1.0)
