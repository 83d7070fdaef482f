"""The classes that plugins derive from."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.components import Component, Given, Knob, Loss, Many, Metric, Model, Network, Schedule, Target, per_sample
from kdx.errors import PlanError
from kdx.types import Clock


@pytest.mark.parametrize(
    ("knob", "good", "bad", "problem"),
    [
        (Knob(1.0), -1e9, math.inf, "must be a finite number"),
        (Knob(1.0), 0.0, math.nan, "must be a finite number"),
        (Knob(1.0, above=0.0), 1e-9, 0.0, "must be above 0"),
        (Knob(1.0, at_least=0.0), 0.0, -1e-9, "must be at least 0"),
        (Knob(1.0, at_most=1.5), 1.5, 1.6, "must be at most 1.5"),
        (Knob(1.0, above=0.0, at_most=1.0), 1.0, 2.0, "must be at most 1"),
    ],
)
def test_a_knob_knows_its_range(knob: Knob, good: float, bad: float, problem: str) -> None:
    assert knob.problem(good) is None
    assert knob.problem(bad) == problem


def test_a_knob_for_each_sample_broadcasts_against_any_tensor() -> None:
    knob = torch.tensor([1.0, 2.0])
    like = torch.ones(2, 3, 4)
    assert torch.equal(per_sample(knob, like) * like, torch.stack([like[0], 2 * like[1]]))
    assert per_sample(torch.tensor(3.0), like).shape == ()
    assert per_sample(knob, torch.ones(2)).shape == (2,)


def test_given_has_sensible_defaults_for_a_component_that_is_used_by_itself() -> None:
    given = Given()
    assert given.facts.classes == ()
    assert torch.rand(1, generator=given.generator).shape == (1,)
    assert Given(shapes={"a": (3, 4)}).shape("a") == (3, 4)
    with pytest.raises(KeyError):
        given.shape("a")


def test_given_names_who_is_behind_an_input_of_many_refs() -> None:
    refs = {"logits": ["wide.logits", "vit@strong.logits"], "label": "batch.label"}
    assert Given(shapes={"logits": [(3,), (3,)]}, refs=refs).owners("logits") == ("wide", "vit@strong")
    assert Given(shapes={"logits": [(3,), (3,)]}).owners("logits") == ("0", "1")


def test_marks_read_as_their_public_names() -> None:
    assert repr(kdx.REQUIRED) == "kdx.REQUIRED"
    assert repr(kdx.OPTIONAL) == "kdx.OPTIONAL"


def test_an_input_that_takes_many_has_any_number_of_defaults() -> None:
    assert Many().default == ()
    assert Many("a.x", "b.y").default == ("a.x", "b.y")


def test_a_component_has_no_options_unless_it_says_so() -> None:
    config = Component.Config()
    assert dataclasses.fields(config) == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.a = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Model, Schedule, Metric])
def test_an_abstract_component_cannot_be_made(kind: type[Component]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind(None, None, None)


def test_a_schedule_is_what_defines_at() -> None:
    class Twice(Schedule):
        def at(self, clock: Clock) -> float:
            return clock.time * 2

    assert Twice(None).at(Clock(5, 10, 100)) == 1.0


# --- networks


class Halves(nn.Module):
    """Gives what it is asked for, to see what a network does with it."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer
        self.layer = nn.Linear(2, 2)

    def forward(self, *streams: Tensor) -> object:
        return self.answer if self.answer is not None else sum(streams)


class Predicts(Halves):
    def predict(self, *streams: Tensor) -> Tensor:
        return streams[0] * 10


def test_a_network_prepares_each_of_its_streams() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    network = Network(Halves(None), ("a", "b"), Double())
    assert network(torch.ones(2), torch.ones(2)).tolist() == [4.0, 4.0]
    assert Network(Halves(None))(torch.ones(2)).tolist() == [1.0, 1.0]


def test_what_is_saved_of_a_network_has_the_names_of_the_bare_net() -> None:
    assert set(Network(Halves(None)).net.state_dict()) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize(
    "answer", [torch.ones(2), {"logits": torch.ones(2), "more": torch.zeros(2)}, (torch.ones(2), torch.zeros(2))]
)
def test_the_answer_of_a_network_is_its_logits(answer: object) -> None:
    assert Network(Halves(answer)).answer({"image": torch.zeros(2)}).tolist() == [1.0, 1.0]


def test_the_answer_of_a_network_is_its_prediction_where_it_has_one() -> None:
    assert Network(Predicts(None)).answer({"image": torch.ones(2)}).tolist() == [10.0, 10.0]


def test_an_answer_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(PlanError, match="Halves answers with a str, expected a tensor"):
        Network(Halves("words")).answer({"image": torch.ones(2)})


# --- nodes


class Scaled(Target):
    name = "scaled"
    inputs = {"x": kdx.REQUIRED}

    def __init__(self, config: Scaled.Config, given: Given) -> None:
        super().__init__(config, given)
        self.scale = nn.Parameter(torch.ones(given.shape("x")))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_node_is_a_module_with_its_config_and_what_it_was_given() -> None:
    given = Given(shapes={"x": (3,)})
    node = Scaled(Scaled.Config(), given)
    assert node.given is given
    assert set(node.state_dict()) == {"scale", "seen"}
    assert node.calibrate(x=torch.ones(3)) is None
    assert node.after_update(Clock(0, 1, 1)) is None


def test_a_loss_changes_nothing_about_what_is_deployed_unless_it_says_so() -> None:
    assert Loss.answers == ()
    with pytest.raises(AssertionError, match="names no inputs"):
        Loss(None, Given()).answer()
