"""AM-RADIO, Theia and UNIC: golden values, what they learn and drop, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_inputs import normal, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.agglomeration import (
    Ladder,
    Radio,
    Standard,
    Theia,
    Unic,
    feature_distance,
    keep_teachers,
    kept_terms,
    resize,
    tokens,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

K = torch.arange(4 * 5, dtype=torch.float64).reshape(4, 5)
STUDENT, TEACHER = (0.1 * K).sin(), (0.1 * K).cos()
RADIO_SHAPES: dict[str, Any] = {
    "summary": (6,),
    "spatial": (6, 4, 4),
    "teacher_summaries": [(8,), (5,)],
    "teacher_maps": [(8, 2, 2), (5, 7, 7)],
}
THEIA_SHAPES: dict[str, Any] = {"student": (6, 4, 4), "teacher_maps": [(8, 2, 2), (5, 7, 7)]}
UNIC_SHAPES: dict[str, Any] = {
    "student": [(4, 8, 8), (6, 4, 4)],
    "teacher_summaries": [(8,), (5,)],
    "teacher_maps": [(8, 2, 2), (5, 7, 7)],
}
REFS = {
    "teacher_summaries": ["clip.embedding", "sam.embedding"],
    "teacher_maps": ["clip.depth_100", "sam.depth_100"],
}


def make(kind: type[Any], shapes: dict[str, Any], refs: dict[str, Any] | None = None, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.Config(**options), kdx.Given(shapes=shapes, refs=refs or {}))


def inputs(shapes: dict[str, Any], batch: int = 3) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        several = isinstance(shape, list)
        one = [normal(10 * seed + i, batch, *s).float() for i, s in enumerate(shape if several else [shape])]
        made[name] = one if several else one[0]
    return made


def test_the_mixed_distances_have_their_golden_values() -> None:
    assert feature_distance(STUDENT, TEACHER, 0.5).mean().item() == pytest.approx(0.3882609570, abs=1e-9)
    assert feature_distance(STUDENT, TEACHER, 0.9).mean().item() == pytest.approx(0.4738195265, abs=1e-9)


def test_the_distance_is_that_of_each_vector_and_zero_for_equal_ones() -> None:
    student, teacher = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert feature_distance(student, teacher, 1).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert feature_distance(student, teacher, 0.5).tolist() == pytest.approx([0.5 + 0.5 * 3.0, 0.0], abs=1e-6)


def test_resizing_keeps_constant_maps_and_the_order_of_tokens() -> None:
    maps = torch.arange(3.0).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(resize(maps, torch.zeros(2, 1, 7, 5)), maps[:, :, :1, :1].expand(2, 3, 7, 5))
    assert resize(maps, maps) is maps
    grid = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert tokens(grid)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_standard_features_have_mean_0_and_variance_1_over_all_that_was_seen() -> None:
    """Divided by the standard deviation, not by the variance."""
    standard, features = Standard(3), 5 * normal(0, 40, 3, 4, 4).float() + 2
    for part in (features[:10], features[10:15], features[15:]):
        standard.add(part)
    flat = standard(features).transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.var(1, correction=0), torch.ones(3))


def test_statistics_follow_by_the_rate_and_a_constant_channel_gives_zero() -> None:
    standard, features = Standard(2), torch.tensor([[1.0, 3.0], [5.0, 3.0]])
    standard.follow(features, torch.tensor(0.25))
    assert standard.mean.tolist() == [0.75, 0.75]
    assert standard.variance.tolist() == [0.75 + 0.25 * 4, 0.75]
    standard.follow(features, torch.tensor(1.0))
    assert standard(features).tolist() == [[-1, 0], [1, 0]]


def test_radio_adds_summary_and_spatial_terms_of_all_teachers() -> None:
    loss, tensors = make(Radio, RADIO_SHAPES), inputs(RADIO_SHAPES)
    expected = torch.zeros(3)
    for place in range(2):
        ours = loss.summary_heads[place](tensors["summary"])
        expected += 1 - torch.cosine_similarity(ours, tensors["teacher_summaries"][place])
        theirs = tensors["teacher_maps"][place]
        for b in range(3):
            grid = nn.functional.interpolate(tensors["spatial"][b : b + 1], theirs.shape[2:], mode="bilinear")[0]
            terms = []
            for i in range(theirs.shape[2]):
                for j in range(theirs.shape[3]):
                    made, wanted = loss.spatial_heads[place](grid[:, i, j]), theirs[b, :, i, j]
                    smooth = nn.functional.smooth_l1_loss(made, wanted)
                    terms.append(0.9 * (1 - torch.cosine_similarity(made, wanted, dim=0)) + 0.1 * smooth)
            expected[b] += torch.stack(terms).mean()
    torch.testing.assert_close(loss(**tensors), expected)


def test_a_teacher_of_radio_can_be_weighed_by_name_and_left_out() -> None:
    tensors = inputs(RADIO_SHAPES)
    left_out = {"sam": 0.0}
    loss = make(Radio, RADIO_SHAPES, REFS, summary_weights=left_out, spatial_weights={"clip": 2.0, **left_out})
    assert [len(list(head.parameters())) for head in (*loss.summary_heads, *loss.spatial_heads)] == [6, 0, 6, 0]
    by_summary = feature_distance(loss.summary_heads[0](tensors["summary"]), tensors["teacher_summaries"][0], 1)
    grid = tokens(resize(tensors["spatial"], tensors["teacher_maps"][0]))
    by_map = feature_distance(loss.spatial_heads[0](grid), tokens(tensors["teacher_maps"][0]), 0.9).mean(1)
    torch.testing.assert_close(loss(**tensors), by_summary + 2 * by_map)


def test_radio_is_zero_where_the_heads_give_the_features_of_the_teachers() -> None:
    loss, tensors = make(Radio, RADIO_SHAPES), inputs(RADIO_SHAPES)
    tensors["teacher_summaries"] = [head(tensors["summary"]) for head in loss.summary_heads]
    tensors["teacher_maps"] = [
        head(tokens(resize(tensors["spatial"], maps))).transpose(1, 2).unflatten(2, maps.shape[2:])
        for head, maps in zip(loss.spatial_heads, tensors["teacher_maps"], strict=True)
    ]
    assert loss(**tensors).abs().max() < 1e-5


def test_theia_is_zero_where_the_translators_give_the_standardised_maps() -> None:
    loss, tensors = make(Theia, THEIA_SHAPES), inputs(THEIA_SHAPES)
    loss.calibrate(**tensors)
    assert (loss(**tensors) > 0.1).all()
    for translator, standard, maps in zip(loss.translators, loss.standards, tensors["teacher_maps"], strict=True):
        made = translator(resize(tensors["student"], maps))
        deviation, mean = standard.variance.sqrt().reshape(-1, 1, 1), standard.mean.reshape(-1, 1, 1)
        maps.copy_(made.detach() * deviation + mean)
    assert loss(**tensors).abs().max() < 1e-4


def test_theia_flattens_the_map_for_the_cosine_and_averages_over_teachers() -> None:
    loss, tensors = make(Theia, THEIA_SHAPES), inputs(THEIA_SHAPES)
    values = []
    for translator, theirs in zip(loss.translators, tensors["teacher_maps"], strict=True):
        made = translator(resize(tensors["student"], theirs))
        cosine = torch.stack(
            [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(made, theirs, strict=True)]
        )
        smooth = nn.functional.smooth_l1_loss(made, theirs, reduction="none").mean((1, 2, 3))
        values.append(0.9 * (1 - cosine) + 0.1 * smooth)
    torch.testing.assert_close(loss(**tensors), (values[0] + values[1]) / 2)


def test_the_ladder_is_the_sum_over_depths() -> None:
    ladder = Ladder([4, 6], 5, [1, 4])
    assert [adapter[0].out_features for adapter in ladder.adapters] == [4, 24]
    low, high = normal(0, 3, 4).float(), normal(1, 3, 6).float()
    torch.testing.assert_close(ladder([low, high]), ladder.adapters[0](low) + ladder.adapters[1](high))


@settings(deadline=None)
@given(seed=st.integers(0, 1000), chance=st.floats(0, 1))
def test_the_largest_term_of_each_sample_is_always_kept(seed: int, chance: float) -> None:
    values, draw = normal(seed, 5, 3), torch.rand(5, 3, generator=torch.Generator().manual_seed(seed))
    kept = keep_teachers(values, draw, number(chance))
    largest = values == values.amax(1, keepdim=True)
    assert torch.equal(kept, largest | (draw >= chance))
    order = [2, 0, 1]
    assert torch.equal(keep_teachers(values[:, order], draw[:, order], number(chance)), kept[:, order])


def test_other_terms_are_dropped_as_often_as_the_chance_says() -> None:
    values = torch.tensor([[2.0, 1.0, 0.0]]).expand(4000, 3)
    draw = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    share = keep_teachers(values, draw, torch.tensor(0.3)).float().mean(0)
    assert share.tolist() == pytest.approx([1.0, 0.7, 0.7], abs=0.03)


def test_kept_terms_are_averaged_over_the_batch_or_sample_by_sample() -> None:
    values = torch.tensor([[4.0, 2.0], [1.0, 3.0]])
    kept = torch.tensor([[True, True], [False, True]])
    assert kept_terms(values, kept).mean().item() == pytest.approx((4 + 2 + 3) / 3)
    assert kept_terms(values, kept, per_sample=True).tolist() == [3.0, 3.0]


def unic(loss: Any, tensors: dict[str, Any], drop: float = 0.0, rate: float = 0.0) -> Tensor:
    found: Tensor = loss(**tensors, drop=torch.tensor(drop), rate=torch.tensor(rate))
    return found


def test_unic_is_the_mean_of_summary_and_patch_terms_of_standardised_features() -> None:
    loss, tensors = make(Unic, UNIC_SHAPES), inputs(UNIC_SHAPES)
    loss.calibrate(**tensors)
    values = []
    for place, (summary, maps) in enumerate(zip(tensors["teacher_summaries"], tensors["teacher_maps"], strict=True)):
        low, high = tensors["student"]
        made = loss.summary_ladders[place]([low.mean((2, 3)), high.mean((2, 3))])
        wanted = (summary - summary.mean(0)) / summary.std(0, correction=0)
        by_summary = feature_distance(made, wanted, 0.5)
        grid = loss.patch_ladders[place]([tokens(resize(low, maps)), tokens(resize(high, maps))])
        centred = maps - maps.mean((0, 2, 3), keepdim=True)
        wanted = tokens(centred / maps.std((0, 2, 3), correction=0, keepdim=True))
        values.append((by_summary + feature_distance(grid, wanted, 0.5).mean(1)) / 2)
    torch.testing.assert_close(unic(loss, tensors), (values[0] + values[1]) / 2, rtol=1e-4, atol=1e-5)
    largest = torch.stack(values).amax(0)
    torch.testing.assert_close(unic(loss, tensors, drop=1.0), largest, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_teachers_does_not_change_unic() -> None:
    loss, turned = make(Unic, UNIC_SHAPES), make(Unic, UNIC_SHAPES | {
        name: UNIC_SHAPES[name][::-1] for name in ("teacher_summaries", "teacher_maps")
    })  # fmt: skip
    for name in ("summary_ladders", "patch_ladders"):
        for ours, theirs in zip(getattr(turned, name), reversed(getattr(loss, name)), strict=True):
            ours.load_state_dict(theirs.state_dict())
    tensors = inputs(UNIC_SHAPES)
    other = tensors | {name: tensors[name][::-1] for name in ("teacher_summaries", "teacher_maps")}
    for drop in (0.0, 1.0):
        torch.testing.assert_close(unic(turned, other, drop), unic(loss, tensors, drop))


def test_the_statistics_of_unic_move_in_training_by_the_rate_and_rest_in_evaluation() -> None:
    loss, tensors = make(Unic, UNIC_SHAPES), inputs(UNIC_SHAPES)
    unic(loss, tensors, rate=1.0)
    torch.testing.assert_close(loss.summary_standards[1].mean, tensors["teacher_summaries"][1].mean(0))
    before = loss.patch_standards[0].mean.clone()
    unic(loss.eval(), {**tensors, "teacher_maps": [maps + 1 for maps in tensors["teacher_maps"]]}, rate=1.0)
    assert torch.equal(loss.patch_standards[0].mean, before)


def test_what_is_dropped_follows_the_generator_of_the_node() -> None:
    loss, tensors = make(Unic, UNIC_SHAPES), inputs(UNIC_SHAPES, batch=16)
    state = loss.given.generator.get_state()
    first, second = unic(loss, tensors, 0.5), unic(loss, tensors, 0.5)
    assert not torch.equal(first, second)
    loss.given.generator.set_state(state)
    assert torch.equal(unic(loss, tensors, 0.5), first)


@pytest.mark.parametrize(
    ("kind", "change", "options", "message"),
    [
        (Radio, {"spatial": (6,)}, {}, r"am_radio reads maps \[C, H, W\], but that of spatial is \[6\]"),
        (Radio, {"summary": (6, 2)}, {}, r"am_radio reads summaries \[D\], but that of summary is \[6, 2\]"),
        (Radio, {"teacher_maps": [(8, 2, 2), (5, 7)]}, {}, r"that of sam is \[5, 7\]"),
        (
            Radio,
            {},
            {"summary_weights": {"dino": 1.0}},
            r"summary_weights.dino: there is no such teacher, only clip, sam",
        ),
        (Radio, {}, {"spatial_weights": {"sam": -1.0}}, r"spatial_weights.sam: found -1.0, expected a number from 0"),
        (Radio, {}, {"hidden": 0}, "hidden: found 0, expected a whole number from 1"),
        (Theia, {"student": (6,)}, {}, r"theia reads maps \[C, H, W\], but that of student is \[6\]"),
        (Unic, {"student": [(4, 8, 8), (6,)]}, {}, r"unic reads maps \[C, H, W\], but that of student is \[6\]"),
        (Unic, {}, {"last_width": 0}, "last_width: found 0, expected a whole number from 1"),
    ],
)
def test_what_cannot_be_gathered_is_refused(
    kind: type[Any], change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    shapes = {Radio: RADIO_SHAPES, Theia: THEIA_SHAPES, Unic: UNIC_SHAPES}[kind]
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        make(kind, shapes | change, REFS, **options)


def test_summaries_and_maps_must_be_of_the_same_teachers() -> None:
    refs = {**REFS, "teacher_maps": ["sam.depth_100", "clip.depth_100"]}
    with pytest.raises(kdx.PlanError, match=r"summaries of clip, sam and maps of sam, clip; name the same teachers"):
        make(Radio, RADIO_SHAPES, refs)


def test_radio_without_any_weight_is_refused() -> None:
    nothing = {"clip": 0.0, "sam": 0.0}
    with pytest.raises(kdx.ConfigError, match="all are 0, so nothing would be learnt"):
        make(Radio, RADIO_SHAPES, REFS, summary_weights=nothing, spatial_weights=nothing)


def test_the_losses_keep_the_contract() -> None:
    check_loss(Radio, shapes=RADIO_SHAPES, hidden=7)
    check_loss(make(Radio, RADIO_SHAPES, REFS, summary_weights={"sam": 0.0}), shapes=RADIO_SHAPES)
    check_loss(Theia, shapes=THEIA_SHAPES)
    check_loss(Unic, shapes=UNIC_SHAPES, order_matters=True)
    check_loss(Unic, shapes=UNIC_SHAPES, drop=0.0, rate=1.0, per_sample=True)
