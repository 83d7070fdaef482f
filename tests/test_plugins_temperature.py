"""A temperature per sample from entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.logit import soft_targets
from kdx_plugins.temperature import EntropyTemperature, entropy_temperature

import kdx
from kdx.testing import check_target

LOW, HIGH = torch.tensor(1.0), torch.tensor(4.0)


def test_a_sure_answer_gets_the_high_temperature_and_an_even_one_the_low_one() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [2.0, 2.0, 2.0]])
    torch.testing.assert_close(entropy_temperature(logits, LOW, HIGH), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(entropy_temperature(logits, LOW, HIGH, reverse=True), torch.tensor([1.0, 4.0]))


def test_the_value_of_a_coin_among_four_classes_is_half_way() -> None:
    logits = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).log()
    logits[:, 2:] = -1e4  # two of four classes: entropy log 2, half of log 4
    value = entropy_temperature(logits, LOW.double(), HIGH.double())
    assert value.item() == pytest.approx(1 + 3 * (1 - math.log(2) / math.log(4)), abs=1e-9)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0, 100), shift=st.floats(-10, 10))
def test_it_stays_between_its_knobs_and_ignores_a_shift(seed: int, scale: float, shift: float) -> None:
    logits = scale * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = entropy_temperature(logits, LOW, HIGH)
    assert ((value >= 1) & (value <= 4)).all()
    torch.testing.assert_close(entropy_temperature(logits + shift, LOW, HIGH), value)
    both = value + entropy_temperature(logits, LOW, HIGH, reverse=True)
    torch.testing.assert_close(both, torch.full_like(both, 5.0))


def test_it_serves_as_the_knob_of_soft_targets() -> None:
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    tau = EntropyTemperature(EntropyTemperature.Config(), kdx.Given(shapes={"logits": (4,)}))(teacher, LOW, HIGH)
    values = soft_targets(student, teacher, tau)
    alone = [soft_targets(student[i : i + 1], teacher[i : i + 1], tau[i]) for i in range(5)]
    torch.testing.assert_close(values, torch.cat(alone))


@pytest.mark.parametrize("shape", [(1,), (4, 2, 2), ()])
def test_logits_without_a_choice_of_classes_are_refused(shape: kdx.Shape) -> None:
    with pytest.raises(kdx.PlanError, match=r"expected \[K\] with K >= 2 classes"):
        EntropyTemperature(EntropyTemperature.Config(), kdx.Given(shapes={"logits": shape}))


def test_it_keeps_the_contract() -> None:
    check_target(EntropyTemperature)
    check_target(EntropyTemperature, reverse=True, low=2.0)
