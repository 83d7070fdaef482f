"""Random numbers of samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdx.randomness import Randomness, _mix, derive_seed, seeded


def lowbias32(x: int) -> int:
    """The hash as published, in Python's unbounded integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@given(st.integers(0, 2**32 - 1))
def test_the_hash_is_the_published_one(x: int) -> None:
    assert _mix(torch.tensor([x])).item() == lowbias32(x)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True), st.integers(0, 5))
def test_the_numbers_of_a_sample_do_not_depend_on_its_company(indices: list[int], view: int) -> None:
    together = Randomness(7, view, torch.tensor(indices)).uniform("a", 3, 2)
    alone = torch.cat([Randomness(7, view, torch.tensor([i])).uniform("a", 3, 2) for i in indices])
    assert torch.equal(together, alone)


def test_the_numbers_stay_the_same_between_versions() -> None:
    numbers = Randomness(1, 2, torch.tensor([0, 1, 2**35])).integers("flip", 0, 1000, 2)
    assert numbers.tolist() == [[583, 65], [109, 156], [401, 845]]


@pytest.mark.parametrize("other", [(8, 0, "a"), (7, 1, "a"), (7, 0, "b")])
def test_seed_view_and_name_each_give_unrelated_numbers(other: tuple[int, int, str]) -> None:
    index = torch.arange(20000)
    first = Randomness(7, 0, index).uniform("a")
    second = Randomness(other[0], other[1], index).uniform(other[2])
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.03


def test_neighbours_and_places_are_unrelated() -> None:
    numbers = Randomness(3, 0, torch.arange(20000)).uniform("a", 4)
    shifted = torch.cat([numbers[:-1], numbers[1:]], 1).T
    off_diagonal = torch.corrcoef(shifted) - torch.eye(8)
    assert off_diagonal.abs().max() < 0.03


def test_numbers_are_uniform() -> None:
    numbers = Randomness(3, 0, torch.arange(100)).uniform("a", 1000).flatten()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = numbers.mul(50).long().bincount(minlength=50)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 85  # 49 degrees of freedom: exceeded once in a thousand seeds


def test_no_two_samples_share_a_stretch_of_numbers() -> None:
    numbers = Randomness(0, 0, torch.arange(3000)).integers("a", 0, 2**24, 300)
    pairs = numbers[:, :-1] * 2**24 + numbers[:, 1:]  # 48 bits each: all of them differ unless stretches repeat
    assert len(pairs.flatten().unique()) == pairs.numel()


def test_integers_cover_their_range_and_nothing_else() -> None:
    numbers = Randomness(0, 0, torch.arange(2000)).integers("a", -2, 3)
    assert sorted(set(numbers.tolist())) == [-2, -1, 0, 1, 2]
    assert numbers.dtype == torch.int64


def test_an_empty_range_of_integers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shift: no whole numbers can be drawn from \[3, 3\)"):
        Randomness(0, 0, torch.arange(2)).integers("shift", 3, 3)


def test_shapes_are_those_asked_for() -> None:
    randomness = Randomness(0, 0, torch.arange(5))
    assert randomness.uniform("a").shape == (5,)
    assert randomness.uniform("a", 1, 2, 3).shape == (5, 1, 2, 3)
    assert Randomness(0, 0, torch.arange(0)).uniform("a", 2).shape == (0, 2)


def test_torchs_own_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    Randomness(0, 0, torch.arange(5)).uniform("a", 4)
    seeded("x").initial_seed()
    assert torch.equal(before, torch.get_rng_state())


def test_derived_seeds_tell_their_parts_apart() -> None:
    assert derive_seed("a", "bc") != derive_seed("ab", "c")
    assert derive_seed("student", 0) == derive_seed("student", "0")
    assert 0 <= derive_seed(1) < 2**63
    assert torch.equal(torch.rand(3, generator=seeded(1, 2)), torch.rand(3, generator=seeded(1, 2)))
