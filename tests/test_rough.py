"""Facts of `kdx/rough.py`: weights that are soon drawn have the form and spread of others, and never train."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from builders import FACTS, WIDE, batch, spec_of
from small_run import CASCADE, PLAIN, prepared, quiet
from torch import Tensor, nn

from kdx.builtin.tensor_data import TensorDataset
from kdx.config import load_mapping
from kdx.loop import Session
from kdx.plan import make_plan
from kdx.randomness import derive_seed, random_state, same_random_state
from kdx.rough import DRAWN, RoughDraws
from kdx.runs import Prepared, build_plan, check_run, family, prepare, steps_of, to_its_end

LARGE = {"student": {"width": 64}}
"""A student with a weight of more numbers than are drawn for a rough one."""


def drawn(shape: tuple[int, ...], *, rough: bool, **options: Any) -> Tensor:
    with torch.random.fork_rng(), RoughDraws() if rough else nullcontext():
        torch.manual_seed(3)
        return torch.empty(shape).normal_(2.0, 0.5, **options)


@pytest.mark.parametrize("size", [1, 100, DRAWN])
def test_a_short_tensor_is_drawn_as_ever(size: int) -> None:
    assert torch.equal(drawn((size,), rough=True), drawn((size,), rough=False))


@pytest.mark.parametrize("shape", [(DRAWN + 1,), (2 * DRAWN,), (2 * DRAWN - 1,), (128, 64, 3, 3)])
def test_a_long_tensor_repeats_its_first_numbers(shape: tuple[int, ...]) -> None:
    found = drawn(shape, rough=True)
    flat = found.flatten()
    assert found.shape == shape
    assert torch.equal(flat[:DRAWN], drawn((DRAWN,), rough=False))
    assert torch.equal(flat[DRAWN:], flat[:-DRAWN])
    assert found.mean() == pytest.approx(2.0, abs=0.02)
    assert found.std() == pytest.approx(0.5, abs=0.02)


def test_the_rows_of_a_rough_weight_differ() -> None:
    with RoughDraws():
        weight = nn.init.kaiming_normal_(torch.empty(512, 512))
    assert len(weight.unique(dim=0)) == 512
    assert torch.linalg.matrix_rank(weight.double()) == 512  # in float32 rounding takes one away now and then


def test_a_generator_of_its_own_gives_as_many_numbers_as_ever() -> None:
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    shape = (3 * DRAWN,)
    assert torch.equal(drawn(shape, rough=True, generator=one), drawn(shape, rough=False, generator=other))
    assert torch.equal(one.get_state(), other.get_state())


def test_a_tensor_that_does_not_lie_in_one_piece_is_drawn_as_ever() -> None:
    found = []
    for way in (nullcontext, RoughDraws):
        whole = torch.zeros(DRAWN, 4)
        with torch.random.fork_rng(), way():
            torch.manual_seed(3)
            whole[:, :2].uniform_()
        found.append(whole)
    assert torch.equal(*found)
    assert found[0][:, :2].any()
    assert not found[0][:, 2:].any()


def test_a_rough_plan_has_the_shapes_and_the_spread_of_another() -> None:
    spec = spec_of({"student": WIDE})
    rough, other = (make_plan(spec, FACTS, batch(), rough=way) for way in (True, False))
    assert rough.shapes == other.shapes
    ours, theirs = rough.student.network.net.state_dict(), other.student.network.net.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    long = {name for name, value in ours.items() if value.numel() > DRAWN}
    assert long == {"layer4.0.conv1.weight", "layer4.0.conv2.weight"}
    for name in long:
        assert not torch.equal(ours[name], theirs[name])
        assert ours[name].std() == pytest.approx(theirs[name].std().item(), rel=0.05)


def begun(run: Prepared) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """All weights, statistics and random numbers that a run has before its first update."""
    sessions: list[Session] = []
    steps = steps_of(run, quiet(join=sessions.append))
    next(steps)
    (session,) = sessions
    found = copy.deepcopy({**session.learner.state_dict(), **session.teachers.state_dict()}), random_state()
    steps.close()
    return found


@pytest.mark.parametrize("config", [PLAIN, CASCADE], ids=["alone", "with the runs that it needs"])
def test_a_run_begins_with_the_same_weights_and_random_numbers_whether_it_was_checked_or_not(
    config: dict[str, Any], tmp_path: Path
) -> None:
    found = prepared(config, LARGE, {"out": str(tmp_path)})
    for run, how in family(found, quiet()):
        unchecked, random = begun(run)
        check_run(run, how)
        checked, other = begun(run)
        assert same_random_state(random, other)
        assert unchecked.keys() == checked.keys()
        assert all(torch.equal(unchecked[name], checked[name]) for name in unchecked)
        if run in found.needs.values():
            to_its_end(steps_of(run, how))


def test_a_check_leaves_the_random_state_and_its_weights_are_not_those_of_the_run(tmp_path: Path) -> None:
    found, before = prepared(PLAIN, LARGE, {"out": str(tmp_path)}), random_state()
    checked = check_run(found, quiet()).student.network.net.state_dict()
    assert same_random_state(before, random_state())
    begun = build_plan(found, quiet(), trained=True).student.network.net.state_dict()
    assert any(not torch.equal(checked[name], begun[name]) for name in begun)


def test_the_nets_of_a_run_are_those_that_timm_makes_with_their_seeds(tmp_path: Path) -> None:
    data = {name: {"image": torch.rand(8, 1, 28, 28), "label": torch.arange(8) % 3} for name in ("train", "test")}
    config = {"name": "nets", "out": str(tmp_path), "baseline": False, "data": {"use": "tensors"}, "student": WIDE,
              "teachers": {"wide": WIDE}, "losses": {"kd": {"use": "kd"}},
              "train": {"updates": 1, "batch": 4}}  # fmt: skip
    run = prepare(load_mapping(config), quiet(data=TensorDataset.from_tensors(**data)))
    check_run(run, quiet())
    weights, _ = begun(run)
    for name in ("student", "wide"):
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(0, "model", name))
            expected = timm.create_model(WIDE["model"], in_chans=1, num_classes=3, **WIDE["args"]).state_dict()
        found = {key: value for key, value in weights.items() if f"/{name}." in key}
        assert len(found) == len(expected)
        assert all(torch.equal(found[f"models.model/{name}.network.net.{key}"], expected[key]) for key in expected)
