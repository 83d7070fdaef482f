"""Facts of `runtime.compile`: a graph of the teachers and one of the learner's both passes, with equal numbers."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_run import DISTIL, PLAIN, STATEFUL, Seen, session_of
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kdx.errors import PluginError
from kdx.loop import Session
from kdx.one_graph import OneGraph, compiler_of
from kdx.types import Losses

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.slow,
]
COMPILED = {"runtime": {"compile": True}}
GREEDY = {"train": {"accumulate": 2, "clip": 0.05, "optimizer": {"use": "sgd", "momentum": 0.9}}}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    counters.clear()


class Odd(nn.Module):
    """A learner whose gradients are easily confused: two are one tensor, one is a number that is reported, one lies in
    another layout than its weight, and one weight is out of reach.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (nn.Parameter(torch.rand(4, generator=generator)) for _ in range(2))
        self.scale = nn.Parameter(torch.rand((), generator=generator))
        self.turned = nn.Parameter(torch.rand(4, 3, generator=generator).T)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, batch: dict[str, Tensor], kept: Mapping[str, Tensor], knobs: Mapping[str, Tensor]) -> Losses:
        x = batch["x"] * (self.first + self.second) + batch["y"] @ self.turned
        term = x.square().mean(1)
        mean = term.detach().mean()
        total = term.mean() + self.scale * mean
        return Losses(total, {"a": term.detach()}, parts={"a": total}, means={"a": mean})


def odd_batch(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.rand(size, 4, generator=generator), "y": torch.rand(size, 3, generator=generator)}


def is_whole(session: Session) -> bool:
    """Whether a session gives losses without a graph, as their gradients are there already."""
    batch = session.feed.at(session.step)
    knobs = session.knobs.at(session.clock)
    return not session.forward(batch, session.teachers(batch, knobs), knobs).total.requires_grad


def check_equal(session: Session, *layers: Mapping[str, Any]) -> None:
    """Train a session and one that the same layers make, in eager calls; compare what both report and come to."""
    other = session_of(*layers)
    found, expected = Seen(session), Seen(other)
    for mine, own in zip(found.steps, expected.steps, strict=True):
        assert mine.numbers() == pytest.approx(own.numbers(), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(session.learner.state_dict(), other.learner.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("more", [{}, GREEDY], ids=["", "parts and a limit"])
def test_a_compiled_training_is_an_eager_one_within_rounding(more: Mapping[str, Any]) -> None:
    session = session_of(DISTIL, more, COMPILED)
    check_equal(session, DISTIL, more)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert is_whole(session)


def test_half_precision_is_that_of_eager_calls() -> None:
    half = {"runtime": {"precision": "bf16"}}
    found, expected = Seen(session_of(DISTIL, half, COMPILED)), Seen(session_of(DISTIL, half))
    for mine, own in zip(found.steps, expected.steps, strict=True):
        assert mine.numbers() == pytest.approx(own.numbers(), rel=2e-2, abs=2e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of code in pieces
def test_a_loss_that_no_compiler_follows_leaves_the_passes_apart() -> None:
    """`stateful` draws from a generator of its own."""
    layers = (STATEFUL, {"student": {"dropout": 0.0}})
    session = session_of(*layers, COMPILED)
    with pytest.warns(UserWarning, match=r"runtime\.compile: the backward pass is not in the graph: .+"):
        check_equal(session, *layers)
    assert not is_whole(session)


def test_an_updater_that_weighs_terms_leaves_the_passes_apart() -> None:
    layers = (DISTIL, {"plugins": ["kdx_plugins/balance.py"], "train": {"updater": {"use": "uncertainty_weighting"}}})
    session = session_of(*layers, COMPILED)
    check_equal(session, *layers)
    assert not is_whole(session)


def test_gradients_are_those_of_autograd_and_nobody_elses_tensors() -> None:
    learner = Odd()
    graph = OneGraph(learner, {})
    for size in (5, 7):  # the second size is another graph
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = graph(odd_batch(size), {}, {})
        expected = learner(odd_batch(size), {}, {})
        torch.testing.assert_close(losses.total, expected.total.detach())
        with pytest.raises(PluginError, match=r"another number than `losses\.total`, but its class says `by_total"):
            graph.take(losses.total.clone())
        found = graph.take(losses.total)
        assert found is not None
        assert graph.take(losses.total) is None
        weights = [learner.first, learner.second, learner.scale, learner.turned]
        assert [*map(id, weights)] == [id(weight) for weight, _ in found]
        own = torch.autograd.grad(expected.total, weights)
        for (weight, gradient), true in zip(found, own, strict=True):
            torch.testing.assert_close(gradient, true)
            assert gradient.stride() == weight.stride()
        tensors = [*(gradient for _, gradient in found), losses.total, losses.means["a"]]
        places = [tensor.data_ptr() for tensor in tensors]
        assert len({*places}) == len(places)


@pytest.mark.skipif("isolate_recompiles" not in compiler_of(torch.device("cpu")), reason="torch counts them together")
def test_the_graphs_of_one_learner_leave_those_of_others_alone() -> None:
    """Torch keeps eight graphs of a function; a study may train more learners than that in one process."""
    graphs = [OneGraph(Odd(), compiler_of(torch.device("cpu"))) for _ in range(9)]
    for graph in graphs:
        assert not graph(odd_batch(5), {}, {}).total.requires_grad


def test_a_weight_that_is_frozen_on_the_way_gets_no_gradient() -> None:
    learner = Odd()
    graph = OneGraph(learner, {})
    graph.take(graph(odd_batch(5), {}, {}).total)
    learner.first.requires_grad_(False)
    found = graph.take(graph(odd_batch(5), {}, {}).total)
    assert found is not None
    assert [id(weight) for weight, _ in found] == [*map(id, (learner.second, learner.scale, learner.turned))]


def test_a_plain_student_is_one_graph_of_both_passes() -> None:
    session = session_of(PLAIN, COMPILED)
    assert is_whole(session)
    assert counters["stats"]["unique_graphs"] == 1
