"""One-for-all distillation: golden values, heads for maps and for tokens, and samples without a label."""

from __future__ import annotations

import pytest
import torch
from golden_inputs import LABEL, STUDENT, TEACHER, number
from kdx_plugins.cross_architecture import Merge, OneForAll, TokenHead, adaptive_target, conv_head
from torch import nn

import kdx
from kdx.testing import check_loss


def made(inner: list[kdx.Shape], **options: object) -> OneForAll:
    given = kdx.Given({"student": (4,), "teacher": (4,), "label": (), "inner": inner})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OneForAll(OneForAll.Config(**options), given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("power", "golden"), [(1.5, 0.9729174877), (1.0, 0.9636660727)])
def test_the_adaptive_target_has_its_golden_value(power: float, golden: float) -> None:
    value = adaptive_target(STUDENT, TEACHER, LABEL, number(1.0), number(power))
    assert value.mean().item() == pytest.approx(golden, abs=1e-9)


def test_with_the_power_one_it_is_the_cross_entropy_with_the_teacher_whatever_the_label() -> None:
    expected = -((TEACHER / 3).softmax(1) * (STUDENT / 3).log_softmax(1)).sum(1)
    for label in (LABEL, torch.tensor([3, 3, 3]), torch.full((3,), -1)):
        torch.testing.assert_close(adaptive_target(STUDENT, TEACHER, label, number(3.0)), expected)


def test_a_sample_without_a_label_has_the_power_one() -> None:
    label = torch.tensor([0, -1, 2])
    value = adaptive_target(STUDENT, TEACHER, label, number(1.0), number(1.5))
    plain = adaptive_target(STUDENT, TEACHER, LABEL, number(1.0))
    raised = adaptive_target(STUDENT, TEACHER, LABEL, number(1.0), number(1.5))
    torch.testing.assert_close(value, torch.stack([raised[0], plain[1], raised[2]]))


def test_the_value_is_that_of_the_logits_and_of_each_head() -> None:
    shapes: list[kdx.Shape] = [(4, 8, 8), (8, 4, 4)]
    loss = made(shapes).double()
    inner = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double() for shape in shapes]
    one, half = number(1.0), number(0.5)
    value = loss(STUDENT, TEACHER, LABEL, inner, one, one, half, number(2.0))
    heads = [adaptive_target(head(x), TEACHER, LABEL, one) for head, x in zip(loss.heads, inner, strict=True)]
    expected = 0.5 * adaptive_target(STUDENT, TEACHER, LABEL, one) + 2 * (heads[0] + heads[1])
    torch.testing.assert_close(value, expected)


def test_a_convolutional_head_has_a_block_for_each_stage_that_follows() -> None:
    first, last = conv_head((8, 16, 16), 40, 5, 3), conv_head((40, 2, 2), 40, 5, 0)
    assert isinstance(first, nn.Sequential)
    assert isinstance(last, nn.Sequential)
    maps = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = []
    for layer in first[:3]:
        maps = layer(maps)
        sizes.append(tuple(maps.shape[1:]))
    assert sizes == [(16, 8, 8), (32, 4, 4), (40, 2, 2)]
    assert first[3:](maps).shape == (2, 5)
    assert isinstance(last[0], nn.Conv2d)
    assert last[0].kernel_size == (1, 1)


def test_heads_follow_the_layout_of_the_student() -> None:
    assert made([(8, 8, 8), (16, 4, 4)]).describe() == "convolutional heads"
    for plain in ([(8, 7, 7), (8, 7, 7)], [(50, 8), (50, 8)]):
        loss = made(plain)  # type: ignore[arg-type]
        assert loss.describe() == "heads of transformer blocks"
        assert all(isinstance(head, TokenHead) for head in loss.heads)
    assert not made([(8, 8, 8), (16, 4, 4)], head="tokens").is_conv
    assert made([(8, 7, 7), (8, 7, 7)], head="conv").is_conv


def test_merging_joins_neighbours_of_the_grid() -> None:
    merge = Merge(2, 4, 1)
    merge.layers = nn.Sequential(nn.Identity())
    merged = merge(torch.arange(8.0).reshape(1, 8, 1))
    assert merged.sort(dim=2).values.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


def test_a_token_head_merges_down_to_seven_and_answers_with_its_first_token() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = TokenHead((1 + 28 * 28, 12), 8, 5, 2)
        without = TokenHead((8, 14, 14), 8, 5, 0)
    assert (head.before, len(head.merges), len(head.blocks)) == (1, 2, 2)
    assert (without.before, len(without.merges), len(without.blocks)) == (0, 1, 1)
    assert isinstance(without.project, nn.Identity)
    tokens = torch.randn(2, 785, 12, generator=torch.Generator().manual_seed(0))
    assert head(tokens).shape == (2, 5)
    maps = torch.randn(2, 8, 14, 14, generator=torch.Generator().manual_seed(0))
    head.blocks, without.blocks = nn.Sequential(), nn.Sequential()
    torch.testing.assert_close(head(tokens), head.answer(head.project(tokens[:, 0])))
    merged = without.merges[0](maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(without(maps), without.answer(merged.mean(1)))


@pytest.mark.parametrize(
    ("inner", "options", "error", "message"),
    [
        ([(4, 8, 8)], {"head": "mlp"}, kdx.ConfigError, "head: found 'mlp', expected one of auto, conv, tokens"),
        ([(4, 8, 8)], {"width": 0}, kdx.ConfigError, "width: found 0, expected at least 1"),
        ([(17, 8)], {"head": "conv"}, kdx.PlanError, r"heads on maps \[C, H, W\], but one of inner is \[17, 8\]"),
        ([(8,)], {}, kdx.PlanError, r"maps \[C, H, W\] or tokens \[N, D\], but one of inner is \[8\]"),
        ([(17, 10)], {}, kdx.PlanError, "a width of 10 does not divide by 4 attention heads"),
    ],
)
def test_what_does_not_fit_is_refused(
    inner: list[kdx.Shape], options: dict[str, object], error: type[kdx.KdxError], message: str
) -> None:
    with pytest.raises(error, match=message):
        made(inner, **options)


def test_the_loss_keeps_the_contract() -> None:
    check_loss(OneForAll, shapes={"inner": [(4, 8, 8), (8, 4, 4), (8, 2, 2)]})
    check_loss(OneForAll, shapes={"inner": [(4, 14, 14), (4, 14, 14)]}, power=1.5)
    check_loss(OneForAll, shapes={"inner": [(17, 8), (17, 16)]}, temperature=2.0)
