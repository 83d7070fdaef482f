"""Optimizers: names, options, weight decay, learning rates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from kdx.errors import ConfigError
from kdx.optim import Trained, bare_step, make_optimizer, optimizer_names, read_optimizer, set_lr

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def made(options: dict[str, Any], *groups: Trained, peak: float = 0.1) -> torch.optim.Optimizer:
    return make_optimizer(groups or [Trained(list(net().parameters()), 1.0, 0.1)], options, device=CPU, peak=peak)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", "SGD"), ("adamw", "AdamW"), ("AdamW", "AdamW"), ("rmsprop", "RMSprop"), ("lamb", "Lamb"),
     ("lion", "Lion"), ("adafactor", "Adafactor"), ("nadamw", "NAdamW"), ("muon", "Muon")],
)  # fmt: skip
def test_optimizers_of_torch_and_timm_go_by_their_names(name: str, kind: str) -> None:
    assert type(made({"use": name})).__name__ == kind


def test_a_name_that_both_have_is_that_of_torch() -> None:
    assert type(made({"use": "adamw"})) is torch.optim.AdamW


@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "nesterov", "adamw", "adopt", "lamb", "lion", "madgrad", "rmsproptf", "sgdc", "adamc"]
)
def test_an_optimizer_moves_every_parameter(name: str) -> None:
    module = net()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = made({"use": name}, Trained(list(module.parameters()), 1.0, 0.1))
    for _ in range(2):
        set_lr(optimizer, 0.1)
        module(torch.randn(4, 1, 3, 3)).square().sum().backward()
        optimizer.step()
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, old)


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^train.optimizer.use: no optimizer is named 'rmsprob'; did you mean 'rmsp"):
        made({"use": "rmsprob"})


def test_optimizers_that_the_loop_cannot_serve_are_not_offered() -> None:
    assert not {"lbfgs", "sparseadam", "adahessian", "optimizer"} & set(optimizer_names())
    for name in ("lbfgs", "adahessian"):
        with pytest.raises(ConfigError, match=f"no optimizer is named '{name}'"):
            made({"use": name})


def test_a_section_without_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^train.optimizer: it says no `use:`"):
        read_optimizer({"momentum": 0.9})


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^train.optimizer.momentun: sgd has no such option; did you mean 'moment"):
        made({"use": "sgd", "momentun": 0.9})


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_options_that_have_a_place_of_their_own_are_sent_there(option: str) -> None:
    with pytest.raises(ConfigError, match=f"sgd has no such option; it is train.{option}"):
        made({"use": "sgd", option: 0.1})


def test_an_option_with_a_senseless_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^train.optimizer: sgd refuses its options: Invalid momentum value: -1"):
        made({"use": "sgd", "momentum": -1.0})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="refuses its options: optimizer got an empty parameter list"):
        made({"use": "sgd"}, Trained([], 1.0, 0.0))


def test_an_optimizer_for_another_machine_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may have it")
    with pytest.raises(ConfigError, match=r"^train.optimizer.use: fusedsgd cannot be had on this machine: CUDA"):
        read_optimizer({"use": "fusedsgd"})


def test_momentum_optimizers_of_timm_have_momentum_as_in_timm() -> None:
    assert made({"use": "momentum"}).defaults["momentum"] == 0.9
    assert made({"use": "nesterov", "momentum": 0.5}).defaults["momentum"] == 0.5
    assert made({"use": "sgd"}).defaults["momentum"] == 0


def test_weight_decay_acts_on_matrices_and_kernels_only() -> None:
    module = net()
    optimizer = made({"use": "sgd"}, Trained(list(module.parameters()), 1.0, 0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in module.parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)
    assert len(decay) == len(list(module.parameters()))


def test_weight_decay_acts_on_biases_and_norm_scales_too_where_that_is_asked_for() -> None:
    alike, other = net(), net()
    optimizer = made(
        {"use": "sgd"},
        Trained(list(alike.parameters()), 1.0, 0.1, decay_vectors=True),
        Trained(list(other.parameters()), 1.0, 0.2),
    )
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in alike.parameters()] == [0.1] * 6
    assert [decay[id(p)] for p in other.parameters()] == [0.2, 0.0, 0.0, 0.0, 0.2, 0.0]


def test_a_bias_does_not_shrink_and_a_kernel_does() -> None:
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    optimizer = made({"use": "sgd"}, Trained(list(layer.parameters()), 1.0, 0.5))
    set_lr(optimizer, 0.1)
    (layer.weight.sum() * 0 + layer.bias.sum() * 0).backward()
    optimizer.step()
    assert layer.weight.detach().tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert layer.bias.detach().tolist() == [1.0, 1.0]


def test_frozen_parameters_are_not_trained() -> None:
    module = net().requires_grad_(False)
    module[3].requires_grad_(True)
    optimizer = made({"use": "sgd"}, Trained(list(module.parameters()), 1.0, 0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_groups_keep_their_own_rate_and_decay() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = made({"use": "sgd"}, Trained([*one.parameters()], 1.0, 0.1), Trained([*two.parameters()], 0.5, 0.0))
    set_lr(optimizer, 0.2)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(one.weight)] == (0.2, 0.1)
    assert rates[id(one.bias)] == (0.2, 0.0)
    assert rates[id(two.weight)] == (0.1, 0.0)


def test_nothing_moves_before_a_learning_rate_is_set() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer([Trained([*layer.parameters()], 1.0, 0.1)], {"use": "sgd"}, device=CPU)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_the_optimizer_is_fused_where_torch_can() -> None:
    assert made({"use": "sgd"}).defaults["fused"] is True
    assert made({"use": "adamw"}).defaults["fused"] is True
    assert made({"use": "sgd", "fused": False}).defaults["fused"] is False
    assert made({"use": "sgd", "foreach": True}).defaults["fused"] is None


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_an_optimizer_are_called(late: bool) -> None:
    weight, seen = nn.Parameter(torch.ones(2)), list[str]()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    step = bare_step(optimizer)
    weight.grad = torch.ones(2)
    with torch.no_grad():
        step()
        assert torch.equal(weight, torch.full((2,), 0.5))
        if late:
            optimizer.register_step_post_hook(lambda *told: seen.append("after"))
        else:
            optimizer.register_step_pre_hook(lambda *told: seen.append("before"))
        step()
    assert torch.equal(weight, torch.zeros(2))
    assert seen == ["after" if late else "before"]


def test_fused_and_plain_optimizers_agree() -> None:
    results = []
    for fused in (True, False):
        module = net()
        optimizer = made({"use": "sgd", "momentum": 0.9, "fused": fused}, Trained([*module.parameters()], 1.0, 0.1))
        for step in range(3):
            set_lr(optimizer, 0.01)
            generator = torch.Generator().manual_seed(step)
            module(torch.randn(4, 1, 3, 3, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_the_peak_rate_is_known_to_optimizers_that_scale_their_decay() -> None:
    with pytest.raises(ConfigError, match="Corrected weight decay requires a positive max lr"):
        made({"use": "adamc"}, peak=0.0)
    assert math.isclose(made({"use": "adamc"}, peak=0.3).defaults["lr"], 0.3)
