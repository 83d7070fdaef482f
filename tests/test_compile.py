"""Facts of `runtime.compile`: a graph of the teachers and one of the learner's both passes, with equal numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from small_run import DISTIL, PLAIN, STATEFUL, Seen, session_of
from torch._dynamo.utils import counters

from kdx.loop import Session

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


def test_a_plain_student_is_one_graph_of_both_passes() -> None:
    session = session_of(PLAIN, COMPILED)
    assert is_whole(session)
    assert counters["stats"]["unique_graphs"] == 1
