"""The nets of the standard CIFAR-100 distillation benchmark, with numbered stages.

The benchmark is that of Tian, Krishnan, Isola (Contrastive Representation Distillation, ICLR 2020), which later
collections of methods share. Stages are the ones that it numbers; the stem and what follows the last one are none.

Parameters for RGB and 100 classes, counted from nets built by the public definitions of the layers. The definitions
come without counts, so only the layers could be compared:
wrn_16_2 703,284; wrn_40_1 569,780; wrn_40_2 2,255,156; resnet8 83,892; resnet14 181,108; resnet20 278,324;
resnet32 472,756; resnet44 667,188; resnet56 861,620; resnet110 1,736,564; resnet8x4 1,233,540; resnet32x4 7,433,860;
resnet50 23,705,252; vgg8 3,965,028; vgg11 9,277,284; vgg13 9,462,180; vgg16 14,774,436; vgg19 20,086,692;
mobilenetv2 812,836; shufflenetv1 949,258; shufflenetv2 1,355,528.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx


class Stage(NamedTuple):
    """Layers, the channels that they give, and by how much their map is smaller than the image."""

    layers: nn.Module
    channels: int
    reduction: int


class StagedNet(nn.Module):
    """Stem, numbered stages, what follows them, mean pooling, linear classifier.

    It speaks timm's protocol for stages: `feature_info`, `forward_intermediates`, `forward_features`, `forward_head`,
    `get_classifier`.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[Stage], end: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stage.layers for stage in stages)
        self.end = end
        self.classifier = nn.Linear(width, classes)
        self.feature_info = [
            {"num_chs": stage.channels, "reduction": stage.reduction, "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The map [B, D, h, w] before pooling."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        features: Tensor = self.end(x)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, K] of the map before pooling; with `pre_logits` the embedding [B, D]."""
        embedding = features.mean((2, 3))
        return embedding if pre_logits else self.classifier(embedding)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int] | None = None,
        *,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps [B, C, h, w] of the stages `indices` in the order of the net, with the last map before them.

        `intermediates_only` leaves the last map out; `stop_early` then ends at the last stage that is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: found {output_fmt!r}, expected NCHW")
        x, maps = kdx.through_stages(
            self.stem(images), self.stages, indices, stop_early=stop_early and intermediates_only
        )
        return maps if intermediates_only else (self.end(x), maps)

    def get_classifier(self) -> nn.Module:
        return self.classifier


class Residual(nn.Module):
    """The ReLU of a branch plus a shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class WideBlock(nn.Module):
    """Norm and ReLU before each 3x3 convolution; a 1x1 shortcut from the activated input where channels change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(before)
        self.branch = nn.Sequential(
            _conv(before, after, 3, stride), nn.BatchNorm2d(after), nn.ReLU(), _conv(after, after, 3)
        )
        self.shortcut = _conv(before, after, 1, stride) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm(x))
        out: Tensor = self.branch(active)
        return out + (x if self.shortcut is None else self.shortcut(active))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow without activation; a plain shortcut where shapes agree."""

    def __init__(self, before: int, after: int, stride: int, widening: int) -> None:
        super().__init__()
        middle = before * widening
        self.branch = nn.Sequential(
            _conv_norm(before, middle, 1),
            _conv_norm(middle, middle, 3, stride, groups=middle),
            _conv_norm(middle, after, 1, relu=False),
        )
        self.passes = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branch(x)
        return x + out if self.passes else out


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 per channel, grouped 1x1; with stride 2 the pooled input is put beside the result."""

    def __init__(self, before: int, after: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        made = after - before if stride == 2 else after
        middle = made // 4
        self.groups = first_groups
        self.into = _conv_norm(before, middle, 1, groups=first_groups)
        self.branch = nn.Sequential(
            _conv_norm(middle, middle, 3, stride, groups=middle), _conv_norm(middle, made, 1, groups=groups, relu=False)
        )
        self.beside = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(shuffled(self.into(x), self.groups))
        return F.relu(out + x if self.beside is None else torch.cat([out, self.beside(x)], 1))


class ShuffledPair(nn.Module):
    """Two branches put beside each other and shuffled together; with `split` each works on half of the channels."""

    def __init__(self, short: nn.Module, branch: nn.Module, *, split: bool) -> None:
        super().__init__()
        self.short = short
        self.branch = branch
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1) if self.split else (x, x)
        return shuffled(torch.cat([self.short(first), self.branch(second)], 1), 2)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels [B, g * n, H, W] in the order that takes one of each group in turn."""
    B, C, H, W = x.shape
    return x.reshape(B, groups, C // groups, H, W).transpose(1, 2).reshape(B, C, H, W)


def residual_net(depth: int, widths: Sequence[int], channels: int, classes: int) -> StagedNet:
    """ResNet of the CIFAR form (He et al., CVPR 2016), `6 n + 2` layers deep; 1x1 shortcuts where shapes change."""

    def block(before: int, after: int, stride: int) -> nn.Module:
        branch = nn.Sequential(_conv_norm(before, after, 3, stride), _conv_norm(after, after, 3, relu=False))
        return Residual(branch, _shortcut(before, after, stride))

    stages = _residual_stages(block, widths, [(depth - 2) // 6] * 3)
    return _initialised(StagedNet(_conv_norm(channels, widths[0], 3), stages, nn.Identity(), widths[-1], classes))


def resnet50(channels: int, classes: int) -> StagedNet:
    """ResNet-50 (He et al., CVPR 2016) with a 3x3 stem of stride 1 and no pooling after it."""

    def block(before: int, after: int, stride: int) -> nn.Module:
        middle = after // 4
        branch = nn.Sequential(
            _conv_norm(before, middle, 1),
            _conv_norm(middle, middle, 3, stride),
            _conv_norm(middle, after, 1, relu=False),
        )
        return Residual(branch, _shortcut(before, after, stride))

    stages = _residual_stages(block, (64, 256, 512, 1024, 2048), (3, 4, 6, 3))
    return _initialised(StagedNet(_conv_norm(channels, 64, 3), stages, nn.Identity(), 2048, classes))


def wide_net(depth: int, factor: int, channels: int, classes: int) -> StagedNet:
    """Wide ResNet (Zagoruyko and Komodakis, BMVC 2016), `6 n + 4` layers deep; stages end before norm and ReLU."""
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    stages = _residual_stages(WideBlock, widths, [(depth - 4) // 6] * 3)
    end = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    net = _initialised(StagedNet(_conv(channels, 16, 3), stages, end, widths[-1], classes))
    nn.init.zeros_(net.classifier.bias)
    return net


def vgg(counts: Sequence[int], channels: int, classes: int) -> StagedNet:
    """VGG (Simonyan and Zisserman, ICLR 2015) with batch norm and one linear layer; the first block is the stem."""
    widths = (64, 128, 256, 512, 512)

    def block(before: int, after: int, count: int) -> Iterator[nn.Module]:
        for i in range(count):
            yield _conv_norm(before if i == 0 else after, after, 3, bias=True)

    stages = []
    for i, ((before, after), count) in enumerate(zip(pairwise(widths), counts[1:], strict=True)):
        pool = [nn.MaxPool2d(2)] if i < 3 else []
        stages.append(Stage(nn.Sequential(*pool, *block(before, after, count)), after, 2 ** min(i + 1, 3)))
    stem = nn.Sequential(*block(channels, widths[0], counts[0]))
    return _initialised(StagedNet(stem, stages, nn.Identity(), widths[-1], classes), classifier=0.01)


def mobilenetv2(channels: int, classes: int) -> StagedNet:
    """MobileNetV2 (Sandler et al., CVPR 2018) at half the width, with ReLU and fewer strides."""
    plan = (  # of each stage: widening, channels, blocks, stride
        ((1, 8, 1, 1), (6, 12, 2, 1)),
        ((6, 16, 3, 2),),
        ((6, 32, 4, 2), (6, 48, 3, 1)),
        ((6, 80, 3, 2), (6, 160, 1, 1)),
    )
    stages, before = [], 16
    for i, parts in enumerate(plan):
        layers: list[nn.Module] = []
        for widening, after, count, stride in parts:
            for j in range(count):
                layers.append(InvertedResidual(before, after, stride if j == 0 else 1, widening))
                before = after
        stages.append(Stage(nn.Sequential(*layers), before, 2 ** (i + 1)))
    net = StagedNet(_conv_norm(channels, 16, 3, 2), stages, _conv_norm(before, 1280, 1), 1280, classes)
    return _initialised(net, classifier=0.01)


def shufflenetv1(channels: int, classes: int) -> StagedNet:
    """ShuffleNet (Zhang et al., CVPR 2018) with 3 groups and a 1x1 stem."""
    widths, groups = (24, 240, 480, 960), 3
    stages = []
    for i, ((before, after), count) in enumerate(zip(pairwise(widths), (4, 8, 4), strict=True)):
        first = ShuffleUnit(before, after, 2, groups, 1 if i == 0 else groups)
        rest = [ShuffleUnit(after, after, 1, groups, groups) for _ in range(count - 1)]
        stages.append(Stage(nn.Sequential(first, *rest), after, 2 ** (i + 1)))
    return StagedNet(_conv_norm(channels, 24, 1), stages, nn.Identity(), 960, classes)


def shufflenetv2(channels: int, classes: int) -> StagedNet:
    """ShuffleNetV2 (Ma et al., ECCV 2018) of width 1 with a 1x1 stem."""
    stages = []
    for i, ((before, after), count) in enumerate(zip(pairwise((24, 116, 232, 464)), (3, 7, 3), strict=True)):
        half = after // 2
        short = nn.Sequential(_conv_norm(before, before, 3, 2, groups=before, relu=False), _conv_norm(before, half, 1))
        layers = [ShuffledPair(short, _shuffle_branch(before, half, 2), split=False)]
        layers += [ShuffledPair(nn.Identity(), _shuffle_branch(half, half, 1), split=True) for _ in range(count)]
        stages.append(Stage(nn.Sequential(*layers), after, 2 ** (i + 1)))
    return StagedNet(_conv_norm(channels, 24, 1), stages, _conv_norm(464, 1024, 1), 1024, classes)


NETS: dict[str, Callable[[int, int], StagedNet]] = {
    **{f"resnet{depth}": partial(residual_net, depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(residual_net, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    "resnet50": resnet50,
    **{f"wrn_{depth}_{factor}": partial(wide_net, depth, factor) for depth, factor in ((16, 2), (40, 1), (40, 2))},
    "vgg8": partial(vgg, (1, 1, 1, 1, 1)),
    "vgg11": partial(vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(vgg, (2, 2, 2, 2, 2)),
    "vgg16": partial(vgg, (2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, (2, 2, 4, 4, 4)),
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
}
"""Name of a net -> what makes it for a number of channels and classes."""


class Standardise(nn.Module):
    """Images [B, C, H, W] less the data's mean, divided by its deviation, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Cifar(kdx.Model):
    """A net of the standard CIFAR-100 distillation benchmark, without published weights.

    model: wrn_16_2, wrn_40_1, wrn_40_2, resnet8, 14, 20, 32, 44, 56, 110, resnet8x4, resnet32x4, resnet50, vgg8, 11,
        13, 16, 19, mobilenetv2, shufflenetv1 or shufflenetv2.

    Channels, classes and statistics follow the data. Wide and CIFAR-form residual nets and ShuffleNets have three
    stages, the others four. First weights are drawn as the benchmark does.
    """

    name = "cifar"
    offers = ("logits", "embedding", "features")

    @dataclass(frozen=True)
    class Config:
        model: str

    config: Config

    def build(self) -> kdx.Network:
        model = self.config.model
        if model not in NETS:
            near = " or ".join(difflib.get_close_matches(model, NETS)) or "another net"
            raise kdx.ConfigError(f"model: found {model!r}; did you mean {near}? (known: {', '.join(NETS)})")
        if len(self.streams) != 1 or self.streams[0] not in self.facts.streams:
            raise kdx.PlanError(f"input: found {', '.join(self.streams)}, expected one stream of images")
        images = self.facts.streams[self.streams[0]]
        if len(images.shape) != 3 or not self.facts.classes:
            raise kdx.PlanError(
                f"{model} tells classes of images [C, H, W] apart, but {self.streams[0]} is {list(images.shape)} and "
                f"the data has {len(self.facts.classes)} classes"
            )
        net = NETS[model](images.shape[0], len(self.facts.classes))
        return kdx.Network(net, self.streams, Standardise(images.mean or (0.5,), images.std or (0.5,)))


def _conv(before: int, after: int, size: int, stride: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, padding=size // 2, **{"bias": False, **options})


def _conv_norm(before: int, after: int, size: int, stride: int = 1, *, relu: bool = True, **options: Any) -> nn.Module:
    layers: list[nn.Module] = [_conv(before, after, size, stride, **options), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    return nn.Identity() if before == after and stride == 1 else _conv_norm(before, after, 1, stride, relu=False)


def _shuffle_branch(before: int, after: int, stride: int) -> nn.Module:
    return nn.Sequential(
        _conv_norm(before, after, 1),
        _conv_norm(after, after, 3, stride, groups=after, relu=False),
        _conv_norm(after, after, 1),
    )


def _residual_stages(
    block: Callable[[int, int, int], nn.Module], widths: Sequence[int], counts: Sequence[int]
) -> list[Stage]:
    """Stages of blocks, from `widths[0]` on; each but the first halves the map."""
    stages = []
    for i, ((before, after), count) in enumerate(zip(pairwise(widths), counts, strict=True)):
        blocks = [block(before if j == 0 else after, after, 2 if i and j == 0 else 1) for j in range(count)]
        stages.append(Stage(nn.Sequential(*blocks), after, 2**i))
    return stages


def _initialised(net: StagedNet, classifier: float | None = None) -> StagedNet:
    """Convolutions drawn for ReLU by what leaves them (He et al., ICCV 2015), `classifier` with this deviation."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if classifier is not None:
        nn.init.normal_(net.classifier.weight, std=classifier)
        nn.init.zeros_(net.classifier.bias)
    return net


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [Cifar]
