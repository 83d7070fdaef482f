"""What methods need again and again: pooling of pairs, means over labelled samples, and refusals in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdx


def test_the_larger_map_is_pooled_side_by_side_and_an_equal_one_left_alone() -> None:
    wide, high = torch.rand(2, 3, 2, 6), torch.rand(2, 5, 4, 3)
    a, b = kdx.pool_to_smaller(wide, high)
    assert a.shape == (2, 3, 2, 3)
    assert b.shape == (2, 5, 2, 3)
    torch.testing.assert_close(a, wide.unflatten(3, (3, 2)).mean(4))
    torch.testing.assert_close(b, high.unflatten(2, (2, 2)).mean(3))
    same, other = kdx.pool_to_smaller(wide, wide)
    assert same is wide
    assert other is wide


def test_the_mean_over_the_labelled_is_that_of_all_values() -> None:
    values = torch.tensor([1.0, 100.0, 3.0, 5.0])
    found = kdx.over_labelled(values, torch.tensor([0, -1, 2, 1]))
    assert found[1] == 0
    assert found.mean() == pytest.approx(3.0)
    assert kdx.over_labelled(values, torch.full((4,), -1)).tolist() == [0.0] * 4


@pytest.mark.parametrize("shape", [(1,), (4, 7, 7), ()])
def test_what_is_no_logits_of_classes_is_refused(shape: kdx.Shape) -> None:
    kdx.check_classes("mine", kdx.Given({"student": (2,)}), "student")
    with pytest.raises(kdx.PlanError, match=r"^mine needs logits of at least two classes \[K\], but student is \["):
        kdx.check_classes("mine", kdx.Given({"student": shape}), "student")


def test_a_word_that_is_no_choice_is_refused_with_the_choices() -> None:
    kdx.check_choice("form", "code", ("code", "paper"))
    with pytest.raises(kdx.ConfigError, match=r"^form: found 'cod', expected one of code, paper$"):
        kdx.check_choice("form", "cod", ("code", "paper"))


def test_stages_give_their_outputs_and_nothing_runs_after_the_last_that_is_asked_for() -> None:
    ran: list[int] = []

    def stage(number: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            ran.append(number)
            return 10 * x + number

        return run

    stages = [stage(1), stage(2), stage(3)]
    last, maps = kdx.through_stages(torch.zeros(()), stages, stop_early=True)
    assert (last.item(), [x.item() for x in maps]) == (123, [1, 12, 123])
    ran.clear()
    last, maps = kdx.through_stages(torch.zeros(()), stages, [1, 0], stop_early=True)
    assert (last.item(), [x.item() for x in maps], ran) == (12, [1, 12], [1, 2])
    assert kdx.through_stages(torch.zeros(()), stages, [0], stop_early=False)[0].item() == 123
