"""Facts of `kdx/updater.py`: what an updater is given, may ask for, shows, and keeps over a resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import DISTIL, PLUGIN, STATEFUL, Seen, config_of, prepared, quiet, run_in, session_of
from torch import Tensor, nn

import kdx
from kdx.bench import Bench
from kdx.builtin.updaters import Plain
from kdx.loop import step
from kdx.plugins import discover
from kdx.preflight import check_ready
from kdx.resume import restore, training_state
from kdx.runs import build_plan
from kdx.runtime import Runtime
from kdx.sections import RuntimeOptions
from kdx.testing import check_updater
from kdx.types import Clock

SGD = {"use": "sgd", "momentum": 0.9}
CPU = RuntimeOptions(device="cpu", precision="fp32")
OWN = """
import torch
from torch import nn
import kdx


class Own(kdx.Updater):
    \"\"\"Follows the total times a trained factor, which it shows, and draws a number for each update.\"\"\"

    name = "own"

    def __init__(self, config, given=None):
        super().__init__(config, given)
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("drawn", torch.zeros(()))
        self.ends = []

    def prepare(self, engine):
        self.optimizer = type(engine.optimizer).__name__

    def backward(self, losses, share, engine):
        engine.backward((self.factor * losses.total + self.factor**2) * share)

    def step(self, engine):
        self.drawn = torch.rand((), generator=self.given.generator)
        engine.update()

    def after_update(self, clock):
        assert not torch.is_grad_enabled()
        self.ends.append(clock.step)

    def shown(self):
        factor = self.factor.detach().clone()
        return {"losses.ce.weight": factor, "losses.kd.weight": factor, "train.updater.drawn": self.drawn}


@kdx.hookimpl
def kdx_updaters():
    return [Own]
"""


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "own_updater.py"
    path.write_text(OWN)
    return config_of(STATEFUL, {"plugins": [str(PLUGIN), str(path)], "train": {"updater": {"use": "own"}}})


@pytest.fixture
def registered(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same, known to the sessions of `small_run`."""
    found = discover(own["plugins"])
    monkeypatch.setattr("small_run.registry", lambda: found)
    return own


def test_an_updater_is_told_the_losses_and_the_optimizer(registered: dict[str, Any]) -> None:
    updater: Any = session_of(registered).updater
    assert updater.given.losses == {"ce": "cross_entropy", "kd": "kd", "hint": "mse", "own": "stateful"}
    assert len(updater.given.facts.classes) == 3
    assert updater.optimizer == "SGD"


def test_its_parameters_are_trained_with_the_student_and_without_weight_decay(registered: dict[str, Any]) -> None:
    session = session_of(registered, {"train": {"weight_decay": 0.1, "decay_vectors": True}})
    updater: Any = session.updater
    assert [*session.runtime.parameters()][-1] is updater.factor
    assert "factor" not in session.runtime.weights()
    groups = session.runtime.optimizer.param_groups
    assert [group["weight_decay"] for group in groups if any(p is updater.factor for p in group["params"])] == [0.0]
    Seen(session)
    assert updater.factor.item() != 1.0
    assert updater.ends == [1, 2, 3, 4, 5, 6]


def test_a_factor_of_a_knob_is_shown_as_the_weight_in_effect(registered: dict[str, Any]) -> None:
    session = session_of(registered, {"losses": {"ce": {"weight": 3.0}}})
    updater: Any = session.updater
    knobs = [session.knobs.at(Clock(at, session.steps_per_epoch, session.steps)) for at in range(6)]
    reports = Seen(session).steps
    last = reports[-1].knobs
    assert last["losses.ce.weight"].item() == pytest.approx(3.0 * updater.factor.item())
    assert last["losses.kd.weight"].item() == pytest.approx(knobs[5]["losses.kd.weight"].item() * updater.factor.item())
    assert last["train.updater.drawn"] == updater.drawn
    assert "losses.hint.weight" not in last


