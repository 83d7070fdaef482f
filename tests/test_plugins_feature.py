"""Feature regression, hints and attention transfer: golden values, shapes and invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.feature import (
    DISTANCES,
    AttentionTransfer,
    Hint,
    MeanSquaredError,
    attention,
    attention_transfer,
    distance,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

K = torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
STUDENT, TEACHER = (0.1 * K).sin(), (0.1 * K).cos()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: type[Any], student: kdx.Shape, teacher: kdx.Shape, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes={"student": student, "teacher": teacher}))


def test_mean_squared_error_has_its_golden_value_and_one_per_sample() -> None:
    values = distance(STUDENT, TEACHER)
    assert values.mean().item() == pytest.approx(0.9986330507, abs=1e-9)
    torch.testing.assert_close(values[1], (STUDENT[1] - TEACHER[1]).square().mean())


@pytest.mark.parametrize(("form", "golden"), [("code", 0.0131795257), ("paper", 0.4592037527)])
def test_attention_transfer_has_its_golden_value(form: str, golden: float) -> None:
    assert attention_transfer(STUDENT, TEACHER, form=form).mean().item() == pytest.approx(golden, abs=1e-9)


def test_the_distances_are_what_their_names_say() -> None:
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[0.0, 4.0], [1.5, 1.0]])
    expected = {"l2": [12.5, 0.125], "l1": [3.5, 0.25], "smooth_l1": [3.0, 0.0625]}
    for kind, values in expected.items():
        assert distance(student, teacher, kind).tolist() == pytest.approx(values)
    cosine = distance(student, teacher, "cosine")
    assert cosine.tolist() == pytest.approx([1.0, 1 - 2.5 / (2**0.5 * 3.25**0.5)], abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_attention_ignores_a_factor_and_the_order_of_channels(seed: int, scale: float) -> None:
    student, teacher = normal(seed, 2, 5, 3, 4), normal(seed + 1, 2, 4, 3, 4)
    value = attention_transfer(student, teacher)
    torch.testing.assert_close(attention_transfer(student * scale, teacher), value)
    torch.testing.assert_close(attention_transfer(student.flip(1), teacher / scale), value)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), power=st.floats(1, 4))
def test_attention_has_length_one_so_its_distance_is_bounded(seed: int, power: float) -> None:
    maps = normal(seed, 3, 4, 5, 2), normal(seed + 1, 3, 4, 5, 2)
    for feature in maps:
        torch.testing.assert_close(attention(feature, power).norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert (attention_transfer(*maps, form="paper", power=power).square() <= 2).all()


def test_the_larger_map_is_pooled_before_the_power() -> None:
    large, small = normal(0, 2, 3, 8, 6), normal(1, 2, 5, 4, 3)
    pooled = large.unflatten(2, (4, 2)).unflatten(4, (3, 2)).mean((3, 5))
    torch.testing.assert_close(attention_transfer(large, small), attention_transfer(pooled, small))
    torch.testing.assert_close(attention_transfer(small, large), attention_transfer(small, pooled))


def test_tokens_lie_as_the_map_that_they_are_compared_with() -> None:
    feature, tokens = normal(0, 2, 3, 2, 5), normal(1, 2, 10, 4)
    value = make(AttentionTransfer, (3, 2, 5), (10, 4))(feature, tokens)
    torch.testing.assert_close(value, attention_transfer(feature, tokens.transpose(1, 2).reshape(2, 4, 2, 5)))
    torch.testing.assert_close(make(AttentionTransfer, (10, 4), (3, 2, 5))(tokens, feature), value)


def test_two_sequences_of_unequal_length_are_compared_along_a_line() -> None:
    long, short = normal(0, 2, 12, 4), normal(1, 2, 6, 3)
    value = make(AttentionTransfer, (12, 4), (6, 3))(long, short)
    pooled = long.unflatten(1, (6, 2)).mean(2)
    expected = [tokens.transpose(1, 2)[:, :, None] for tokens in (pooled, short)]
    torch.testing.assert_close(value, attention_transfer(expected[0], expected[1]))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((10, 4), (3, 7, 7), "10 tokens do not lie as a map of 7x7; drop prefix tokens"),
        ((4,), (3, 7, 7), r"tokens \[N, D\], but student is \[4\]"),
        ((3, 7, 7), (8, 1, 1), r"teacher \[8, 1, 1\] has only one; tap it before"),
    ],
)
def test_attention_without_places_is_refused(student: kdx.Shape, teacher: kdx.Shape, message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        make(AttentionTransfer, student, teacher)


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
    hint = make(Hint, student, teacher)
    layer = hint.regressor[0]
    assert isinstance(layer, nn.ConvTranspose2d) == (student[1] < teacher[1])
    assert (layer.kernel_size, layer.stride) == (kernel, stride)
    assert isinstance(hint.regressor[-1], nn.ReLU)
    assert hint.regressor(torch.randn(2, *student)).shape == (2, *teacher)


def test_a_regressor_that_gives_the_teachers_map_has_the_value_zero() -> None:
    hint = make(Hint, (4, 3, 3), (4, 3, 3), relu=False).eval()
    with torch.no_grad():
        hint.regressor[0].weight.copy_(torch.eye(4)[:, :, None, None])
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert hint(x, hint.regressor(x)).abs().max() == 0
    assert hint(x, x).abs().max() < 1e-8  # batch norm divides by sqrt(1 + 1e-5)


def test_the_point_wise_regressor_pools_whichever_map_is_larger_and_keeps_signs() -> None:
    for student, teacher in (((3, 8, 8), (5, 3, 3)), ((3, 3, 3), (5, 8, 8))):
        hint = make(Hint, student, teacher, regressor="conv1x1")
        assert not isinstance(hint.regressor[-1], nn.ReLU)
        assert hint(torch.randn(2, *student), torch.randn(2, *teacher)).shape == (2,)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((3, 5, 5), (5, 8, 8), {}, r"cannot take \[3, 5, 5\] to \[5, 8, 8\].*`regressor: conv1x1` can"),
        ((9, 4), (5, 3, 3), {}, r"student is \[9, 4\].*use the loss mse after an aligner"),
        ((3, 4, 4), (5, 4, 4), {"distance": "l3"}, "distance: found 'l3', expected one of l2, l1, smooth_l1, cosine"),
        ((3, 4, 4), (5, 4, 4), {"regressor": "mlp"}, "regressor: found 'mlp', expected one of conv, conv1x1"),
    ],
)
def test_hints_that_cannot_be_regressed_are_refused(
    student: kdx.Shape, teacher: kdx.Shape, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        make(Hint, student, teacher, **options)


@pytest.mark.parametrize(("options", "message"), [({"form": "codes"}, "form: found"), ({"p": 0.5}, "p: found 0.5")])
def test_options_of_attention_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=f"^{message}"):
        make(AttentionTransfer, (3, 4, 4), (3, 4, 4), **options)


def test_feature_losses_keep_the_contract() -> None:
    equal: dict[str, kdx.Shape] = {"student": (4, 6, 6), "teacher": (4, 6, 6)}
    check_loss(MeanSquaredError, shapes=equal, zero_at_equality=True)
    check_loss(MeanSquaredError, shapes={"student": (9, 4), "teacher": (9, 4)}, zero_at_equality=True)
    for form in ("code", "paper"):
        check_loss(AttentionTransfer, shapes=equal, zero_at_equality=True, form=form)
    check_loss(AttentionTransfer, shapes={"student": (9, 4), "teacher": (3, 6, 6)}, p=1.5)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("regressor", ["conv", "conv1x1"])
def test_hints_keep_the_contract(kind: str, regressor: str) -> None:
    shapes: dict[str, kdx.Shape] = {"student": (4, 6, 6), "teacher": (3, 3, 3)}
    check_loss(Hint, shapes=shapes, distance=kind, regressor=regressor)
