"""Attention transfer, neuron selectivity, channel distributions and flow: golden values and invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.attention import (
    AttentionTransfer,
    ChannelDistillation,
    SelectivityTransfer,
    SolutionFlow,
    attention,
    attention_transfer,
    channel_divergence,
    flow,
    flow_distance,
    selectivity_transfer,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss


def waves(*shape: int) -> tuple[Tensor, Tensor]:
    """sin and cos of 0, 0.1, 0.2, ..."""
    steps = 0.1 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return steps.sin(), steps.cos()


STUDENT, TEACHER = waves(2, 3, 4, 4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: type[Any], student: Any, teacher: Any, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes={"student": student, "teacher": teacher}))


@pytest.mark.parametrize(("form", "golden"), [("code", 0.0131795257), ("paper", 0.4592037527)])
def test_attention_transfer_has_its_golden_value(form: str, golden: float) -> None:
    assert attention_transfer(STUDENT, TEACHER, form=form).mean().item() == pytest.approx(golden, abs=1e-9)


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
    value = make(AttentionTransfer, [(3, 2, 5)], [(10, 4)])([feature], [tokens])
    torch.testing.assert_close(value, attention_transfer(feature, tokens.transpose(1, 2).reshape(2, 4, 2, 5)))
    torch.testing.assert_close(make(AttentionTransfer, [(10, 4)], [(3, 2, 5)])([tokens], [feature]), value)


def test_two_sequences_of_unequal_length_are_compared_along_a_line() -> None:
    long, short = normal(0, 2, 12, 4), normal(1, 2, 6, 3)
    value = make(AttentionTransfer, [(12, 4)], [(6, 3)])([long], [short])
    pooled = long.unflatten(1, (6, 2)).mean(2)
    expected = [tokens.transpose(1, 2)[:, :, None] for tokens in (pooled, short)]
    torch.testing.assert_close(value, attention_transfer(expected[0], expected[1]))


@pytest.mark.parametrize(
    ("kind", "function"), [(AttentionTransfer, attention_transfer), (SelectivityTransfer, selectivity_transfer)]
)
def test_pairs_add_up_and_one_with_a_single_place_adds_nothing(kind: type[Any], function: Any) -> None:
    shapes = [(3, 4, 4), (5, 2, 2), (6, 1, 1)], [(4, 4, 4), (5, 4, 4), (7, 2, 2)]
    loss = make(kind, *shapes)
    student = [normal(i, 2, *shape) for i, shape in enumerate(shapes[0])]
    teacher = [normal(i + 9, 2, *shape) for i, shape in enumerate(shapes[1])]
    values = [function(*pair) for pair in zip(student, teacher, strict=True)]
    assert values[2].abs().max() < 1e-12
    torch.testing.assert_close(loss(student, teacher), values[0] + values[1])
    assert loss.describe() == "compares 2 of 3 pairs; pair 3 has one place and adds 0"


@pytest.mark.parametrize("kind", [AttentionTransfer, SelectivityTransfer])
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([(10, 4)], [(3, 7, 7)], "10 tokens do not lie as a map of 7x7; drop prefix tokens"),
        ([(4,)], [(3, 7, 7)], r"tokens \[N, D\], but student is \[4\]"),
        ([(3, 7, 7)], [(8, 1, 1)], r"teacher \[8, 1, 1\] has only one; tap it before"),
        ([(3, 7, 7)] * 2, [(8, 7, 7)], "there are 2 of the student and 1 of the teacher"),
    ],
)
def test_features_without_comparable_places_are_refused(
    kind: type[Any], student: list[kdx.Shape], teacher: list[kdx.Shape], message: str
) -> None:
    with pytest.raises(kdx.PlanError, match=f"^{kind.name} .*{message}"):
        make(kind, student, teacher)


@pytest.mark.parametrize(("options", "message"), [({"form": "codes"}, "form: found"), ({"p": 0.5}, "p: found 0.5")])
def test_options_of_attention_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=f"^{message}"):
        make(AttentionTransfer, [(3, 4, 4)], [(3, 4, 4)], **options)


def test_selectivity_transfer_has_its_golden_value() -> None:
    assert selectivity_transfer(STUDENT, TEACHER).mean().item() == pytest.approx(0.1356980490, abs=1e-9)


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_selectivity_is_no_matter_of_order_or_size_of_channels(seed: int) -> None:
    student, teacher = normal(seed, 2, 5, 3, 4), normal(seed + 1, 2, 4, 3, 4)
    value = selectivity_transfer(student, teacher)
    assert (value >= 0).all()
    scales = normal(seed + 2, 5).abs()[:, None, None] + 0.1
    torch.testing.assert_close(selectivity_transfer((student * scales).flip(1), teacher), value)
    assert selectivity_transfer(student, student.flip(1)).abs().max() < 1e-12


@pytest.mark.parametrize(("temperature", "golden"), [(1.0, 0.0943865249), (4.0, 0.0972834419)])
def test_channel_divergence_has_its_golden_value(temperature: float, golden: float) -> None:
    value = channel_divergence(STUDENT, TEACHER, torch.tensor(temperature, dtype=torch.float64))
    assert value.mean().item() == pytest.approx(golden, abs=1e-9)


def test_a_constant_per_channel_does_not_change_where_a_channel_is_active() -> None:
    tau, shift = torch.tensor(2.0), normal(0, 2, 3, 1, 1)
    torch.testing.assert_close(
        channel_divergence(STUDENT + shift, TEACHER - shift, tau), channel_divergence(STUDENT, TEACHER, tau)
    )


def test_channels_get_a_connector_only_where_their_number_differs() -> None:
    assert isinstance(make(ChannelDistillation, (3, 4, 4), (3, 2, 2)).connector, nn.Identity)
    assert isinstance(make(ChannelDistillation, (3, 4, 4), (5, 4, 4)).connector, nn.Conv2d)


@pytest.mark.parametrize(("side", "shape"), [("student", (3, 1, 1)), ("teacher", (16, 8))])
def test_channels_without_places_are_refused(side: str, shape: kdx.Shape) -> None:
    shapes: dict[str, Any] = {"student": (3, 4, 4), "teacher": (3, 4, 4), side: shape}
    with pytest.raises(kdx.PlanError, match=rf"^cwd .*{side} is .*as in {side}.depth_50"):
        make(ChannelDistillation, **shapes)


def test_flow_has_its_golden_value() -> None:
    deeper = waves(2, 4, 2, 2)
    value = flow_distance([STUDENT, deeper[0]], [TEACHER, deeper[1]]).mean()
    assert value.item() == pytest.approx(0.2843861586, abs=1e-9)


def test_flow_does_not_see_one_order_of_places_for_all_maps() -> None:
    first, second, order = normal(0, 2, 3, 4, 4), normal(1, 2, 5, 4, 4), torch.randperm(16)
    moved = [feature.flatten(2)[:, :, order].reshape(feature.shape) for feature in (first, second)]
    torch.testing.assert_close(flow(*moved), flow(first, second))


def test_projections_stand_where_channels_differ() -> None:
    loss = make(SolutionFlow, [(3, 4, 4), (5, 2, 2)], [(3, 8, 8), (7, 4, 4)], project=True)
    assert [type(layer) for layer in loss.projections] == [nn.Identity, nn.Conv2d]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([(3, 4, 4), (5, 2, 2)], [(3, 4, 4), (7, 2, 2)], "differ; `project: true` brings the student's"),
        ([(3, 4, 4)], [(3, 4, 4)], r"only \[3, 4, 4\] is given; name two or more"),
        ([(3, 4, 4)] * 2, [(3, 4, 4), (16, 3)], r"teacher has \[3, 4, 4\], \[16, 3\]; tap stages"),
        ([(3, 4, 4)] * 3, [(3, 4, 4)] * 2, "there are 3 of the student and 2 of the teacher"),
    ],
)
def test_flows_that_cannot_be_compared_are_refused(
    student: list[kdx.Shape], teacher: list[kdx.Shape], message: str
) -> None:
    with pytest.raises(kdx.PlanError, match=f"^fsp .*{message}"):
        make(SolutionFlow, student, teacher)


def test_losses_on_maps_keep_the_contract() -> None:
    equal = {"student": [(4, 6, 6), (5, 3, 3)], "teacher": [(4, 6, 6), (5, 3, 3)]}
    unequal = {"student": [(9, 4)], "teacher": [(3, 6, 6)]}
    for form in ("code", "paper"):
        check_loss(AttentionTransfer, shapes=equal, zero_at_equality=True, form=form)
    check_loss(AttentionTransfer, shapes=unequal, p=1.5)
    check_loss(SelectivityTransfer, shapes=equal, zero_at_equality=True)
    check_loss(SelectivityTransfer, shapes=unequal)
    check_loss(SolutionFlow, shapes=equal, zero_at_equality=True)
    check_loss(SolutionFlow, shapes={**equal, "teacher": [(3, 6, 6), (7, 6, 6)]}, project=True)
    check_loss(ChannelDistillation, shapes={"student": (4, 3, 3), "teacher": (4, 3, 3)}, zero_at_equality=True)
    check_loss(ChannelDistillation, shapes={"student": (4, 6, 6), "teacher": (5, 3, 3)}, temperature=1.0)
