"""Optimizers by name: those of torch, then those of timm; options are checked against the optimizer's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kdx.errors import ConfigError, did_you_mean

WHERE = "train.optimizer"


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    options: Mapping[str, Any],
    *,
    lr: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer that `{use: name, ...}` names, fused where torch has that for the device.

    Weight decay acts on matrices and kernels; biases and norm scales (at most one axis) have none. Raises
    `ConfigError` for an unknown name or option.
    """
    factory, rest = read_optimizer(options)
    known = inspect.signature(factory).parameters
    if "fused" in known and "fused" not in rest and "foreach" not in rest and device.type in ("cuda", "cpu", "mps"):
        rest["fused"] = True
    if "lr" in known:
        rest["lr"] = lr
    try:
        return factory(_groups(named, weight_decay), **rest)  # type: ignore[no-any-return]
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{WHERE}: {options['use']} refuses its options: {error}") from error


def read_optimizer(options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The optimizer that `{use: name, ...}` names, and its options, checked against its signature."""
    rest = dict(options)
    use = rest.pop("use", None)
    factory = _find(use, WHERE)
    known = inspect.signature(factory).parameters
    for key in rest:
        if key not in known or key in ("params", "lr", "weight_decay"):
            choices = [name for name in known if name not in ("params", "lr", "weight_decay", "self")]
            hint = f"; it is train.{key}" if key in ("lr", "weight_decay") else ""
            raise ConfigError(f"{WHERE}.{key}: {use} has no such option{hint}; {did_you_mean(key, choices)}")
    return factory, rest


def optimizer_names() -> list[str]:
    """Every name that `use` may have."""
    import timm.optim

    return sorted({*_torch_optimizers(), *timm.optim.list_optimizers()})


def _find(use: Any, where: str) -> Any:
    if not isinstance(use, str):
        raise ConfigError(f"{where}: it says no `use:`; expected the name of an optimizer, as in sgd or adamw")
    ours = _torch_optimizers()
    if use.lower() in ours:
        return ours[use.lower()]
    import timm.optim

    if use.lower() in timm.optim.list_optimizers():
        return timm.optim.get_optimizer_class(use.lower(), bind_defaults=True)
    raise ConfigError(f"{where}.use: no optimizer is named {use!r}; {did_you_mean(use, optimizer_names())}")


def _torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    unfit = ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # they need closures, sparse gradients, or matrices only
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in unfit
    }


def _groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
