"""Temperatures and weights of teachers that are learned by looking ahead."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_inputs import STUDENT, TEACHER, normal, number
from kdx_plugins.logit import soft_targets
from kdx_plugins.meta import LookAhead, MetaTemperatures, MetaWeights, similarities, two_temperatures
from small_run import DISTIL, config_of, folders, prepared, quiet, run_in, session_of, weights_of
from torch import Tensor

import kdx
from kdx.config import load_mapping
from kdx.loop import Session, Watchers, step, train
from kdx.runs import Stopped, carry_out
from kdx.testing import check_loss, check_target
from kdx.types import Batch

BASE = config_of(DISTIL, {"align": None, "losses": {"kd": None, "hint": None}})
MKD: dict[str, Any] = config_of(
    BASE,
    {
        "targets": {"tau": {"use": "meta_temperatures", "start": 3.0}},
        "losses": {"kd": {"use": "mkd", "student_temperature": "tau.student", "teacher_temperature": "tau.teacher"}},
        "train": {"updater": {"use": "look_ahead", "learns": ["tau"], "lr": 0.5}},
    },
)
MMKD: dict[str, Any] = config_of(
    BASE,
    {
        "teachers": {"narrow": {"use": "small", "width": 5, "taps": {"mid": "second"}}},
        "targets": {
            "balance": {
                "use": "mmkd",
                "batch": 12,
                "inputs": {"feature": "student.mid", "features": ["wide.mid", "narrow.mid"]},
            }
        },
        "losses": {"kd": {"use": "weighted_kd", "inputs": {"weights": "balance.weights"}}},
        "train": {
            "updater": {"use": "look_ahead", "learns": ["balance"], "lr": 0.5, "inner_steps": 2, "outer_steps": 1}
        },
    },
)


def ready(config: dict[str, Any]) -> Session:
    """A session in float64 that stands before its first update."""
    session = session_of(config)
    session.learner.double()
    session.teachers.double()
    session.runtime.prepare(session.learner, session.runtime.optimizer, None)
    return session


def first_batch(session: Session) -> Batch:
    batch = session.feed.at(0)
    return {name: stream.double() if stream.is_floating_point() else stream for name, stream in batch.items()}


def outcome(session: Session, batch: Batch, rounds: list[list[str]], lr: float, held: int) -> float:
    """The loss on labels of the held-out part after real steps of a copy of the learner; the slow way."""
    learner, knobs = copy.deepcopy(session.learner), session.knobs.at(session.clock)
    parts = [{name: stream[:held] for name, stream in batch.items()}, {n: s[held:] for n, s in batch.items()}]
    own = [weight for name, weight in learner.named_parameters() if not name.startswith("nodes.targets")]
    for names in rounds:
        losses = learner(parts[0], session.teachers(parts[0], knobs), knobs)
        value = torch.stack([losses.parts[name] for name in names]).sum()
        for weight, gradient in zip(own, torch.autograd.grad(value, own, materialize_grads=True), strict=True):
            weight.data -= lr * gradient
    return float(learner(parts[1], session.teachers(parts[1], knobs), knobs).parts["ce"].item())


@pytest.mark.parametrize(
    ("config", "inner", "outer"), [(MKD, 1, 0), (MKD, 2, 1), (MMKD, 1, 1)], ids=["temperatures", "steps", "weights"]
)
def test_the_gradient_is_that_of_the_outcome_of_real_steps(config: dict[str, Any], inner: int, outer: int) -> None:
    # One inner step for the weights: they read the student without gradient, also as it is after a virtual step.
    config = config_of(config, {"train": {"updater": {"inner_steps": inner, "outer_steps": outer}}})
    rounds = [["kd"]] * inner + [["ce"]] * outer
    session = ready(config)
    batch = first_batch(session)
    start = copy.deepcopy(session.learner.state_dict())
    step(session, batch, session.knobs.at(session.clock))
    session.learner.load_state_dict(start)
    updater, engine = session.updater, session.runtime
    assert isinstance(updater, LookAhead)
    pairs = [*zip(updater.learned(engine).items(), updater.gradients(engine), strict=True)]
    checked = 0
    for (_, weight), gradient in pairs:
        place = int(gradient.abs().argmax())
        sides = []
        for shift in (1e-6, -1e-6):
            flat = weight.data.view(-1)
            flat[place] += shift
            sides.append(outcome(session, batch, rounds, 0.5, 6))
            flat[place] -= shift
        expected = (sides[0] - sides[1]) / 2e-6
        assert gradient.view(-1)[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)
        checked += bool(gradient.any())
    assert checked >= len(pairs) / 2


def test_what_looks_ahead_changes_by_its_own_gradient_and_the_rest_as_always() -> None:
    session, plain = ready(MKD), ready(MKD)
    batch = first_batch(session)
    step(session, batch, session.knobs.at(session.clock))
    found = {name: weight.detach().clone() for name, weight in session.runtime.weights().items()}
    losses = plain.learner(batch, plain.teachers(batch, {}), plain.knobs.at(plain.clock))
    losses.total.backward()
    plain.learner.nodes["targets/tau"].zero_grad()
    plain.runtime.update()
    for name, weight in plain.runtime.weights().items():
        if "targets" in name:
            assert not torch.equal(found[name], weight), "the plain gradient was taken away, the other one added"
        else:
            torch.testing.assert_close(found[name], weight.detach())


def test_batch_statistics_do_not_see_virtual_steps() -> None:
    session, plain = ready(MKD), ready(MKD)
    batch = first_batch(session)
    step(session, batch, session.knobs.at(session.clock))
    plain.learner(batch, plain.teachers(batch, {}), plain.knobs.at(plain.clock))
    for one, other in zip(session.learner.buffers(), plain.learner.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_it_looks_ahead_every_so_many_updates() -> None:
    session = session_of(MKD, {"train": {"updater": {"every": 3}, "updates": 5}})
    seen: list[Tensor] = []

    def step_end(report: Any) -> None:
        seen.append(next(iter(session.runtime.weights("targets.tau").values())).detach().clone())

    def ignore(report: Any) -> None:
        """Nothing is saved here."""

    train(session, Watchers(step_end, ignore, ignore, ignore))
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [False, False, True, False]


@pytest.mark.parametrize(
    "config", [MKD, config_of(MMKD, {"train": {"updater": {"every": 2}}})], ids=["temperatures", "weights"]
)
def test_a_run_that_looks_ahead_resumes_exactly(config: dict[str, Any], tmp_path: Path) -> None:
    whole = run_in(tmp_path / "whole", config, {"train": {"accumulate": 2}})
    asked = iter(range(100))
    found = prepared(config, {"out": str(tmp_path / "parts"), "train": {"accumulate": 2}})
    with pytest.raises(Stopped):
        carry_out(found, quiet(stop=lambda: next(asked) >= 3))
    again = run_in(tmp_path / "parts", config, {"train": {"accumulate": 2}})
    assert folders(tmp_path / "parts")
    first, second = weights_of(Path(whole.folder)), weights_of(Path(again.folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_plain_student_is_trained_without_looking_ahead(tmp_path: Path) -> None:
    found = run_in(tmp_path, MKD, {"baseline": True, "train": {"updates": 2}})
    plain = [path for path in tmp_path.iterdir() if path.name.startswith("plain-")]
    assert len(plain) == 1
    assert load_mapping({"extends": str(plain[0] / "config.yaml")})["train"]["updater"] == {"use": "plain"}
    assert load_mapping({"extends": str(Path(found.folder) / "config.yaml")})["train"]["updater"]["use"] == "look_ahead"


def test_equal_temperatures_are_those_of_kd() -> None:
    value = two_temperatures(STUDENT, TEACHER, number(4.0), number(4.0))
    assert value.mean().item() == pytest.approx(0.2442403738, abs=1e-9)
    tau = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(two_temperatures(STUDENT, TEACHER, tau, tau), soft_targets(STUDENT, TEACHER, tau))


def test_both_temperatures_have_a_gradient_and_a_scaled_student_is_perfect() -> None:
    ours, theirs = number(2.0).requires_grad_(), number(5.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: two_temperatures(STUDENT, TEACHER, a, b), (ours, theirs))
    assert two_temperatures(TEACHER * 2 / 5, TEACHER, ours, theirs).abs().max() < 1e-12


def meta_weights(count: int = 3, **options: Any) -> MetaWeights:
    maps = [(5, 2, 2), (6, 2, 2), (7, 3, 3)][:count]
    shapes = {"student": (4,), "logits": [(4,)] * count, "feature": (3, 4, 4), "features": maps}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MetaWeights(MetaWeights.Config(**options), kdx.Given(shapes)).double()


def test_the_weights_of_the_teachers_sum_to_one_and_follow_their_order() -> None:
    logits, maps = (
        [normal(k, 3, 4) for k in range(3)],
        [normal(9, 3, 5, 2, 2), normal(8, 3, 6, 2, 2), normal(7, 3, 7, 3, 3)],
    )
    node, moved, order = meta_weights(batch=4), meta_weights(batch=4), [2, 0, 1]
    found = node(STUDENT, logits, normal(5, 3, 3, 4, 4), maps)
    for net, other in ((node.logit_net, moved.logit_net), (node.feature_net, moved.feature_net)):
        columns = torch.cat([torch.arange(4 * k, 4 * k + 4) for k in (*order, 3)])
        with torch.no_grad():
            other[0].weight.copy_(net[0].weight[:, columns])  # type: ignore[index, union-attr, operator]
            for name in ("weight", "bias"):
                getattr(other[2], name).copy_(getattr(net[2], name)[order])  # type: ignore[index]
    again = moved(STUDENT, [logits[k] for k in order], normal(5, 3, 3, 4, 4), [maps[k] for k in order])
    for name, weights in found.items():
        torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(again[name], weights[:, order])


def test_similarities_are_cosines_filled_up_with_zeros() -> None:
    maps = normal(0, 3, 2, 2)
    rows = similarities(maps, 5)
    flat = maps.flatten(1)
    assert rows[0, 1].item() == pytest.approx((flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()).item())
    assert rows.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert not rows[:, 3:].any()


def test_nets_send_no_gradient_to_the_student() -> None:
    student, feature = STUDENT.clone().requires_grad_(), normal(5, 3, 3, 4, 4).requires_grad_()
    maps = [normal(9, 3, 5, 2, 2), normal(8, 3, 6, 2, 2), normal(7, 3, 7, 3, 3)]
    out = meta_weights(batch=3)(student, [normal(k, 3, 4) for k in range(3)], feature, maps)
    value: Tensor = out["weights"].square().sum() + out["feature_weights"].square().sum()
    value.backward()  # type: ignore[no-untyped-call]
    assert student.grad is None
    assert feature.grad is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MetaTemperatures(MetaTemperatures.Config(start=0.0), kdx.Given()),
            "start: found 0.0, expected a number",
        ),
        (lambda: meta_weights(count=1), "given the logits of 1 and the maps of 1"),
        (lambda: meta_weights(batch=0), "batch: found 0"),
        (lambda: LookAhead(LookAhead.Config()), r"train.updater.learns: it is empty; expected the names of targets"),
        (lambda: LookAhead(LookAhead.Config(["tau"], inner=[])), r"train.updater.inner: it is empty"),
        (lambda: LookAhead(LookAhead.Config(["tau"], inner_steps=0)), "found inner_steps 0 and outer_steps 0"),
        (lambda: LookAhead(LookAhead.Config(["tau"], every=0)), "every: found 0, expected at least 1 update"),
        (lambda: LookAhead(LookAhead.Config(["tau"], held_out=1.0)), "held_out: found 1.0, expected a part between"),
        (lambda: LookAhead(LookAhead.Config(["tau"], lr=0.0)), "lr: found 0.0, expected a number above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(build: Any, message: str) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updater": None}, r"targets.tau: it learns by looking ahead, but the updater is plain; expected `train: \{"),
        ({"updater": {"learns": ["other"]}}, "targets.tau: it learns by looking ahead"),
        (
            {"updater": {"learns": ["tau", "other"]}},
            "updater.learns: found 'other', expected one of the targets .*: tau",
        ),
        ({"updater": {"inner": ["hint"]}}, "updater.inner: found 'hint', expected one of the losses: ce, kd"),
        ({"batch": 1}, "look_ahead splits each part of a batch in two"),
    ],
)
def test_a_run_without_what_it_takes_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        session_of(MKD, {"train": change})


def test_a_batch_that_is_larger_than_the_net_for_it_is_refused() -> None:
    session = session_of(MMKD, {"targets": {"balance": {"batch": 11}}})
    with pytest.raises(kdx.ConfigError, match="batch: found 11, but a batch has 12 samples"):
        step(session, session.feed.at(0), session.knobs.at(session.clock))


def test_the_components_keep_the_contract() -> None:
    from kdx_plugins.meta import TwoTemperatures

    check_loss(TwoTemperatures, zero_at_equality=True)
    check_target(MetaTemperatures)
    maps = {"feature": (3, 4, 4), "features": [(5, 2, 2)] * 3}
    check_target(MetaWeights, shapes=maps, order_matters=True, batch=11)
