"""Factors and denoising: golden values, where gradients go, and closed forms of the diffusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kdx_plugins.coding import DiffusionDenoising, FactorTransfer, factor_distance
from torch import Tensor

import kdx
from kdx.testing import check_loss

STEPS = 0.1 * torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
MAPS: dict[str, kdx.Shape] = {"student": (4, 6, 6), "teacher": (8, 3, 3)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: type[Any], student: Any, teacher: Any, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes={"student": student, "teacher": teacher}))


@pytest.mark.parametrize(("form", "golden"), [("code", 0.1035229366), ("paper", 0.1840163990)])
def test_the_distance_of_factors_has_its_golden_value(form: str, golden: float) -> None:
    assert factor_distance(STEPS.sin(), STEPS.cos(), form).mean().item() == pytest.approx(golden, abs=1e-9)


def test_factors_that_point_the_same_way_are_equal() -> None:
    factor = normal(0, 2, 3, 4, 4)
    assert factor_distance(3 * factor, factor).abs().max() < 1e-7


@pytest.mark.parametrize(("factor", "reconstruction", "learner"), [(1.0, 0.0, "translator"), (0.0, 1.0, "paraphraser")])
def test_each_part_of_factor_transfer_trains_its_own_net(factor: float, reconstruction: float, learner: str) -> None:
    loss = make(FactorTransfer, **MAPS)
    student = normal(0, 2, *MAPS["student"]).requires_grad_()
    loss(student, normal(1, 2, *MAPS["teacher"]), torch.tensor(factor), torch.tensor(reconstruction)).mean().backward()
    learns = {
        name: any(weight.grad is not None and bool(weight.grad.any()) for weight in net.parameters())
        for name, net in {"translator": loss.translator, "encoder": loss.encoder, "decoder": loss.decoder}.items()
    }
    is_paraphraser = learner == "paraphraser"
    assert learns == {"translator": not is_paraphraser, "encoder": is_paraphraser, "decoder": is_paraphraser}
    assert student.grad is not None
    assert bool(student.grad.any()) is not is_paraphraser


@pytest.mark.parametrize(("rate", "width"), [(0.5, 4), (0.01, 1), (1.0, 8)])
def test_a_factor_has_its_share_of_the_teachers_channels(rate: float, width: int) -> None:
    assert make(FactorTransfer, **MAPS, rate=rate).encoder(normal(0, 2, 8, 3, 3)).shape == (2, width, 3, 3)


def test_a_paraphraser_learns_to_rebuild_the_teachers_map() -> None:
    torch.manual_seed(0)
    loss, teacher = make(FactorTransfer, **MAPS), normal(1, 8, 8, 3, 3).relu()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    values = []
    for _ in range(60):
        value = loss(normal(0, 8, 4, 6, 6), teacher, torch.tensor(0.0), torch.tensor(1.0)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


def quiet(loss: DiffusionDenoising, share: float) -> DiffusionDenoising:
    """A denoiser that finds no noise, and mixes none in (share 1) or nothing else (share 0)."""
    norm, choice = loss.model.layers[-1], loss.adapter.choice
    assert isinstance(norm.weight, Tensor)
    assert isinstance(norm.bias, Tensor)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()
        choice.weight.zero_()
        choice.bias.copy_(torch.tensor([100.0, -100.0]) * (1 if share else -1))
    return loss


@pytest.mark.parametrize(("steps", "first"), [(5, 400), (2, 250), (1, 0)])
def test_denoising_starts_half_way_and_scales_a_clean_feature_up(steps: int, first: int) -> None:
    loss = quiet(make(DiffusionDenoising, (8, 3, 3), (8, 3, 3), steps=steps), 1.0)
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[first].item()
    feature = normal(0, 2, 8, 3, 3)
    torch.testing.assert_close(loss.denoise(feature), feature / kept**0.5, rtol=1e-4, atol=1e-5)


def test_a_feature_that_is_all_noise_is_replaced_by_noise() -> None:
    loss = quiet(make(DiffusionDenoising, (8, 3, 3), (8, 3, 3), steps=1), 0.0)
    found = loss.denoise(torch.zeros(64, 8, 3, 3))
    assert found.std().item() == pytest.approx(1.0, abs=0.05)
    assert found.mean().item() == pytest.approx(0.0, abs=0.05)


def test_finding_no_noise_costs_its_variance() -> None:
    loss = quiet(make(DiffusionDenoising, (8, 3, 3), (8, 3, 3)), 1.0)
    assert loss._noise_error(torch.zeros(64, 8, 3, 3)).mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_gradient_of_the_comparison_flows_through_all_steps() -> None:
    loss = make(DiffusionDenoising, **MAPS)
    student = normal(0, 4, *MAPS["student"]).requires_grad_()
    loss.denoise(loss.enter(student)).square().sum().backward()
    assert student.grad is not None
    assert student.grad.any()
    times = loss.model.times.weight.grad
    assert times.any(1).nonzero().flatten().tolist() == [0, 100, 200, 300, 400]


def test_the_hidden_map_is_learnt_by_rebuilding_alone() -> None:
    loss = make(DiffusionDenoising, **MAPS, width=3)
    loss(normal(0, 4, *MAPS["student"]), normal(1, 4, *MAPS["teacher"])).mean().backward()
    alone = make(DiffusionDenoising, **MAPS, width=3)
    alone.load_state_dict(loss.state_dict())
    teacher = torch.nn.functional.adaptive_avg_pool2d(normal(1, 4, *MAPS["teacher"]), 3)
    (alone.decoder(alone.encoder(teacher)) - teacher).square().mean().backward()
    torch.testing.assert_close(loss.encoder[0].weight.grad, alone.encoder[0].weight.grad)


def test_logits_are_compared_as_distributions() -> None:
    loss = make(DiffusionDenoising, (5,), (5,), match="kl")
    student, teacher = normal(0, 8, 5), normal(1, 8, 5)
    state = loss.given.generator.get_state()
    values = loss(student, teacher)
    loss.given.generator.set_state(state)
    refined = loss.leave(loss.denoise(loss.enter(student[:, :, None, None]))).flatten(1)
    noise = loss._noise_error(teacher[:, :, None, None])
    divergence = (teacher.softmax(1) * (teacher.log_softmax(1) - refined.log_softmax(1))).sum(1)
    torch.testing.assert_close(values, divergence + noise)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "options", "message"),
    [
        (FactorTransfer, (4, 3, 3), (9, 8), {}, r"ft needs maps .* teacher is \[9, 8\]"),
        (FactorTransfer, (4, 3, 3), (8, 3, 3), {"rate": 0.0}, "rate: found 0.0, expected a share above 0"),
        (FactorTransfer, (4, 3, 3), (8, 3, 3), {"form": "best"}, "form: found 'best', expected one of paper, code"),
        (DiffusionDenoising, (4, 3, 3), (8,), {}, r"student is \[4, 3, 3\] and teacher \[8\]"),
        (DiffusionDenoising, (4, 3, 3), (8, 3, 3), {"match": "kl"}, r"`match: kl` is for logits .* \[8, 3, 3\]"),
        (DiffusionDenoising, (4,), (8,), {"match": "kl", "width": 4}, "`match: kl` is for logits .* no `width`"),
        (DiffusionDenoising, (4,), (8,), {"match": "l1"}, "match: found 'l1', expected one of mse, kl"),
        (DiffusionDenoising, (4,), (8,), {"steps": 0}, "steps: found 0, expected 1 to 500"),
        (DiffusionDenoising, (4,), (8,), {"width": 0}, "width: found 0, expected a number of channels from 1"),
    ],
)
def test_what_cannot_be_coded_is_refused(
    kind: type[Any], student: kdx.Shape, teacher: kdx.Shape, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        make(kind, student, teacher, **options)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_factor_transfer_keeps_the_contract(form: str) -> None:
    check_loss(FactorTransfer, shapes=MAPS, form=form)


def test_denoising_keeps_the_contract() -> None:
    check_loss(DiffusionDenoising, shapes=MAPS, order_matters=True)
    check_loss(DiffusionDenoising, shapes=MAPS, order_matters=True, width=4, steps=2)
    check_loss(DiffusionDenoising, shapes={"student": (5,), "teacher": (5,)}, order_matters=True, match="kl")
