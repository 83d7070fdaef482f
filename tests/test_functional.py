"""Facts of `kdx/functional.py`: the learner with other weights, without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import DISTIL, PLUGIN, STATEFUL, Seen, config_of, quiet, session_of
from torch import Tensor

import kdx
from kdx.builtin.updaters import Plain
from kdx.config import load_mapping
from kdx.functional import Present
from kdx.loop import Session, make_session, step
from kdx.runs import build_plan, prepare
from kdx.runtime import Runtime
from kdx.types import Batch, Losses

DRAWING = '''
"""A target that counts its calls and draws."""
import torch
import kdx

class Drawing(kdx.Target):
    name = "drawing"
    inputs = {"logits": "teacher.logits"}
    outputs = ("logits",)

    def __init__(self, config, given):
        super().__init__(config, given)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits):
        self.calls += 1
        return {"logits": logits + torch.rand(logits.shape, generator=self.given.generator)}

@kdx.hookimpl
def kdx_targets():
    return [Drawing]
'''


def present(session: Session) -> tuple[Present, Losses]:
    """The first micro-batch, and what the learner gives for it by itself."""
    batch, knobs = session.feed.at(0), session.knobs.at(session.clock)
    kept = session.teachers(batch, knobs)
    here = Present(session.teachers, session.learner, batch, kept, knobs, session.runtime.autocast)
    return here, session.learner(batch, kept, knobs)


def part_of(batch: Batch, size: int) -> Batch:
    return {name: stream[:size] for name, stream in batch.items()}


def state_of(session: Session) -> dict[str, Tensor]:
    nodes = {name: node.given.generator.get_state() for name, node in session.learner.nodes.items()}
    return {**session.learner.state_dict(), **nodes}


def test_its_own_weights_give_its_own_losses_and_gradients() -> None:
    session = session_of(DISTIL)
    here, expected = present(session)
    weights = {name: weight.detach().requires_grad_() for name, weight in session.runtime.weights().items()}
    found = here.losses(weights)
    torch.testing.assert_close(found.total, expected.total)
    ours = torch.autograd.grad(found.total, [*weights.values()])
    theirs = torch.autograd.grad(expected.total, [*session.runtime.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_other_weights_give_other_losses_and_second_derivatives() -> None:
    session = session_of(DISTIL)
    here, expected = present(session)
    weights = {name: (weight * 1.1).detach().requires_grad_() for name, weight in session.runtime.weights().items()}
    found = here.losses(weights)
    assert not torch.isclose(found.total, expected.total)
    first = torch.autograd.grad(found.parts["kd"], [*weights.values()], create_graph=True, materialize_grads=True)
    total = torch.stack([gradient.square().sum() for gradient in first]).sum()
    second = torch.autograd.grad(total, [*weights.values()], materialize_grads=True)
    assert any(bool(gradient.any()) for gradient in second)


def test_another_batch_is_seen_by_the_teachers_too() -> None:
    session = session_of(DISTIL)
    here, _ = present(session)
    part = part_of(here.batch, 5)
    kept = session.teachers(part, here.knobs)
    session.learner.train()
    expected = session.learner(part, kept, here.knobs)
    torch.testing.assert_close(here.losses({}, part).total, expected.total)


def test_it_leaves_no_trace_even_where_nodes_remember_and_draw() -> None:
    session = session_of(STATEFUL)
    here, losses = present(session)
    before = {name: value.clone() for name, value in state_of(session).items()}
    here.losses({}, part_of(here.batch, 4))
    here.losses({})
    after = state_of(session)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    losses.total.backward()  # type: ignore[no-untyped-call]


def test_the_teacher_side_is_left_as_it_was_too(tmp_path: Path) -> None:
    plugin = tmp_path / "drawing.py"
    plugin.write_text(DRAWING)
    drawn = {"targets": {"drawn": {"use": "drawing"}}, "losses": {"kd": {"inputs": {"teacher": "drawn.logits"}}}}
    config = config_of(DISTIL, {"plugins": [str(PLUGIN), str(plugin)], **drawn})
    found = prepare(load_mapping(config), quiet())
    plan = build_plan(found, quiet(), trained=True)
    session = make_session(found.spec, plan, found.dataset, found.splits, Runtime(found.spec.runtime))
    here, _ = present(session)
    node = session.teachers.nodes["targets/drawn"]
    before = node.given.generator.get_state()
    here.losses({}, part_of(here.batch, 4))
    assert node.calls == 1
    assert torch.equal(node.given.generator.get_state(), before)


def test_a_weight_that_is_not_there_is_refused() -> None:
    here, _ = present(session_of(DISTIL))
    with pytest.raises(kdx.PlanError, match="the learner has no weight 'student'"):
        here.losses({"student": torch.zeros(1)})


class Asking(Plain):
    """An updater that says that it looks ahead."""

    eager = True


def test_an_updater_can_ask_for_it() -> None:
    session = session_of(DISTIL)
    session.updater = Asking(session.updater.config)
    step(session, session.feed.at(0), session.knobs.at(session.clock))
    engine = session.runtime
    assert len(engine.batch["index"]) == 12
    assert set(engine.weights("align.mid")) < set(engine.weights())
    assert engine.weights("align.mid")
    assert not engine.weights("targets.mid")
    assert engine.losses({}).total.isfinite()


def test_an_updater_that_does_not_say_so_cannot_ask() -> None:
    session = session_of(DISTIL)
    step(session, session.feed.at(0), session.knobs.at(session.clock))
    with pytest.raises(kdx.PluginError, match=r"asks for `engine.losses`, but its class does not say `eager = True`"):
        session.runtime.losses({})
    with pytest.raises(kdx.PluginError, match=r"asks for `engine.gradients`, but its class does not say"):
        session.runtime.gradients(torch.ones(()))


def test_an_updater_cannot_look_ahead_once_the_update_is_over() -> None:
    session = session_of(DISTIL, {"train": {"updater": {"use": "pcgrad"}}})
    Seen(session)
    with pytest.raises(kdx.PluginError, match=r"asks for `engine.losses` after the update, expected in `backward`"):
        session.runtime.losses({})


def test_a_compiled_step_cannot_be_asked() -> None:
    session = session_of(DISTIL)
    object.__setattr__(session.runtime.options, "compile", True)
    with pytest.raises(kdx.ConfigError, match=r"runtime\.compile: the updater looks ahead"):
        session.runtime.losses({})
