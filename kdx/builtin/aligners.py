"""Aligners: they bring a student tensor into the shape of a teacher tensor. `auto` is the default and needs no number.

All of them read the layout from the shape of one sample, see `kdx.builtin.layouts`. They keep the precision that they
are given and work under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kdx.builtin.layouts import (
    PREFIXES,
    Grid,
    Steps,
    conv1x1,
    find_grid,
    layout,
    map_to_tokens,
    mean_over_positions,
    resample_length,
    resample_map,
    resize_length,
    resize_token_grid,
    shrink_map,
    spread,
    tokens_to_map,
)
from kdx.components import Aligner, Given
from kdx.errors import ConfigError, PlanError, did_you_mean
from kdx.types import Shape


class Identity(Aligner):
    """The source as it is; its shape must be that of `like`."""

    name = "identity"
    separable = True

    def __init__(self, config: Identity.Config, given: Given) -> None:
        super().__init__(config, given)
        source, like = _shapes(given)
        if source != like:
            raise _refusal("identity", source, like, "shapes must be equal", "auto")
        self.steps = Steps(source, [])

    def forward(self, source: Tensor) -> Tensor:
        return source

    def describe(self) -> str:
        return self.steps.describe()


class Linear(Aligner):
    """A linear map of the last axis: [B, D] -> [B, D'], [B, N, D] -> [B, N, D']."""

    name = "linear"
    separable = True

    @dataclass(frozen=True)
    class Config:
        bias: bool = True

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        source, like = _shapes(given)
        if "map" in _layouts(source, like):
            raise _refusal("linear", source, like, "it takes vectors and tokens", "conv1x1")
        if source[:-1] != like[:-1]:
            raise _refusal("linear", source, like, "only the last axis may differ", "auto")
        self.steps = Steps(source, [nn.Linear(source[-1], like[-1], bias=config.bias)])

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.steps(source)
        return aligned

    def describe(self) -> str:
        return self.steps.describe()


class Conv1x1(Aligner):
    """Maps [B, C, H, W] -> [B, C', H', W']: a 1x1 convolution of the channels, always there, and batch norm if asked.

    A larger map is pooled first (adaptive average), a smaller one interpolated last (bilinear).
    """

    name = "conv1x1"
    separable = True

    @dataclass(frozen=True)
    class Config:
        norm: bool = False

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        source, like = _shapes(given)
        if _layouts(source, like) != ("map", "map"):
            raise _refusal("conv1x1", source, like, "both must be maps", "auto")
        self.steps = Steps(source, _map_to_map(source, like, conv1x1(source[0], like[0], norm=config.norm)))

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.steps(source)
        return aligned

    def describe(self) -> str:
        return self.steps.describe()


class Pool(Aligner):
    """Adaptive average pooling without parameters: a map to a smaller map, tokens to fewer tokens, either to a vector.

    The channels must be equal.
    """

    name = "pool"
    separable = True

    def __init__(self, config: Pool.Config, given: Given) -> None:
        super().__init__(config, given)
        source, like = _shapes(given)
        kinds = _layouts(source, like)
        if kinds not in (("map", "map"), ("map", "vector"), ("tokens", "tokens"), ("tokens", "vector")):
            raise _refusal("pool", source, like, "it does not change the layout, save to a vector", "auto")
        if _channels(source) != _channels(like):
            raise _refusal("pool", source, like, "the channels must be equal", "auto")
        if any(size < wanted for size, wanted in zip(_places(source), _places(like), strict=False)):
            raise _refusal("pool", source, like, "pooling only shrinks", "resample")
        if kinds[1] == "vector":
            step = mean_over_positions(source)
        else:
            step = shrink_map(*like[1:]) if kinds[0] == "map" else resize_length(source[0], like[0])
        self.steps = Steps(source, [] if source == like else [step])

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.steps(source)
        return aligned

    def describe(self) -> str:
        return self.steps.describe()


class Resample(Aligner):
    """Interpolation to the size of `like`, without parameters: maps in two directions, tokens along their length.

    `mode: linear` is bilinear on maps. The channels must be equal.
    """

    name = "resample"
    separable = True

    @dataclass(frozen=True)
    class Config:
        mode: str = "linear"

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        if config.mode not in ("linear", "nearest"):
            raise ConfigError(f"mode: found {config.mode!r}; {did_you_mean(config.mode, ['linear', 'nearest'])}")
        source, like = _shapes(given)
        kinds = _layouts(source, like)
        if kinds not in (("map", "map"), ("tokens", "tokens")):
            raise _refusal("resample", source, like, "both must be maps, or both tokens", "auto")
        if _channels(source) != _channels(like):
            raise _refusal("resample", source, like, "the channels must be equal", "auto")
        is_map = kinds[0] == "map"
        step = resample_map(like[1], like[2], config.mode) if is_map else resample_length(like[0], config.mode)
        self.steps = Steps(source, [] if source == like else [step])

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.steps(source)
        return aligned

    def describe(self) -> str:
        return self.steps.describe()


class TokensToGrid(Aligner):
    """Tokens [B, prefix + H * W, D] -> the map [B, D, H, W], without the `prefix` tokens (None: as many as fit)."""

    name = "tokens_to_grid"
    separable = True

    @dataclass(frozen=True)
    class Config:
        prefix: int | None = None

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        _check_prefix("prefix", config.prefix)
        source, like = _shapes(given)
        if _layouts(source, like) != ("tokens", "map"):
            raise _refusal("tokens_to_grid", source, like, "it goes from tokens to a map", "auto")
        grid = find_grid(source[0], config.prefix, (like[1], like[2]))
        if grid is None:
            raise _no_grid(source, "source", config.prefix)
        if (source[1], grid.height, grid.width) != like:
            raise _refusal("tokens_to_grid", source, like, f"the tokens are {grid}, {source[1]} channels", "auto")
        self.steps = Steps(source, [tokens_to_map(grid)])

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.steps(source)
        return aligned

    def describe(self) -> str:
        return self.steps.describe()


class GridToTokens(Aligner):
    """A map [B, C, H, W] -> the tokens [B, prefix + H * W, C]; each prefix token that `like` has is the map's mean."""

    name = "grid_to_tokens"
    separable = True

    @dataclass(frozen=True)
    class Config:
        prefix: int | None = None

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        _check_prefix("prefix", config.prefix)
        source, like = _shapes(given)
        if _layouts(source, like) != ("map", "tokens"):
            raise _refusal("grid_to_tokens", source, like, "it goes from a map to tokens", "auto")
        prefix = like[0] - source[1] * source[2] if config.prefix is None else config.prefix
        if prefix < 0 or like != (prefix + source[1] * source[2], source[0]):
            raise _refusal("grid_to_tokens", source, like, f"the map gives {source[1] * source[2]} tokens", "auto")
        self.steps = Steps(source, [map_to_tokens(like[0], prefix)])

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.steps(source)
        return aligned

    def describe(self) -> str:
        return self.steps.describe()


class Auto(Aligner):
    """Joins any two of map, tokens and vector: first the layout, then the size, then the channels.

    Larger maps and longer sequences are pooled, smaller ones interpolated; channels are projected (1x1 convolution or
    linear map) where they are fewest to compute, and only if they differ: otherwise there are no parameters. Maps and
    tokens become vectors by the mean over positions; a vector is spread over all positions.

    positions: how tokens lie. `grid` in rows of an image, after `prefix` tokens (`like_prefix` of `like`; None: found);
        `sequence` along one axis; `auto` takes a grid where the numbers allow one and a sequence elsewhere. A sequence
        meets a map in the map's row order.
    """

    name = "auto"
    separable = True

    @dataclass(frozen=True)
    class Config:
        positions: str = "auto"
        prefix: int | None = None
        like_prefix: int | None = None

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        choices = ("auto", "grid", "sequence")
        if config.positions not in choices:
            raise ConfigError(f"positions: found {config.positions!r}; {did_you_mean(config.positions, choices)}")
        source, like = _shapes(given)
        kinds = _layouts(source, like)
        if config.positions != "auto" and ("tokens" not in kinds or "vector" in kinds):
            raise ConfigError(
                f"positions: found {config.positions!r}, but {' and '.join(kinds)} leave no choice; leave it out"
            )
        for who, prefix, kind in zip(
            ("prefix", "like_prefix"), (config.prefix, config.like_prefix), kinds, strict=True
        ):
            _check_prefix(who, prefix)
            if prefix is not None and (kind != "tokens" or "vector" in kinds or config.positions == "sequence"):
                raise ConfigError(f"{who}: found {prefix}, but no grid of tokens is looked for here; leave it out")
        self.steps = Steps(source, _join(source, like, config))

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.steps(source)
        return aligned

    def describe(self) -> str:
        return self.steps.describe()


ALIGNERS: list[type[Aligner]] = [Auto, Identity, Linear, Conv1x1, Pool, Resample, TokensToGrid, GridToTokens]


def _join(source: Shape, like: Shape, config: Auto.Config) -> list[nn.Module]:
    kinds = _layouts(source, like)
    linear = _linear(_channels(source), _channels(like))
    match kinds:
        case ("vector", "vector"):
            return linear
        case ("vector", _):
            return [*linear, spread(like)]
        case (_, "vector"):
            return [mean_over_positions(source), *linear]
        case ("map", "map"):
            return _map_to_map(source, like)
        case ("tokens", "map"):
            grid = _grid(source, "source", config.prefix, (like[1], like[2]), config)
            if grid is not None:
                return [tokens_to_map(grid), *_map_to_map((source[1], grid.height, grid.width), like)]
            flat = (like[1] * like[2], like[0])
            return [*_length(source, flat, linear), tokens_to_map(Grid(0, like[1], like[2]))]
        case ("map", "tokens"):
            grid = _grid(like, "like", config.like_prefix, (source[1], source[2]), config)
            if grid is not None:
                resized = (like[1], grid.height, grid.width)
                return [*_map_to_map(source, resized), map_to_tokens(like[0], grid.prefix)]
            flat = (source[1] * source[2], source[0])
            return [map_to_tokens(flat[0]), *_length(flat, like, linear)]
    grids = (
        _grid(source, "source", config.prefix, None, config),
        _grid(like, "like", config.like_prefix, None, config),
    )
    if source[0] == like[0] and grids[0] == grids[1]:
        return linear
    if grids[0] is not None and grids[1] is not None:
        resize = [resize_token_grid(grids[0], grids[1])]
        return [*resize, *linear] if like[0] < source[0] else [*linear, *resize]
    return _length(source, like, linear)


def _map_to_map(source: Shape, like: Shape, projection: list[nn.Module] | None = None) -> list[nn.Module]:
    """Pool what is larger, project where the map is smallest, interpolate what is smaller."""
    if projection is None:
        projection = [] if source[0] == like[0] else conv1x1(source[0], like[0])
    small = (min(source[1], like[1]), min(source[2], like[2]))
    pool = [] if small == source[1:] else [shrink_map(*small)]
    grow = [] if small == like[1:] else [resample_map(like[1], like[2])]
    return [*pool, *projection, *grow]


def _length(source: Shape, like: Shape, linear: list[nn.Module]) -> list[nn.Module]:
    """[B, N, D] -> [B, N', D'], projecting where the sequence is shortest."""
    if source[0] == like[0]:
        return linear
    resize = [resize_length(source[0], like[0])]
    return [*resize, *linear] if like[0] < source[0] else [*linear, *resize]


def _linear(channels: int, wanted: int) -> list[nn.Module]:
    return [] if channels == wanted else [nn.Linear(channels, wanted)]


def _grid(shape: Shape, who: str, prefix: int | None, near: tuple[int, int] | None, config: Auto.Config) -> Grid | None:
    if config.positions == "sequence":
        return None
    grid = find_grid(shape[0], prefix, near)
    if grid is None and (config.positions == "grid" or prefix is not None):
        raise _no_grid(shape, who, prefix)
    return grid


def _no_grid(shape: Shape, who: str, prefix: int | None) -> PlanError:
    tried = ", ".join(map(str, PREFIXES)) if prefix is None else str(prefix)
    return PlanError(
        f"{who} {list(shape)}: {shape[0]} tokens form no grid after {tried} prefix tokens; "
        "give the right `prefix`, or use auto with `positions: sequence`"
    )


def _refusal(name: str, source: Shape, like: Shape, reason: str, better: str) -> PlanError:
    return PlanError(f"{name} cannot bring {list(source)} to {list(like)}: {reason}; `use: {better}` can")


def _shapes(given: Given) -> tuple[Shape, Shape]:
    return tuple(given.shape("source")), tuple(given.shape("like"))


def _layouts(source: Shape, like: Shape) -> tuple[str, str]:
    return layout(source, "source"), layout(like, "like")


def _channels(shape: Shape) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def _places(shape: Shape) -> Shape:
    return shape[1:] if len(shape) == 3 else shape[:-1]


def _check_prefix(name: str, prefix: int | None) -> None:
    if prefix is not None and prefix < 0:
        raise ConfigError(f"{name}: found {prefix}, expected a number of tokens from 0")
