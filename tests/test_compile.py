"""Facts of `runtime.compile`: a compiled step is a graph of the teachers and one of the learner, with equal numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from small_run import DISTIL, Seen, session_of
from torch._dynamo.utils import counters

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
COMPILED = {"runtime": {"compile": True}}


@pytest.mark.slow
def test_a_compiled_training_is_an_eager_one_within_rounding() -> None:
    torch.compiler.reset()
    counters.clear()
    found, expected = Seen(session_of(DISTIL, COMPILED)), Seen(session_of(DISTIL))
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"], dict(counters["graph_break"])
    for mine, own in zip(found.steps, expected.steps, strict=True):
        assert mine.numbers() == pytest.approx(own.numbers(), rel=1e-3, abs=1e-4)
