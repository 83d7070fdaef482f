"""Facts of `kdx/modules.py`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_plugin import made_images
from small_run import DISTIL, PLAIN, STATEFUL, Seen, config_of, session_of
from torch import nn

from kdx.components import Network, Node
from kdx.loop import Session, step
from kdx.modules import Average, Knobs, Learner, Teachers, generators, overrides, trained
from kdx.types import Batch, Clock

DROPOUT_TEACHER = config_of(DISTIL, {"teachers": {"wide": {"dropout": 0.5}}})
CENTRED = config_of(
    DISTIL,
    {"targets": {"centre": {"use": "centred"}}, "losses": {"kd": {"inputs": {"teacher": "centre.logits"}}}},
)


def batch_of(count: int = 12) -> Batch:
    return {**made_images(count, 5), "index": torch.arange(count)}


def one_step(session: Session) -> None:
    step(session, batch_of(), session.knobs.at(session.clock))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_nothing_puts_a_teacher_into_training_mode() -> None:
    session = session_of(DISTIL)
    both = nn.ModuleList([session.teachers, session.learner])
    both.train()
    session.teachers.train(True)
    session.learner.train()
    assert not any(module.training for module in session.teachers.modules())
    assert all(module.training for module in session.learner.modules())


def test_evaluation_and_training_leave_a_teacher_as_it_was() -> None:
    session = session_of(DROPOUT_TEACHER)
    before = state_of(session.teachers)
    first = session.teachers(batch_of(), session.knobs.at(session.clock))
    Seen(session)
    again = session.teachers(batch_of(), session.knobs.at(session.clock))
    assert not any(module.training for module in session.teachers.modules())
    assert all(torch.equal(value, before[name]) for name, value in session.teachers.state_dict().items())
    assert all(torch.equal(first[key], again[key]) for key in first), "dropout or batch statistics moved"


def test_teachers_get_no_gradient_and_give_no_inference_tensors() -> None:
    session = session_of(DISTIL)
    batch, knobs = batch_of(), session.knobs.at(session.clock)
    kept = session.teachers(batch, knobs)
    session.learner(batch, kept, knobs).total.backward()
    assert set(kept) == {"wide.logits", "wide.mid"}
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in kept.values())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in session.teachers.parameters())
    assert all(parameter.grad is not None for parameter in session.learner.parameters())


def test_without_teachers_the_frozen_side_gives_nothing() -> None:
    session = session_of(PLAIN)
    assert session.teachers(batch_of(), session.knobs.at(session.clock)) == {}


def test_the_learner_holds_all_that_is_trained() -> None:
    mutual = {
        "kd": {"inputs": {"teacher": "wide.logits"}},
        "mutual": {"use": "kd", "inputs": {"teacher": "peer.logits"}},
        "peer_ce": {"use": "cross_entropy", "inputs": {"student": "peer.logits"}},
    }
    session = session_of(STATEFUL, {"teachers": {"peer": {"use": "small", "trainable": True}}, "losses": mutual})
    holders = {name.split(".")[1] for name, _ in session.learner.named_parameters()}
    assert holders == {"model/student", "model/peer", "align/mid", "losses/own"}
    in_optimizer = {id(p) for group in session.runtime.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(parameter) for parameter in session.learner.parameters()}
    assert in_optimizer == {id(parameter) for parameter in session.runtime.parameters()}
    before = state_of(session.learner)
    one_step(session)
    for name, _ in session.learner.named_parameters():
        assert not torch.equal(before[name], session.learner.state_dict()[name]), f"{name} did not move"


def test_terms_are_those_of_the_losses_and_the_total_is_their_weighted_sum() -> None:
    session = session_of(DISTIL)
    batch, knobs = batch_of(), session.knobs.at(session.clock)
    losses = session.learner(batch, session.teachers(batch, knobs), knobs)
    assert {name: term.ndim for name, term in losses.terms.items()} == {"ce": 0, "kd": 1, "hint": 1}
    expected = losses.terms["ce"] + losses.terms["kd"].mean() + 0.5 * losses.terms["hint"].mean()
    assert losses.total.detach() == pytest.approx(expected.item(), rel=1e-6)
    assert not any(term.requires_grad for term in losses.terms.values())


def test_the_gradients_of_the_parts_add_up_to_that_of_the_total() -> None:
    session = session_of(DISTIL)
    batch, knobs = batch_of(), session.knobs.at(session.clock)
    losses = session.learner(batch, session.teachers(batch, knobs), knobs)
    weights = [*session.learner.student.parameters()]
    whole = torch.autograd.grad(losses.total, weights, retain_graph=True)
    parts = [
        torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        for part in losses.parts.values()
    ]
    assert list(losses.parts) == ["ce", "kd", "hint"]
    assert all(any(gradient.any() for gradient in gradients) for gradients in parts)
    for expected, *found in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.stack(found).sum(0), expected, rtol=1e-4, atol=1e-6)


def test_losses_are_computed_in_float32_when_networks_run_in_bf16() -> None:
    session = session_of(DISTIL, {"runtime": {"precision": "bf16"}})
    batch, knobs = batch_of(), session.knobs.at(session.clock)
    with session.runtime.autocast():
        kept = session.teachers(batch, knobs)
        losses = session.learner(batch, kept, knobs)
    assert kept["wide.logits"].dtype == torch.bfloat16
    assert {term.dtype for term in (losses.total, *losses.terms.values())} == {torch.float32}


def test_a_schedule_is_its_closed_form_at_every_update() -> None:
    seen = Seen(session_of(DISTIL, {"losses": {"kd": {"weight": {"use": "linear", "start": 2.0, "end": 1.0}}}}))
    found = [report.numbers()["losses.kd.weight"] for report in seen.steps]
    per_epoch, steps = 3, 6
    expected = [Clock(i, per_epoch, steps).time for i in range(steps)]
    assert found == pytest.approx([2.0 - time / 2.0 for time in expected], rel=1e-6)


def test_only_knobs_that_can_move_are_reported() -> None:
    report = Seen(session_of(DISTIL)).steps[0]
    assert set(report.knobs) == {"losses.kd.weight"}


def test_a_knob_that_is_read_from_a_node_is_reported_as_its_mean() -> None:
    for accumulate in (1, 3):
        session = session_of(
            DISTIL,
            {"targets": {"tau": {"use": "doubt"}}, "losses": {"kd": {"temperature": "tau", "weight": "tau"}},
             "train": {"accumulate": accumulate}},
        )  # fmt: skip
        batch, knobs = batch_of(), session.knobs.at(session.clock)
        expected = 2 - session.teachers(batch, knobs)["wide.logits"].softmax(1).amax(1)
        _, moved = step(session, batch, knobs)
        assert set(moved) == {"losses.kd.temperature", "losses.kd.weight"}
        for value in moved.values():
            assert value.ndim == 0
            assert value.item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_constants_make_no_new_tensors() -> None:
    session = session_of(DISTIL, {"losses": {"kd": {"weight": 0.7}}})
    first, second = (session.knobs.at(Clock(i, 3, 6)) for i in (0, 5))
    assert first is second
    assert {key: value.item() for key, value in first.items()} == {
        "losses.ce.weight": 1.0,
        "losses.kd.temperature": 2.0,
        "losses.kd.weight": pytest.approx(0.7),
        "losses.hint.weight": 0.5,
    }


def test_a_schedule_that_stands_still_makes_no_new_tensors() -> None:
    constant = {"use": "constant", "value": 0.5}
    session = session_of(DISTIL, {"losses": {"kd": {"weight": constant}}})
    first, second = (session.knobs.at(Clock(i, 3, 6))["losses.kd.weight"] for i in (0, 5))
    assert first is second


def test_the_knobs_of_an_update_are_views_of_one_tensor() -> None:
    session = session_of(DISTIL)
    values = session.knobs.at(Clock(1, 3, 6)).values()
    assert len({value.untyped_storage().data_ptr() for value in values}) == 1
    assert {value.ndim for value in values} == {0}


def test_the_knobs_of_an_earlier_update_keep_their_values() -> None:
    knobs = session_of(DISTIL).knobs
    early = knobs.at(Clock(0, 3, 6))["losses.kd.weight"]
    knobs.at(Clock(3, 3, 6))
    assert early.item() == 1.0


def test_the_average_follows_its_formula_and_copies_buffers() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network = Network(net)
    average = Average(network, 0.9)
    expected = copy.deepcopy(list(net.parameters()))
    for n in range(1, 30):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))
            net[1].running_mean.fill_(n)  # type: ignore[union-attr, operator]
        average.update(Clock(n, 10, 30))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, net.parameters(), strict=True)]
    for found, wanted in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    assert average.model.net[1].running_mean.tolist() == [29, 29]  # type: ignore[index, union-attr]
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_the_average_follows_a_buffer_that_is_replaced_by_a_larger_one() -> None:
    net = nn.BatchNorm1d(2)
    net.register_buffer("bank", torch.zeros(0))
    average = Average(Network(net), 0.9)
    for n in range(1, 4):
        net.bank = torch.arange(float(n))
        average.update(Clock(n, 10, 30))
    assert average.model.net.bank.tolist() == [0, 1, 2]  # type: ignore[union-attr]


def test_nodes_are_trained_as_their_sections_say() -> None:
    session = session_of(
        STATEFUL,
        {"train": {"weight_decay": 0.01}, "align": {"mid": {"lr_scale": 10.0, "weight_decay": 0.2}},
         "losses": {"own": {"lr_scale": 0.5}}},
    )  # fmt: skip
    rules = [(len(list(group.parameters)), group.lr_scale, group.weight_decay)
             for group in trained(session.spec, session.learner) if group.parameters]  # fmt: skip
    student = len(list(session.learner.student.parameters()))
    aligner = len(list(session.learner.nodes["align/mid"].parameters()))
    assert rules == [(student, 1.0, 0.01), (aligner, 10.0, 0.2), (1, 0.5, 0.01)]
    groups = session.runtime.optimizer.param_groups
    found = {(group["lr_scale"], group["weight_decay"], p.ndim > 1) for group in groups for p in group["params"]}
    assert {(1.0, 0.01, True), (1.0, 0.0, False), (10.0, 0.2, True), (0.5, 0.0, False)} <= found
    assert not any(decay and not matrix for _, decay, matrix in found), "biases and norm scales do not decay"


def test_with_decay_vectors_the_biases_of_networks_and_nodes_decay_alike() -> None:
    session = session_of(
        STATEFUL,
        {"train": {"weight_decay": 0.01, "decay_vectors": True}, "align": {"mid": {"norm": True, "weight_decay": 0.2}}},
    )
    groups = session.runtime.optimizer.param_groups
    found = {(group["weight_decay"], p.ndim > 1) for group in groups for p in group["params"]}
    assert found == {(0.01, True), (0.01, False), (0.2, True), (0.2, False)}


def test_calibration_reaches_both_sides_and_leaves_models_and_the_state_of_losses_alone() -> None:
    session = session_of(CENTRED, {"losses": {"own": {"use": "stateful"}}, "train": {"calibration": 2}})
    models = state_of(session.learner.models)
    generator = session.learner.nodes["losses/own"].given.generator.get_state()
    from kdx.loop import calibrate

    random = torch.get_rng_state()
    calibrate(session)
    assert all(torch.equal(value, models[name]) for name, value in session.learner.models.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(session.learner.nodes["losses/own"].given.generator.get_state(), generator)
    assert session.learner.nodes["losses/own"].start.abs().sum() > 0
    assert session.teachers.nodes["targets/centre"].mean.abs().sum() > 0


def test_after_update_reaches_both_sides() -> None:
    session = session_of(CENTRED, {"losses": {"own": {"use": "stateful"}}})
    Seen(session)
    assert session.teachers.nodes["targets/centre"].updates.item() == 6
    assert session.learner.nodes["losses/own"].seen.item() == 6


def test_a_node_that_reads_only_teachers_and_learns_nothing_is_on_their_side() -> None:
    session = session_of(CENTRED)
    assert list(session.teachers.nodes) == ["targets/centre"]
    assert list(session.learner.nodes) == ["align/mid", "losses/ce", "losses/kd", "losses/hint"]


def test_every_node_has_a_generator_of_its_own() -> None:
    found = generators(session_of(STATEFUL).plan)
    assert {"mid", "losses.ce", "losses.own"} <= set(found)
    draws = {torch.rand(1, generator=generator).item() for generator in found.values()}
    assert len(draws) == len(found)


def test_a_method_counts_as_overridden_when_a_class_brings_its_own() -> None:
    nodes: dict[str, Any] = dict(session_of(CENTRED).teachers.nodes)
    assert overrides(nodes["targets/centre"], "calibrate")
    plain = session_of(DISTIL).learner.nodes["losses/ce"]
    assert isinstance(plain, Node)
    assert not overrides(plain, "calibrate")


def test_plans_of_one_config_have_equal_weights_and_first_numbers() -> None:
    first, second = (session_of(STATEFUL) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.learner.state_dict().values(), second.learner.state_dict().values(), strict=True)
    )


def test_the_student_starts_the_same_whatever_stands_beside_it() -> None:
    alone, helped = (state_of(session_of(config).learner.student.network.net) for config in (PLAIN, STATEFUL))
    assert all(torch.equal(alone[name], helped[name]) for name in alone)
    other = state_of(session_of(PLAIN, {"seed": 1}).learner.student.network.net)
    assert not torch.equal(alone["first.0.weight"], other["first.0.weight"])


def test_teachers_and_learner_can_be_made_twice_of_one_plan() -> None:
    session = session_of(DISTIL)
    teachers, learner, knobs = Teachers(session.plan), Learner(session.plan), Knobs(session.plan, torch.device("cpu"))
    values = knobs.at(session.clock)
    batch = batch_of()
    learner.eval()
    session.learner.eval()
    first = learner(batch, teachers(batch, values), values).total
    assert torch.equal(first, session.learner(batch, session.teachers(batch, values), values).total)
