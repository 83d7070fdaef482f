"""Layouts of tensors, and the steps that lead from one to another: what aligners are made of.

A shape without the batch axis tells the layout: (D,) is a vector, (N, D) tokens or any other sequence, (C, H, W) a map.
Maps are channels first, tokens have their features last. A net that computes channels last (Swin, ConvNeXt blocks)
cannot be told from its shape alone: taps give such maps as [B, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.errors import PlanError
from kdx.types import Shape

PREFIXES = (0, 1, 2, 4, 5)
"""Prefix tokens of the common transformers: none, class, class and distillation, 4 registers, class and 4 registers."""


@dataclass(frozen=True)
class Grid:
    """How tokens lie: `prefix` tokens that have no place, then `height * width` in rows."""

    prefix: int
    height: int
    width: int

    def __str__(self) -> str:
        size = f"grid {self.height}x{self.width}"
        return size if self.prefix == 0 else f"{self.prefix} prefix + {size}"


def layout(shape: Shape, who: str) -> str:
    """`vector`, `tokens` or `map`; PlanError for any other rank. `who` names the tensor in the message."""
    if len(shape) not in (1, 2, 3) or min(shape) < 1:
        raise PlanError(
            f"{who} is {list(shape)} for one sample; expected a vector [D], tokens [N, D] or a map [C, H, W], "
            "none of them empty"
        )
    return ("vector", "tokens", "map")[len(shape) - 1]


def find_grid(tokens: int, prefix: int | None = None, near: tuple[int, int] | None = None) -> Grid | None:
    """The grid that `tokens` form after `prefix` of them, or None.

    A grid of the size of `near` is preferred, then a square one, then one with the proportions of `near`. A prefix of
    None tries the common numbers, fewest first, as long as the sides of the grid are longer than the prefix: 13 tokens
    are a sequence rather than 3x3 with a prefix of 4.
    """
    for matches in (_equal, _square, _proportional):
        for k in PREFIXES if prefix is None else (prefix,):
            size = matches(tokens - k, near) if k < tokens else None
            if size is not None and (k == 0 or k == prefix or min(size) > k):
                return Grid(k, *size)
    return None


class Move(nn.Module):
    """A step without parameters, and the words for it."""

    def __init__(self, words: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.words = words
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.words


class Steps(nn.ModuleList):
    """Steps from `source` to the shape of `like`, able to say what they do."""

    def __init__(self, source: Shape, steps: Sequence[nn.Module]) -> None:
        super().__init__(steps)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        for step in self:
            x = step(x)
        return x

    def describe(self) -> str:
        """In words, as `tokens 49x192 -> grid 7x7 -> conv1x1 192->128 -> resample 14x14`."""
        first = f"{layout(self.source, 'source')} {'x'.join(map(str, self.source))}"
        return " -> ".join([first, *map(_words, self)]) if len(self) else f"{first}, as it is"


def conv1x1(channels: int, wanted: int, *, norm: bool = False) -> list[nn.Module]:
    """A projection of the channels of a map."""
    conv = nn.Conv2d(channels, wanted, kernel_size=1, bias=not norm)
    return [conv, nn.BatchNorm2d(wanted)] if norm else [conv]


def shrink_map(height: int, width: int) -> Move:
    """[B, C, H, W] -> [B, C, height, width] by adaptive average pooling."""
    return Move(f"pool {height}x{width}", partial(F.adaptive_avg_pool2d, output_size=(height, width)))


def resample_map(height: int, width: int, mode: str = "linear") -> Move:
    """[B, C, H, W] -> [B, C, height, width] by interpolation; `mode` is `linear` or `nearest`."""
    return Move(f"resample {height}x{width}", partial(_resample_map, size=(height, width), mode=mode))


def resize_length(tokens: int, wanted: int) -> Move:
    """[B, tokens, D] -> [B, wanted, D]: average pooling to fewer, linear interpolation to more."""
    if wanted < tokens:
        return Move(f"pool to length {wanted}", partial(_pool_length, length=wanted))
    return resample_length(wanted)


def resample_length(wanted: int, mode: str = "linear") -> Move:
    """[B, N, D] -> [B, wanted, D] by interpolation; `mode` is `linear` or `nearest`."""
    return Move(f"resample to length {wanted}", partial(_resample_length, length=wanted, mode=mode))


def tokens_to_map(grid: Grid) -> Move:
    """[B, prefix + H * W, D] -> [B, D, H, W], without the prefix."""
    dropped = f"drop {grid.prefix} prefix, " if grid.prefix else ""
    return Move(f"{dropped}grid {grid.height}x{grid.width}", partial(_tokens_to_map, grid=grid))


def map_to_tokens(count: int, prefix: int = 0) -> Move:
    """[B, C, H, W] -> [B, prefix + H * W, C]; each prefix token is the mean over the map."""
    added = f" with {prefix} prefix" if prefix else ""
    return Move(f"tokens {count}{added}", partial(_map_to_tokens, prefix=prefix))


def resize_token_grid(source: Grid, wanted: Grid) -> Move:
    """Tokens on one grid -> tokens on another. Prefix tokens are carried over in their order; surplus ones are dropped,
    missing ones are the mean over the grid.
    """
    return Move(f"({source}) to ({wanted})", partial(_resize_token_grid, source=source, wanted=wanted))


def mean_over_positions(shape: Shape) -> Move:
    """Tokens [B, N, D] or a map [B, C, H, W] -> the mean over all positions, [B, D]."""
    count = math.prod(shape[1:]) if len(shape) == 3 else shape[0]
    return Move(f"mean over {count} positions", partial(torch.mean, dim=(2, 3) if len(shape) == 3 else 1))


def spread(shape: Shape) -> Move:
    """A vector [B, D] -> the same at every position of tokens (N, D) or a map (D, H, W)."""
    places = "x".join(map(str, shape[1:] if len(shape) == 3 else shape[:1]))
    return Move(f"spread over {places}", partial(_spread, shape=shape))


def _equal(count: int, near: tuple[int, int] | None) -> tuple[int, int] | None:
    return near if near is not None and near[0] * near[1] == count else None


def _square(count: int, near: tuple[int, int] | None) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _proportional(count: int, near: tuple[int, int] | None) -> tuple[int, int] | None:
    if near is None:
        return None
    height, width = (side // math.gcd(*near) for side in near)
    scale = math.isqrt(count // (height * width))
    return (scale * height, scale * width) if scale * scale * height * width == count else None


def _words(step: nn.Module) -> str:
    if isinstance(step, Move):
        return step.words
    if isinstance(step, nn.Conv2d):
        return f"conv1x1 {step.in_channels}->{step.out_channels}"
    if isinstance(step, nn.Linear):
        return f"linear {step.in_features}->{step.out_features}"
    return "batch norm" if isinstance(step, nn.BatchNorm2d) else type(step).__name__


def _resample_map(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "nearest":
        return F.interpolate(x, size=size, mode="nearest-exact")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _pool_length(x: Tensor, length: int) -> Tensor:
    return F.adaptive_avg_pool1d(x.transpose(1, 2), length).transpose(1, 2)


def _resample_length(x: Tensor, length: int, mode: str) -> Tensor:
    x = x.transpose(1, 2)
    if mode == "nearest":
        return F.interpolate(x, size=length, mode="nearest-exact").transpose(1, 2)
    return F.interpolate(x, size=length, mode="linear", align_corners=False).transpose(1, 2)


def _tokens_to_map(x: Tensor, grid: Grid) -> Tensor:
    return x[:, grid.prefix :].transpose(1, 2).reshape(x.shape[0], x.shape[2], grid.height, grid.width)


def _map_to_tokens(x: Tensor, prefix: int) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    if prefix == 0:
        return tokens
    return torch.cat([tokens.mean(1, keepdim=True).expand(-1, prefix, -1), tokens], 1)


def _resize_token_grid(x: Tensor, source: Grid, wanted: Grid) -> Tensor:
    grid = _tokens_to_map(x, source)
    height, width = min(source.height, wanted.height), min(source.width, wanted.width)
    if (height, width) != (source.height, source.width):
        grid = F.adaptive_avg_pool2d(grid, (height, width))
    if (height, width) != (wanted.height, wanted.width):
        grid = _resample_map(grid, (wanted.height, wanted.width), "linear")
    kept = min(source.prefix, wanted.prefix)
    return torch.cat([x[:, :kept], _map_to_tokens(grid, wanted.prefix - kept)], 1)


def _spread(x: Tensor, shape: Shape) -> Tensor:
    return (x[:, :, None, None] if len(shape) == 3 else x[:, None]).expand(-1, *shape)
