"""Cross-entropy with missing labels, and the plain updater."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kdx import fused
from kdx.builtin.losses import CrossEntropy, cross_entropy
from kdx.builtin.updaters import Plain
from kdx.components import Given
from kdx.errors import ConfigError, PlanError
from kdx.runtime import Runtime
from kdx.sections import RuntimeOptions
from kdx.testing import check_loss
from kdx.types import Losses

LOGITS = torch.tensor(
    [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, -0.5, 1.0], [1.0, -1.0, 2.0, 0.0]], dtype=torch.float64
)  # fmt: skip
LABEL = torch.tensor([0, 1, 2])


def test_cross_entropy_has_its_golden_value() -> None:
    assert cross_entropy(LOGITS, LABEL).item() == pytest.approx(0.7225726896, abs=1e-9)


def test_cross_entropy_keeps_the_contract() -> None:
    check_loss(CrossEntropy)
    check_loss(CrossEntropy, label_smoothing=0.1)


def test_samples_without_a_label_do_not_count() -> None:
    some = cross_entropy(LOGITS, torch.tensor([0, -1, 2]))
    torch.testing.assert_close(some, cross_entropy(LOGITS[[0, 2]], LABEL[[0, 2]]))


def test_a_batch_without_any_label_gives_zero_with_a_graph() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = CrossEntropy(CrossEntropy.Config(label_smoothing=0.1), Given())(logits, torch.tensor([-1, -1, -1]))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_smoothing_mixes_the_label_with_the_even_distribution() -> None:
    even = -LOGITS.log_softmax(1).mean()
    expected = 0.8 * cross_entropy(LOGITS, LABEL) + 0.2 * even
    torch.testing.assert_close(cross_entropy(LOGITS, LABEL, label_smoothing=0.2), expected)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_out_of_range_is_refused_by_name(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"^label_smoothing: found"):
        CrossEntropy(CrossEntropy.Config(label_smoothing=smoothing), Given())


@pytest.mark.parametrize("positions", [(), (3,)])
def test_a_distribution_in_place_of_a_class_is_refused(positions: tuple[int, ...]) -> None:
    given = Given(shapes={"student": (4, *positions), "label": (4, *positions)}, refs={"label": "big.logits"})
    with pytest.raises(PlanError, match=r"a class for each sample but got big\.logits \[4.*`kd`"):
        CrossEntropy(CrossEntropy.Config(), given)


def test_the_mean_over_positions_is_that_of_torch_for_many_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MIDDLE", 0)
    logits, label = LOGITS.reshape(1, 3, 4), torch.tensor([[0, 1, 2, 0]])
    found = cross_entropy(logits, label, labelled=True)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, label))


class Bench(Runtime):
    """The engine of a run, with one weight and plain SGD."""

    def __init__(self) -> None:
        super().__init__(RuntimeOptions(device="cpu", precision="fp32"))
        learner = nn.ParameterDict({"weight": nn.Parameter(torch.tensor(2.0))})
        self.weight = learner["weight"]
        self.prepare(learner, torch.optim.SGD([self.weight], lr=0.1), None)


def test_two_micro_batches_of_the_plain_updater_equal_one_whole_batch() -> None:
    whole, parts = Bench(), Bench()
    updater = Plain(Plain.Config())
    updater.backward(Losses((whole.weight * torch.tensor([1.0, 3.0])).mean(), {}), 1.0, whole)
    updater.step(whole)
    for value in (1.0, 3.0):
        updater.backward(Losses(parts.weight * value, {}), 0.5, parts)
    updater.step(parts)
    assert whole.weight.item() == pytest.approx(2.0 - 0.1 * 2.0)
    assert parts.weight.item() == whole.weight.item()
