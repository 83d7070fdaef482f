"""The pairs of nets that the benchmarks of an update train: student, teacher, samples, and where both are tapped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Net:
    """`burst` is how many updates make a turn; `tap` a module of both nets, `align` between the two."""

    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    tap: str
    aligner: str
    align: Callable[[], nn.Module]
    burst: int = 1
    has_maps: bool = True


def mlp(width: int) -> nn.Module:
    """[B, 1, 28, 28] -> [B, 10]."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        flat=nn.Flatten(), first=nn.Linear(784, width), act1=nn.ReLU(), second=nn.Linear(width, width),
        act2=nn.ReLU(), head=nn.Linear(width, 10),
    )  # fmt: skip
    return nn.Sequential(layers)


def convnet(width: int) -> nn.Module:
    """[B, 3, 32, 32] -> [B, 100]."""

    def stage(channels: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    layers: OrderedDict[str, nn.Module] = OrderedDict(
        first=stage(3, width), second=stage(width, 2 * width), third=stage(2 * width, 4 * width),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(4 * width, 100),
    )  # fmt: skip
    return nn.Sequential(layers)


def resnet(name: str) -> nn.Module:
    """[B, 3, 32, 32] -> [B, 100]."""
    import timm

    net: nn.Module = timm.create_model(name, num_classes=100)
    return net


def seeded(make: Callable[..., nn.Module], *options: object) -> Callable[[], nn.Module]:
    """Nets whose first weights are the same each time."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*options)

    return build


NETS = {
    "mlp": Net(
        seeded(mlp, 64), seeded(mlp, 128), (1, 28, 28), 10, 128, "act2", "linear",
        seeded(nn.Linear, 64, 128), burst=20, has_maps=False,
    ),
    "convnet": Net(
        seeded(convnet, 12), seeded(convnet, 24), (3, 32, 32), 100, 64, "second", "conv1x1",
        seeded(nn.Conv2d, 24, 48, 1), burst=5,
    ),
    "resnet": Net(
        seeded(resnet, "resnet18"), seeded(resnet, "resnet34"), (3, 32, 32), 100, 128, "layer3", "conv1x1",
        seeded(nn.Conv2d, 256, 256, 1),
    ),
}  # fmt: skip
