"""Aligners: every pair of layouts is joined without a number typed; what cannot be joined is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdx.builtin.aligners import ALIGNERS, Auto, Conv1x1, GridToTokens, Identity, Linear, Pool, Resample, TokensToGrid
from kdx.builtin.layouts import Grid, find_grid
from kdx.components import Aligner, Given
from kdx.errors import ConfigError, PlanError
from kdx.testing import check_aligner
from kdx.types import Shape

CHANNELS = st.integers(1, 4)
SIDES = st.integers(1, 9)
SHAPES = st.one_of(
    st.tuples(CHANNELS),
    st.tuples(st.integers(1, 60), CHANNELS),
    st.tuples(CHANNELS, SIDES, SIDES),
)


def make(kind: type[Aligner], source: Shape, like: Shape, **options: Any) -> Any:
    return kind(kind.Config(**options), Given(shapes={"source": source, "like": like}))


def batch(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


@settings(max_examples=200, deadline=None)
@given(source=SHAPES, like=SHAPES)
def test_auto_joins_any_two_shapes_and_lets_the_gradient_through(source: Shape, like: Shape) -> None:
    torch.manual_seed(0)
    aligner = make(Auto, source, like)
    x = batch(*source).requires_grad_()
    out = aligner(x)
    assert tuple(out.shape) == (2, *like)
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert all(weight.grad is not None for weight in aligner.parameters())


@settings(max_examples=60, deadline=None)
@given(source=SHAPES, like=SHAPES)
def test_auto_has_parameters_only_where_the_channels_differ(source: Shape, like: Shape) -> None:
    def channels(shape: Shape) -> int:
        return shape[0] if len(shape) == 3 else shape[-1]

    assert any(True for _ in make(Auto, source, like).parameters()) == (channels(source) != channels(like))


@pytest.mark.parametrize(
    ("source", "like"),
    [
        ((4, 8, 8), (6, 4, 4)),
        ((4, 3, 3), (4, 7, 5)),
        ((17, 4), (6, 7, 7)),
        ((4, 7, 7), (50, 6)),
        ((50, 4), (17, 4)),
        ((30, 4), (12, 3)),
        ((12, 3), (30, 4)),
        ((5,), (3, 2, 2)),
        ((9, 5), (3,)),
        ((5,), (7,)),
    ],
)
def test_auto_keeps_the_contract(source: Shape, like: Shape) -> None:
    check_aligner(Auto, source=source, like=like)


@pytest.mark.parametrize(
    ("kind", "source", "like", "options"),
    [
        (Identity, (4, 3), (4, 3), {}),
        (Linear, (4,), (6,), {"bias": False}),
        (Linear, (9, 4), (9, 6), {}),
        (Conv1x1, (4, 8, 8), (6, 4, 4), {"norm": True}),
        (Conv1x1, (4, 4, 8), (4, 8, 4), {}),
        (Pool, (4, 8, 7), (4, 4, 3), {}),
        (Pool, (4, 8, 7), (4,), {}),
        (Pool, (9, 4), (5, 4), {}),
        (Pool, (9, 4), (4,), {}),
        (Resample, (4, 3, 3), (4, 7, 2), {}),
        (Resample, (4, 3, 3), (4, 7, 2), {"mode": "nearest"}),
        (Resample, (5, 4), (8, 4), {}),
        (Resample, (5, 4), (8, 4), {"mode": "nearest"}),
        (TokensToGrid, (10, 4), (4, 3, 3), {}),
        (TokensToGrid, (9, 4), (4, 2, 3), {"prefix": 3}),
        (GridToTokens, (4, 3, 3), (10, 4), {}),
    ],
)
def test_every_aligner_keeps_the_contract(
    kind: type[Aligner], source: Shape, like: Shape, options: dict[str, Any]
) -> None:
    check_aligner(kind, source=source, like=like, **options)


@pytest.mark.parametrize("source", [(4, 5, 5), (26, 4), (30, 4), (4,)])
@pytest.mark.parametrize("like", [(6, 3, 7), (10, 6), (33, 6), (6,)])
def test_auto_works_in_half_precision(source: Shape, like: Shape) -> None:
    out = make(Auto, source, like).half()(batch(*source).half())
    assert out.dtype == torch.float16
    assert tuple(out.shape) == (2, *like)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("source", "like", "words"),
    [
        ((49, 192), (64, 14, 14), "tokens 49x192 -> grid 7x7 -> conv1x1 192->64 -> resample 14x14"),
        ((197, 192), (64, 7, 7), "tokens 197x192 -> drop 1 prefix, grid 14x14 -> pool 7x7 -> conv1x1 192->64"),
        ((64, 7, 7), (50, 384), "map 64x7x7 -> conv1x1 64->384 -> tokens 50 with 1 prefix"),
        ((197, 8), (50, 8), "tokens 197x8 -> (1 prefix + grid 14x14) to (1 prefix + grid 7x7)"),
        ((13, 64), (32, 7, 7), "tokens 13x64 -> linear 64->32 -> resample to length 49 -> grid 7x7"),
        ((99, 64), (40, 32), "tokens 99x64 -> pool to length 40 -> linear 64->32"),
        ((64, 7, 7), (10,), "map 64x7x7 -> mean over 49 positions -> linear 64->10"),
        ((10,), (64, 7, 7), "vector 10 -> linear 10->64 -> spread over 7x7"),
        ((8, 2, 2), (8, 2, 2), "map 8x2x2, as it is"),
    ],
)
def test_auto_says_in_words_what_it_does(source: Shape, like: Shape, words: str) -> None:
    assert make(Auto, source, like).describe() == words


def test_tokens_and_their_grid_are_the_same_numbers_in_row_order() -> None:
    x = batch(10, 4)
    grid = make(Auto, (10, 4), (4, 3, 3))(x)
    assert torch.equal(grid[:, :, 1, 2], x[:, 1 + 5])
    back = make(Auto, (4, 3, 3), (10, 4))(grid)
    assert torch.equal(back[:, 1:], x[:, 1:])
    torch.testing.assert_close(back[:, 0], x[:, 1:].mean(1))


def test_prefix_tokens_are_carried_over_when_a_grid_changes_its_size() -> None:
    x = batch(18, 4)  # class, distillation, 4x4
    out = make(Auto, (18, 4), (5, 4))(x)  # class, 2x2
    assert torch.equal(out[:, 0], x[:, 0])
    torch.testing.assert_close(out[:, 1], x[:, [2, 3, 6, 7]].mean(1))


def test_a_larger_map_is_averaged_and_a_smaller_one_interpolated() -> None:
    x = batch(2, 4, 4)
    torch.testing.assert_close(make(Auto, (2, 4, 4), (2, 2, 2))(x)[:, :, 0, 0], x[:, :, :2, :2].mean((2, 3)))
    nearest = make(Resample, (2, 4, 4), (2, 8, 8), mode="nearest")(x)
    torch.testing.assert_close(nearest, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_a_sequence_is_never_read_as_a_grid_when_told_so() -> None:
    aligner = make(Auto, (100, 4), (49, 4), positions="sequence")
    assert aligner.describe() == "tokens 100x4 -> pool to length 49"
    with pytest.raises(PlanError, match=r"source \[99, 4\]: 99 tokens form no grid after 0, 1, 2, 4, 5 prefix"):
        make(Auto, (99, 4), (49, 4), positions="grid")


@pytest.mark.parametrize(
    ("tokens", "prefix", "near", "grid"),
    [
        (196, None, None, Grid(0, 14, 14)),
        (197, None, None, Grid(1, 14, 14)),
        (198, None, None, Grid(2, 14, 14)),
        (201, None, None, Grid(5, 14, 14)),
        (13, None, None, None),
        (17, 3, None, None),
        (1214, None, (12, 101), Grid(2, 12, 101)),
        (129, None, (4, 8), Grid(1, 8, 16)),
    ],
)
def test_a_grid_of_tokens_is_found_with_its_prefix(
    tokens: int, prefix: int | None, near: tuple[int, int] | None, grid: Grid | None
) -> None:
    assert find_grid(tokens, prefix, near) == grid


@pytest.mark.parametrize(
    ("kind", "source", "like", "reason"),
    [
        (Auto, (3, 4, 5, 6), (7,), r"source is \[3, 4, 5, 6\] for one sample; expected a vector"),
        (Auto, (7,), (), r"like is \[\] for one sample"),
        (Auto, (0, 4), (7,), "none of them empty"),
        (Identity, (4,), (5,), r"identity cannot bring \[4\] to \[5\]: shapes must be equal; `use: auto` can"),
        (Linear, (4, 2, 2), (5, 2, 2), "it takes vectors and tokens; `use: conv1x1` can"),
        (Linear, (4, 2), (5, 2), "only the last axis may differ"),
        (Conv1x1, (4, 2), (5, 2, 2), "both must be maps"),
        (Pool, (4, 2, 2), (5, 1, 1), "the channels must be equal"),
        (Pool, (4, 2, 2), (4, 3, 1), "pooling only shrinks; `use: resample` can"),
        (Pool, (4,), (4, 3, 3), "it does not change the layout"),
        (Resample, (4, 2, 2), (4, 4), "both must be maps, or both tokens"),
        (Resample, (4, 2, 2), (5, 4, 4), "the channels must be equal"),
        (TokensToGrid, (4, 2, 2), (4, 2, 2), "it goes from tokens to a map"),
        (TokensToGrid, (13, 4), (4, 3, 3), "13 tokens form no grid"),
        (TokensToGrid, (10, 4), (4, 6, 6), r"the tokens are 1 prefix \+ grid 3x3"),
        (GridToTokens, (4, 3, 3), (8, 4), "the map gives 9 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(
    kind: type[Aligner], source: Shape, like: Shape, reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        make(kind, source, like)


@pytest.mark.parametrize(
    ("kind", "source", "like", "options", "message"),
    [
        (Auto, (9, 4), (4, 3, 3), {"positions": "grids"}, "positions: found 'grids'; did you mean 'grid'"),
        (Auto, (9, 4), (4,), {"positions": "grid"}, "positions: found 'grid', but tokens and vector leave no choice"),
        (Auto, (9, 4), (4, 3, 3), {"prefix": -1}, "prefix: found -1"),
        (Auto, (4, 3, 3), (9, 4), {"prefix": 1}, "prefix: found 1, but no grid of tokens"),
        (Resample, (4, 3, 3), (4, 5, 5), {"mode": "bilinear"}, "mode: found 'bilinear'; did you mean 'linear'"),
        (GridToTokens, (4, 3, 3), (9, 4), {"prefix": -2}, "prefix: found -2"),
    ],
)
def test_options_without_meaning_are_refused_by_name(
    kind: type[Aligner], source: Shape, like: Shape, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        make(kind, source, like, **options)


def test_the_list_for_the_registry_starts_with_the_default_and_holds_each_name_once() -> None:
    names = [kind.name for kind in ALIGNERS]
    assert names[0] == "auto"
    assert len(set(names)) == len(names) == 8
