"""Optimizers by name: those of torch, then those of timm; options are checked against the optimizer's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdx.errors import ConfigError, did_you_mean
from kdx.shards import is_spread

WHERE = "train.optimizer"
_UNFIT_OF_TORCH = {"optimizer", "lbfgs", "sparseadam", "muon"}
"""They need closures, sparse gradients, or matrices only; timm has a `muon` for any parameters."""
_UNFIT = {"adahessian"}
"""It needs the graph of the gradient, which the engine does not keep."""


@dataclass(frozen=True)
class Trained:
    """Parameters that are trained alike: the learning rate times `lr_scale`, and their own weight decay.

    Vectors, which are biases and norm scales (at most one axis), decay only with `decay_vectors`.
    """

    parameters: Sequence[nn.Parameter]
    lr_scale: float
    weight_decay: float
    decay_vectors: bool = False


def make_optimizer(
    groups: Iterable[Trained], options: Mapping[str, Any], *, device: torch.device, peak: float = 0.0
) -> torch.optim.Optimizer:
    """The optimizer that `{use: name, ...}` names, fused where torch has that for the device.

    The learning rate is `peak` until `set_lr` says otherwise; optimizers that scale their weight decay take it for the
    highest one.
    Raises `ConfigError` for an unknown name or option.
    """
    factory, rest = read_optimizer(options)
    known = inspect.signature(factory).parameters
    gathered = _groups(groups)
    spread = any(is_spread(weight) for group in gathered for weight in group["params"])  # no kernel is fused for these
    free = "fused" in known and "fused" not in rest and "foreach" not in rest
    if free and not spread and device.type in ("cuda", "cpu", "mps"):
        rest["fused"] = True
    if "lr" in known:
        rest["lr"] = peak
    try:
        return factory(gathered, **rest)  # type: ignore[no-any-return]
    except (ValueError, TypeError, RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"{WHERE}: {options['use']} refuses its options: {error}") from error


def read_optimizer(options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The optimizer that `{use: name, ...}` names, and its options, checked against its signature."""
    rest = dict(options)
    use = rest.pop("use", None)
    factory, own = _find(use, WHERE)
    known = inspect.signature(factory).parameters
    for key in rest:
        if key not in known or key in ("params", "lr", "weight_decay"):
            choices = [name for name in known if name not in ("params", "lr", "weight_decay", "self")]
            hint = f"; it is train.{key}" if key in ("lr", "weight_decay") else ""
            raise ConfigError(f"{WHERE}.{key}: {use} has no such option{hint}; {did_you_mean(key, choices)}")
    return factory, {**own, **rest}


def optimizer_names() -> list[str]:
    """Every name that `use` may have."""
    import timm.optim

    return sorted({*_torch_optimizers(), *timm.optim.list_optimizers()} - _UNFIT)


def _find(use: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """What makes the optimizer, and the options that its name implies."""
    if not isinstance(use, str):
        raise ConfigError(f"{where}: it says no `use:`; expected the name of an optimizer, as in sgd or adamw")
    ours = _torch_optimizers()
    if use.lower() in ours:
        return ours[use.lower()], {}
    import timm.optim

    if use.lower() in optimizer_names():
        # In timm, `momentum` and `nesterov` name optimizers that get their momentum from its training script.
        momentum = {"momentum": 0.9} if timm.optim.get_optimizer_info(use.lower()).has_momentum else {}
        try:
            return timm.optim.get_optimizer_class(use.lower(), bind_defaults=True), momentum
        except (AssertionError, ImportError) as error:
            raise ConfigError(f"{where}.use: {use} cannot be had on this machine: {error}") from error
    raise ConfigError(f"{where}.use: no optimizer is named {use!r}; {did_you_mean(use, optimizer_names())}")


def _torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name.lower() not in _UNFIT_OF_TORCH
    }


def _groups(groups: Iterable[Trained]) -> list[dict[str, Any]]:
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group.parameters:
            if parameter.requires_grad:
                decay = group.weight_decay if group.decay_vectors or parameter.ndim > 1 else 0.0
                found.setdefault((group.lr_scale, decay), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay} for (scale, decay), parameters in found.items()
    ]


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """`optimizer.step`, to be called without gradient.

    For the optimizers of torch it is without what they wrap around it for profilers and compilers, which takes as long
    as the update of a small net; hooks of an optimizer are called if there are any.
    """
    bare: Callable[..., object] = type(optimizer).step
    if type(optimizer).__module__.startswith("torch.optim."):
        bare = inspect.unwrap(bare)
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks

    def step() -> object:
        return optimizer.step() if before or after or "step" in vars(optimizer) else bare(optimizer)

    return step


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
