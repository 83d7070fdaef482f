"""Batch norm over the samples of all processes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdx.group import Group

_HALF = (torch.float16, torch.bfloat16)


def sync_norms(module: nn.Module, group: Group) -> None:
    """Let the batch norms in a module take their statistics over the present batch of all processes.

    The modules stay what they are, with the names of their weights; evaluation is as before.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            part.forward = functools.partial(_forward, part, group)  # type: ignore[method-assign]


def _forward(norm: _BatchNorm, group: Group, x: Tensor) -> Tensor:
    if not norm.training or group.is_apart:
        plain: Tensor = type(norm).forward(norm, x)
        return plain
    norm._check_input_dim(x)  # type: ignore[no-untyped-call]
    out = _normalised(norm, group, x)
    for after in ("drop", "act"):  # timm joins a norm and its activation in one module
        if isinstance(module := getattr(norm, after, None), nn.Module):
            out = module(out)
    return out


def _normalised(norm: _BatchNorm, group: Group, x: Tensor) -> Tensor:
    values = x.float() if x.dtype in _HALF else x
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(values, axes, correction=0)
    count = variance.new_tensor([x.numel() / x.shape[1]])
    every = group.gather(torch.cat([count, mean, variance])[None], (1,) * group.size)
    counts, means, variances = every.tensor_split((1, 1 + len(mean)), 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    _remember(norm, mean.detach(), (variance * total / (total - 1)).detach())
    shape = [1, -1, *[1] * (x.ndim - 2)]
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    out: Tensor = values * scale.view(shape) + shift.view(shape)
    return out.to(x.dtype)


@torch.no_grad()
def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as torch does; `variance` is the unbiased one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:
        share = 1.0 / norm.num_batches_tracked.float()
        norm.running_mean.add_((mean - norm.running_mean) * share)
        norm.running_var.add_((variance - norm.running_var) * share)
        return
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
