"""Teachers that are left out at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kdx_plugins.teacher_dropping import DenseGuidance
from test_plugins_ensemble import TEACHERS

import kdx
from kdx.testing import check_target


def guidance(**options: Any) -> DenseGuidance:
    return DenseGuidance(DenseGuidance.Config(**options), kdx.Given({"logits": [(4,)] * 3}))


def test_each_teacher_stays_as_often_as_it_shall_and_for_all_samples_alike() -> None:
    node = guidance()
    drawn = torch.stack([node(TEACHERS)["weights"] for _ in range(2000)])
    assert drawn.unique().tolist() == [0, 1]
    assert (drawn == drawn[:, :1]).all()
    rows = drawn[:, 0]
    assert rows.mean(0).tolist() == pytest.approx([0.75] * 3, abs=0.04)
    together = (rows[:, 0] * rows[:, 1]).mean().item()
    assert together == pytest.approx(0.75**2, abs=0.04), "one by one, not all at once"


def test_no_teacher_is_left_out_when_all_shall_stay_nor_out_of_training() -> None:
    assert (guidance(survival=1.0)(TEACHERS)["weights"] == 1).all()
    node = guidance(survival=0.1)
    assert (node.eval()(TEACHERS)["weights"] == 1).all()
    with torch.no_grad():
        assert (node.train()(TEACHERS)["weights"] == 1).all()


def test_it_keeps_the_contract_of_a_target() -> None:
    check_target(DenseGuidance, shapes={"logits": [(4,)] * 3})


@pytest.mark.parametrize("survival", [0.0, 1.5])
def test_a_survival_that_is_no_probability_is_refused(survival: float) -> None:
    with pytest.raises(kdx.ConfigError, match=rf"survival: found {survival}, expected a probability above 0, up to 1"):
        guidance(survival=survival)
