"""Facts of `kdx/one_graph.py`: one graph of both passes; what it cannot hold is left out, with equal numbers."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdx.errors import PluginError
from kdx.one_graph import OneGraph, compiler_of
from kdx.types import Losses

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.slow,
]
QUICK = {"backend": "aot_eager", "dynamic": False}
"""Follows both passes as every compiler does, and makes no code of them."""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


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


class Counting(nn.Module):
    """A learner that counts its updates in Python, each of which is then another function to a compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))
        self.count = 0

    def forward(self, batch: dict[str, Tensor], kept: Mapping[str, Tensor], knobs: Mapping[str, Tensor]) -> Losses:
        self.count += 1
        total = (batch["x"] @ self.weight).square().mean() * self.count
        return Losses(total, {}, parts={"a": total})


def batch() -> dict[str, Tensor]:
    return {"x": torch.rand(5, 4, generator=torch.Generator().manual_seed(1))}


def gradient_of(graph: Callable[..., Losses], weight: nn.Parameter) -> Tensor:
    """The gradient of one update, whoever has it."""
    total = graph(batch(), {}, {}).total
    found = graph.take(total) if isinstance(graph, OneGraph) else None
    if found is not None:
        return found[0][1]
    total.backward()
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    return gradient


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


def test_a_learner_that_is_another_one_in_each_update_goes_on_without_the_graph() -> None:
    """Torch keeps eight graphs of a function, and then raises what is no error of its compiler's class."""
    compiled, eager = Counting(), Counting()
    graph = OneGraph(compiled, QUICK)
    for _ in range(torch._dynamo.config.recompile_limit):
        torch.testing.assert_close(gradient_of(graph, compiled.weight), gradient_of(eager, eager.weight))
    with pytest.warns(UserWarning, match=r"the backward pass is not in the graph: .+ changes from update to update"):
        found = gradient_of(graph, compiled.weight)
    torch.testing.assert_close(found, gradient_of(eager, eager.weight))
    assert compiled.count == eager.count == torch._dynamo.config.recompile_limit + 1


def halved(weight: nn.Parameter) -> None:
    weight.register_hook(lambda gradient: gradient / 2)


def halved_in_place(weight: nn.Parameter) -> None:
    def halve(weight: Any) -> None:
        weight.grad.div_(2)

    weight.register_post_accumulate_grad_hook(halve)


@pytest.mark.parametrize("hook", [halved, halved_in_place])
def test_a_hook_on_a_weight_sees_its_gradient(hook: Callable[[nn.Parameter], None]) -> None:
    plain, hooked = Counting(), Counting()
    hook(hooked.weight)
    with pytest.warns(UserWarning, match=r"not in the graph: weight has a hook that waits for its gradient"):
        found = gradient_of(OneGraph(hooked, QUICK), hooked.weight)
    torch.testing.assert_close(found, gradient_of(plain, plain.weight) / 2)


class Branching(Counting):
    """A learner that goes this way or that by a number of the batch."""

    def forward(self, batch: dict[str, Tensor], kept: Mapping[str, Tensor], knobs: Mapping[str, Tensor]) -> Losses:
        losses = super().forward(batch, kept, knobs)
        if batch["x"].sum() > 0:
            return losses
        raise ValueError("never here")


def test_the_warning_names_the_line_that_no_compiler_follows() -> None:
    branching = Branching()
    with pytest.warns(UserWarning, match=r"in the graph: Data-dependent .+ \(test_one_graph\.py, line [0-9]+\)"):
        gradient_of(OneGraph(branching, QUICK), branching.weight)