def test_its_numbers_lie_in_the_lines_of_a_run(own: dict[str, Any], tmp_path: Path) -> None:
    found = run_in(tmp_path / "runs", own, {"train": {"updates": 2}})
    lines = [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [line["knobs"]["train.updater.drawn"] for line in lines if line["kind"] == "step"]
    assert len(set(numbers)) == 2
    assert "losses.ce.weight" in lines[0]["knobs"]


def test_a_restored_session_goes_on_with_the_state_of_the_updater(registered: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        whole = session_of(registered)
        halves: list[Any] = []
        for at in range(whole.steps):
            if at == 4:
                halves.append(copy.deepcopy(training_state(whole, 0.0)))
            step(whole, whole.feed.at(at), whole.knobs.at(whole.clock))
            whole.step += 1
        second = session_of(registered)
        restore(second, halves[0], "here")
        for at in (4, 5):
            step(second, second.feed.at(at), second.knobs.at(second.clock))
            second.step += 1
    mine, other = whole.updater.state_dict(), second.updater.state_dict()
    assert mine.keys() == {"factor", "drawn"}
    assert all(torch.equal(value, other[name]) for name, value in mine.items())
    assert all(torch.equal(v, second.learner.state_dict()[k]) for k, v in whole.learner.state_dict().items())


def test_the_state_of_another_updater_is_refused(registered: dict[str, Any]) -> None:
    state = training_state(session_of(STATEFUL), 0.0)
    with pytest.raises(kdx.CheckpointError, match="of another run"):
        restore(session_of(registered), state, "here")


def test_gradients_of_one_value_leave_those_of_the_update_alone() -> None:
    net, runtime = small()
    x = torch.ones(4, 3)
    first = runtime.gradients(net(x)[:, 0].sum())
    assert [None if found is None else found.shape for found in first] == [p.shape for p in net.parameters()] + [None]
    assert all(weight.grad is None for weight in runtime.parameters())
    assert first[0] is not None
    assert torch.equal(first[0], torch.tensor([[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]))


def test_a_value_without_a_graph_reaches_nothing() -> None:
    _, runtime = small()
    assert runtime.gradients(torch.tensor(2.0)) == [None, None, None]


def test_a_graph_that_is_not_retained_is_gone() -> None:
    net, runtime = small()
    value = net(torch.ones(4, 3)).square().sum()
    runtime.gradients(value)
    runtime.gradients(value, retain=False)
    with pytest.raises(RuntimeError, match="second time"):
        runtime.gradients(value)


def test_gradients_can_be_asked_of_some_weights() -> None:
    net, runtime = small()
    (found,) = runtime.gradients(net(torch.ones(4, 3)).sum(), [net.bias])
    assert found is not None
    assert torch.equal(found, torch.full((2,), 4.0))


def test_added_gradients_are_those_of_a_backward_pass() -> None:
    net, runtime = small()
    x = torch.ones(4, 3)
    parts = [net(x).sum(), net(x).square().sum()]
    for part in parts:
        runtime.add(runtime.gradients(part))
    added = [weight.grad.clone() for weight in net.parameters() if weight.grad is not None]
    net.zero_grad()
    for part in [net(x).sum(), net(x).square().sum()]:
        runtime.backward(part)
    expected = [weight.grad for weight in net.parameters() if weight.grad is not None]
    assert len(added) == len(expected) == 2
    assert all(torch.equal(*pair) for pair in zip(added, expected, strict=True))


def test_an_added_gradient_lies_in_memory_as_its_weight_does() -> None:
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    runtime = Runtime(CPU)
    runtime.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), None)
    runtime.add([torch.ones(4, 3, 3, 3), None])
    assert net.weight.grad is not None
    assert net.weight.grad.stride() == net.weight.stride()
    assert net.bias is not None
    assert net.bias.grad is None


def small() -> tuple[nn.Linear, Runtime]:
    """A net in an engine, with one number that belongs to the updater."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
    runtime, own = Runtime(CPU), nn.Parameter(torch.ones(()))
    runtime.prepare(net, torch.optim.SGD([*net.parameters(), own], lr=0.5), None, [own])
    return net, runtime


def scaled(runtime: Runtime) -> Runtime:
    """The engine with the scaler of fp16, which works on any device."""
    runtime._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return runtime


def test_gradients_have_their_true_scale_in_half_precision() -> None:
    net, runtime = small()
    x = torch.ones(4, 3)
    plain = runtime.gradients(net(x).square().sum())
    half = scaled(runtime).gradients(net(x).square().sum())
    assert half[-1] is None
    assert half[0] is not None
    assert plain[0] is not None
    assert torch.allclose(half[0], plain[0])
    before = net.weight.detach().clone()
    runtime.add(half)
    runtime.update()
    assert torch.allclose(net.weight, before - 0.5 * plain[0])


def test_an_infinite_gradient_skips_the_update_in_half_precision() -> None:
    net, runtime = small()
    before = net.weight.detach().clone()
    scaled(runtime).gradients(net(torch.ones(4, 3)).sum())
    runtime.add([torch.full((2, 3), torch.inf), torch.ones(2), None])
    runtime.update()
    assert torch.equal(net.weight, before)
    assert runtime._scaler.get_scale() == 512.0


def test_weights_are_found_by_model_and_by_part_of_it() -> None:
    engine = session_of(DISTIL).runtime
    student, part = engine.weights("student"), engine.weights("student.second")
    assert set(part) < set(student) < set(engine.weights())
    assert {name.rpartition(".")[2] for name in part} == {"weight", "bias"}
    assert not engine.weights("wide")
    assert not engine.weights("student.sec")


def test_a_compiled_step_cannot_be_taken_apart() -> None:
    runtime = Runtime(RuntimeOptions(device="cpu", precision="fp32", compile=True))
    with pytest.raises(kdx.ConfigError, match=r"runtime\.compile: the updater takes the losses apart"):
        runtime.gradients(torch.tensor(1.0))


def test_an_updater_that_takes_the_step_apart_is_refused_with_compile_before_training() -> None:
    found = prepared(DISTIL, {"train": {"updater": {"use": "pcgrad"}}, "runtime": {"compile": True}})
    plan = build_plan(found, quiet(), trained=False)
    with pytest.raises(kdx.ConfigError, match=r"runtime\.compile: the updater pcgrad takes the step apart"):
        check_ready(plan, found.dataset, found.splits, Runtime(found.spec.runtime))


def test_the_plain_updater_keeps_the_contract() -> None:
    check_updater(Plain)


class Forgetful(kdx.Updater):
    """Follows every second micro-batch, which it counts in a plain number."""

    name = "forgetful"

    def __init__(self, config: Any, given: kdx.Given | None = None) -> None:
        super().__init__(config, given)
        self.count = 0

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        self.count += 1
        engine.backward(losses.total * share * (self.count % 2))

    def step(self, engine: kdx.Engine) -> None:
        engine.update()


class Global(Plain):
    """Draws from torch's global generator."""

    name = "global"

    def step(self, engine: kdx.Engine) -> None:
        torch.rand(())
        engine.update()


class Lazy(Plain):
    """Never follows anything."""

    name = "lazy"

    def backward(self, losses: kdx.Losses, share: float, engine: kdx.Engine) -> None:
        pass


class Loud(Plain):
    """Shows a Python number."""

    name = "loud"

    def shown(self) -> dict[str, Tensor]:
        return {"loud": 1.0}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("updater", "message"),
    [
        (Forgetful, "state_dict does not hold all of its state"),
        (Global, "used a global random generator"),
        (Lazy, "never change"),
        (Loud, "shows 1.0 as loud, expected a 0-d tensor"),
    ],
)
def test_the_check_finds(updater: type[kdx.Updater], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_updater(updater)


def test_the_bench_trains_what_it_says() -> None:
    bench = Bench(Plain, Plain.Config(), optimizer=SGD)
    before = bench.weights()
    bench.update()
    after = bench.weights()
    assert all(not torch.equal(before[name], after[name]) for name in before)
