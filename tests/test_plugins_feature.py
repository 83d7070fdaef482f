"""Feature regression, hints, activation boundaries and margins: golden values, shapes and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kdx_plugins.feature import (
    DISTANCES,
    ActivationBoundaries,
    Hint,
    Margin,
    MeanSquaredError,
    Overhaul,
    activation_boundary,
    distance,
    negative_mean,
    partial_distance,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

K = torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
STUDENT, TEACHER = (0.1 * K).sin(), (0.1 * K).cos()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: type[Any], student: Any, teacher: Any, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes={"student": student, "teacher": teacher}))


def test_mean_squared_error_has_its_golden_value_and_one_per_sample() -> None:
    values = distance(STUDENT, TEACHER)
    assert values.mean().item() == pytest.approx(0.9986330507, abs=1e-9)
    torch.testing.assert_close(values[1], (STUDENT[1] - TEACHER[1]).square().mean())


def test_the_distances_are_what_their_names_say() -> None:
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[0.0, 4.0], [1.5, 1.0]])
    expected = {"l2": [12.5, 0.125], "l1": [3.5, 0.25], "smooth_l1": [3.0, 0.0625]}
    for kind, values in expected.items():
        assert distance(student, teacher, kind).tolist() == pytest.approx(values)
    cosine = distance(student, teacher, "cosine")
    assert cosine.tolist() == pytest.approx([1.0, 1 - 2.5 / (2**0.5 * 3.25**0.5)], abs=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel", "stride"),
    [
        ((3, 8, 8), (5, 4, 4), (3, 3), (2, 2)),
        ((3, 8, 8), (5, 8, 8), (1, 1), (1, 1)),
        ((3, 8, 8), (5, 5, 5), (4, 4), (1, 1)),
        ((3, 8, 7), (5, 4, 7), (3, 1), (2, 1)),
        ((3, 4, 4), (5, 8, 8), (4, 4), (2, 2)),
    ],
)
def test_the_regressor_reaches_the_size_of_the_teacher(
    student: kdx.Shape, teacher: kdx.Shape, kernel: tuple[int, int], stride: tuple[int, int]
) -> None:
    hint = make(Hint, student, teacher, regressor="conv")
    layer = hint.regressor[0]
    assert isinstance(layer, nn.ConvTranspose2d) == (student[1] < teacher[1])
    assert (layer.kernel_size, layer.stride) == (kernel, stride)
    assert hint.regressor(torch.randn(2, *student)).shape == (2, *teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel", "words"),
    [
        ((3, 8, 7), (5, 4, 7), (3, 1), "a convolution that reaches the size"),
        ((3, 4, 4), (5, 8, 8), (4, 4), "a convolution that reaches the size"),
        ((3, 8, 8), (5, 5, 5), (1, 1), "the larger map is pooled, then conv 1x1"),
        ((3, 5, 5), (5, 8, 8), (1, 1), "the larger map is pooled, then conv 1x1"),
    ],
)
def test_without_a_choice_only_small_kernels_reach_a_size(
    student: kdx.Shape, teacher: kdx.Shape, kernel: tuple[int, int], words: str
) -> None:
    hint = make(Hint, student, teacher)
    assert hint.regressor[0].kernel_size == kernel
    assert hint.describe() == words
    assert hint(torch.randn(2, *student), torch.randn(2, *teacher)).shape == (2,)


def test_a_regressor_that_gives_the_teachers_map_has_the_value_zero() -> None:
    hint = make(Hint, (4, 3, 3), (4, 3, 3), relu=False).eval()
    with torch.no_grad():
        hint.regressor[0].weight.copy_(torch.eye(4)[:, :, None, None])
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert hint(x, hint.regressor(x)).abs().max() == 0
    assert hint(x, x).abs().max() < 1e-8  # batch norm divides by sqrt(1 + 1e-5)


@pytest.mark.parametrize(
    ("options", "seen", "rectified"),
    [
        ({}, 0.5, True),
        ({}, -0.5, False),
        ({"relu": True}, -0.5, True),
        ({"relu": False}, 0.5, False),
        ({"regressor": "conv1x1"}, 0.5, False),
    ],
)
def test_a_relu_ends_the_regressor_of_a_teacher_that_is_never_negative(
    options: dict[str, Any], seen: float, rectified: bool
) -> None:
    hint = make(Hint, (4, 3, 3), (4, 3, 3), **options).eval()
    for value in (1.0, seen, 2.0):
        hint.calibrate(student=torch.zeros(2, 4, 3, 3), teacher=torch.full((2, 4, 3, 3), value))
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = hint.regressor(x).relu() if rectified else hint.regressor(x)
    torch.testing.assert_close(hint(x, torch.zeros_like(x)), expected.square().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((3, 5, 5), (5, 8, 8), {"regressor": "conv"}, r"\[3, 5, 5\] to \[5, 8, 8\].*`regressor: conv1x1` can"),
        ((9, 4), (5, 3, 3), {}, r"student is \[9, 4\].*use the loss mse after an aligner"),
        ((3, 4, 4), (5, 4, 4), {"distance": "l3"}, "distance: found 'l3', expected one of l2, l1, smooth_l1, cosine"),
        ((3, 4, 4), (5, 4, 4), {"regressor": "mlp"}, "regressor: found 'mlp', expected one of auto, conv, conv1x1"),
    ],
)
def test_hints_that_cannot_be_regressed_are_refused(
    student: kdx.Shape, teacher: kdx.Shape, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        make(Hint, student, teacher, **options)


def test_activation_boundaries_have_their_golden_value() -> None:
    assert activation_boundary(STUDENT, TEACHER).mean().item() * 3 / 1000 == pytest.approx(0.2137267168, abs=1e-9)


def test_activations_on_the_right_side_by_the_margin_cost_nothing() -> None:
    teacher = torch.tensor([[2.0, 0.0, -3.0]])[:, :, None, None]
    right = torch.tensor([[1.5, -1.5, -2.0]])[:, :, None, None]
    assert activation_boundary(right, teacher).item() == 0
    assert activation_boundary(-right, teacher).tolist() == pytest.approx([2.5**2 + 2.5**2 + 3.0**2])
    assert activation_boundary(right, teacher, 2.0).tolist() == pytest.approx([0.5**2 + 0.5**2])


def test_a_stage_counts_twice_as_much_as_the_one_before_it() -> None:
    boundaries = make(ActivationBoundaries, [(3, 4, 4)] * 3, [(3, 4, 4)] * 3, connector="unequal")
    maps = [normal(seed, 2, 3, 4, 4) for seed in range(6)]
    expected = sum(activation_boundary(maps[i], maps[i + 3]) / 2 ** (2 - i) for i in range(3))
    torch.testing.assert_close(boundaries(maps[:3], maps[3:], torch.tensor(1.0)), expected)


def test_a_connector_stands_between_equal_shapes_only_on_demand() -> None:
    kinds = {
        option: type(make(ActivationBoundaries, [(3, 4, 4)], [(3, 4, 4)], connector=option).connectors[0])
        for option in ("always", "unequal")
    }
    assert kinds == {"always": nn.Sequential, "unequal": nn.Identity}
    with pytest.raises(kdx.ConfigError, match="connector: found 'never', expected one of always, unequal"):
        make(ActivationBoundaries, [(3, 4, 4)], [(3, 4, 4)], connector="never")


def test_the_closed_form_of_margins_has_its_golden_values() -> None:
    gamma, beta = torch.tensor([[1.0, 0.5, 0.1], [0.0, 0.3, 1.0]], dtype=torch.float64)
    golden = [-0.7978845608, -0.3075128801, -0.3]
    assert negative_mean(gamma, beta).tolist() == pytest.approx(golden, abs=1e-9)
    assert negative_mean(-gamma, beta).tolist() == pytest.approx(golden, abs=1e-9)
    assert negative_mean(torch.zeros(2), torch.tensor([-2.0, 2.0])).tolist() == pytest.approx([-2.0, 0.0])


def test_measured_margins_are_those_of_the_batch_norm_before_the_activation() -> None:
    gamma, beta = torch.tensor([1.0, 0.5, 0.1, 2.0]), torch.tensor([0.0, 0.3, 1.0, -1.0])
    margin = Margin(4)
    for seed in range(4):
        margin(normal(seed, 32, 4, 32, 32).float() * gamma[:, None, None] + beta[:, None, None])
    torch.testing.assert_close(margin.level, negative_mean(gamma, beta), rtol=0.01, atol=0.0)


def test_margins_are_measured_over_all_batches_and_stay_when_training_starts() -> None:
    maps = [normal(seed, 4, 3, 5, 5).float() for seed in range(3)]
    overhaul = make(Overhaul, [(2, 5, 5)], [(3, 5, 5)])
    for teacher in maps:
        overhaul.calibrate(student=[torch.zeros(4, 2, 5, 5)], teacher=[teacher])
    flat = torch.cat(maps).transpose(0, 1).flatten(1)
    expected = torch.stack([channel[channel < 0].mean() for channel in flat])
    torch.testing.assert_close(overhaul.margins[0].level, expected)
    overhaul([torch.randn(4, 2, 5, 5)], [maps[0] - 9])
    torch.testing.assert_close(overhaul.margins[0].level, expected)


def test_partial_distance_has_its_golden_value() -> None:
    margin = negative_mean(torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert partial_distance(STUDENT, TEACHER, margin).mean().item() / 1000 == pytest.approx(0.0436253850, abs=1e-9)


def test_a_student_below_a_target_that_is_not_positive_stays() -> None:
    teacher = torch.tensor([[-5.0, -0.5, 2.0, 2.0]])[:, :, None, None]
    student = torch.tensor([[-3.0, -4.0, -1.0, 5.0]])[:, :, None, None].requires_grad_()
    value = partial_distance(student, teacher, torch.full((4,), -1.0))
    assert value.item() == pytest.approx(3.0**2 + 3.0**2)
    value.backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([0.0, 0.0, -6.0, 6.0])


@pytest.mark.parametrize("kind", [ActivationBoundaries, Overhaul])
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([(3, 4, 4)] * 2, [(3, 4, 4)], "there are 2 of the student and 1 of the teacher; name as many of each"),
        ([(3, 4, 4)], [(16, 8)], r"one of teacher is \[16, 8\]; tap a stage, as in teacher.depth_50"),
    ],
)
def test_stages_that_cannot_be_paired_are_refused(
    kind: type[Any], student: list[kdx.Shape], teacher: list[kdx.Shape], message: str
) -> None:
    with pytest.raises(kdx.PlanError, match=f"{kind.name} .*{message}"):
        make(kind, student, teacher)


def test_feature_losses_keep_the_contract() -> None:
    equal: dict[str, kdx.Shape] = {"student": (4, 6, 6), "teacher": (4, 6, 6)}
    check_loss(MeanSquaredError, shapes=equal, zero_at_equality=True)
    check_loss(MeanSquaredError, shapes={"student": (9, 4), "teacher": (9, 4)}, zero_at_equality=True)
    stages = {"student": [(4, 6, 6), (8, 3, 3)], "teacher": [(3, 6, 6), (5, 7, 7)]}
    check_loss(ActivationBoundaries, shapes=stages, margin=0.5)
    check_loss(Overhaul, shapes=stages)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("regressor", ["conv", "conv1x1"])
def test_hints_keep_the_contract(kind: str, regressor: str) -> None:
    shapes: dict[str, kdx.Shape] = {"student": (4, 6, 6), "teacher": (3, 3, 3)}
    check_loss(Hint, shapes=shapes, distance=kind, regressor=regressor)
