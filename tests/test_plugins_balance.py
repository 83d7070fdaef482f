"""Adaptive weights of losses and gradient surgery: values by hand, closed forms, refusals, and resumes to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kdx_plugins.balance import (
    FLOOR,
    DistillationOrientedMomentum,
    DynamicWeightAverage,
    GradNorm,
    PCGrad,
    UncertaintyWeighting,
    average_weights,
    paced_weights,
    uncertain_sum,
    without_conflicts,
)
from small_run import DISTIL, STATEFUL, Seen, config_of, prepared, quiet, session_of
from torch import Tensor

import kdx
from kdx.bench import Bench
from kdx.builtin.updaters import Plain
from kdx.checkpoint import load_state, save_state
from kdx.loop import Watchers, train
from kdx.optim import set_lr
from kdx.preflight import check_ready
from kdx.resume import restore, training_state
from kdx.runs import build_plan
from kdx.runtime import Runtime
from kdx.testing import check_updater
from kdx.types import Losses

UPDATERS: list[type[kdx.Updater]] = [
    UncertaintyWeighting,
    DynamicWeightAverage,
    GradNorm,
    PCGrad,
    DistillationOrientedMomentum,
]
SGD = {"use": "sgd", "momentum": 0.9}
ALL = ("ce", "kd", "hint")


def bench(updater: type[kdx.Updater], *, losses: tuple[str, ...] = ALL, decay: float = 0.01, **options: Any) -> Bench:
    config = updater.Config(**options)
    return Bench(updater, config, losses=losses, optimizer=SGD, weight_decay=decay, dtype=torch.float64)


def nothing(_: Any) -> None:
    """A watcher that does not look."""


def learner(found: Bench) -> dict[str, Tensor]:
    return {name: value for name, value in found.weights().items() if name.startswith("learner.")}


def distance(one: Bench, other: Bench) -> float:
    mine, theirs = learner(one), learner(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def plain_after(updates: int, **options: Any) -> Bench:
    found = bench(Plain, **options)
    for _ in range(updates):
        found.update()
    return found


@pytest.mark.parametrize("updater", UPDATERS)
def test_an_updater_keeps_the_contract(updater: type[kdx.Updater]) -> None:
    check_updater(updater)


@pytest.mark.parametrize("updater", UPDATERS)
def test_with_one_loss_it_is_the_plain_updater(updater: type[kdx.Updater]) -> None:
    found, plain = (bench(kind, losses=("ce",)) for kind in (updater, Plain))
    for _ in range(6):
        assert not found.update()
        plain.update()
    assert distance(found, plain) == 0.0


@pytest.mark.parametrize("updater", UPDATERS)
def test_micro_batches_add_up_to_the_whole_batch(updater: type[kdx.Updater]) -> None:
    whole, parts = bench(updater), bench(updater)
    for _ in range(6):
        whole.update()
        parts.update(4)
    assert distance(whole, parts) < 1e-12


@pytest.mark.parametrize("updater", UPDATERS)
def test_a_restored_session_goes_on_to_the_bit(updater: type[kdx.Updater], tmp_path: Path) -> None:
    config = config_of(STATEFUL, {"train": {"updates": 12, "updater": {"use": updater.name}}})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        whole = session_of(config)
        expected = Seen(whole)
        torch.manual_seed(7)
        first = session_of(config)
        train(first, Watchers(nothing, nothing, nothing, nothing, lambda: first.step >= 8))
        assert first.step == 8
        save_state(tmp_path, training_state(first, 0.0))
        torch.manual_seed(99)
        second = session_of(config)
        state = load_state(tmp_path)
        assert state is not None
        restore(second, state, "here")
        seen = Seen(second)
    assert [report.numbers() for report in seen.steps] == [report.numbers() for report in expected.steps[8:]]
    for mine, other in ((whole.learner, second.learner), (whole.updater, second.updater)):
        found = other.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in mine.state_dict().items())


def test_the_uncertain_sum_has_the_value_of_its_formula() -> None:
    parts, s = torch.tensor([2.0, 3.0]), torch.tensor([math.log(2.0), -1.0])
    assert uncertain_sum(parts, s).item() == pytest.approx(1.0 + math.log(2.0) + 3.0 * math.e - 1.0)


def test_uncertainties_at_first_are_the_plain_sum() -> None:
    found = bench(UncertaintyWeighting)
    assert {name: value.item() for name, value in found.update().items()} == dict.fromkeys(
        ("losses.ce.weight", "losses.kd.weight", "losses.hint.weight"), 1.0
    )
    assert distance(found, plain_after(1)) < 1e-15


def test_an_uncertainty_is_at_rest_at_the_logarithm_of_its_loss() -> None:
    parts = torch.tensor([0.2, 1.0, 7.0])
    s = parts.log().requires_grad_()
    (gradient,) = torch.autograd.grad(uncertain_sum(parts, s), s)
    assert gradient.abs().max() < 1e-6


def test_uncertainties_learn_without_weight_decay() -> None:
    found = bench(UncertaintyWeighting, decay=0.5)
    x, label = found.batch()
    values = torch.stack([*found.losses(x, label).parts.values()]).detach()
    found.update()
    updater = found.updater
    assert isinstance(updater, UncertaintyWeighting)
    assert torch.allclose(updater.s, -0.05 * (1 - values))


def test_average_weights_have_the_values_of_their_formula() -> None:
    last, before = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])
    powers = [math.exp(ratio / 2.0) for ratio in (0.5, 1.0, 1.5)]
    expected = [3 * power / sum(powers) for power in powers]
    assert average_weights(last, before, 2.0).tolist() == pytest.approx(expected)
    assert average_weights(last, torch.tensor([2.0, 0.0, 2.0]), 2.0).isfinite().all()


def test_average_weights_start_in_the_third_epoch() -> None:
    found = bench(DynamicWeightAverage, temperature=0.5)
    epochs: list[Tensor] = []
    for epoch in range(4):
        terms = []
        for _ in range(2):
            x, label = found.batch()
            losses = found.losses(x, label)
            terms.append(torch.stack([losses.terms[name].mean() for name in ALL]))
            shown = torch.stack([*found.update().values()])
            if epoch < 2:
                assert torch.equal(shown, torch.ones(3))
            else:
                powers = (epochs[epoch - 1] / epochs[epoch - 2] / 0.5).exp()
                assert torch.allclose(shown, 3 * powers / powers.sum())
        epochs.append(torch.stack(terms).mean(0))
    assert not torch.allclose(shown, torch.ones_like(shown), atol=1e-3)


def test_weights_with_equal_progress_move_towards_equal_norms() -> None:
    weights, norms, even = torch.ones(2), torch.tensor([1.0, 3.0]), torch.ones(2)
    found = paced_weights(weights, norms, even, alpha=1.5, rate=0.1)
    # The mean of the norms is 2; against it the first may grow by 0.1 * 1/2, the second falls by 0.1 * 3/2.
    assert found.tolist() == pytest.approx([1.05 * 2 / 1.9, 0.85 * 2 / 1.9])
    for _ in range(200):
        weights = paced_weights(weights, norms, even, alpha=1.5, rate=0.01)
    sizes = weights * norms
    assert float(sizes.max() / sizes.min()) < 1.1
    assert weights.sum().item() == pytest.approx(2.0)


def test_a_slow_loss_gets_more_weight() -> None:
    even, progress = torch.ones(3), torch.tensor([0.9, 0.5, 0.5])
    slow, *fast = paced_weights(even, even, progress, alpha=1.5, rate=0.1).tolist()
    assert slow > 1.0 > max(fast)


def test_weights_stay_positive_and_ignore_what_is_not_finite() -> None:
    weights = torch.tensor([0.1, 1.9])
    low, _ = paced_weights(weights, torch.tensor([50.0, 1.0]), torch.ones(2), alpha=0.0, rate=0.5).tolist()
    assert low == pytest.approx(FLOOR * 2 / (FLOOR + 1.9 + 0.5 * 1.0 / 3.45), rel=0.05)
    for norms in (torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 1.0])):
        assert torch.equal(paced_weights(weights, norms, torch.ones(2), alpha=1.5, rate=0.1), weights)


@pytest.mark.parametrize("shared", [None, "body"])
def test_gradnorm_takes_the_norms_of_what_all_losses_reach(shared: str | None) -> None:
    found, alone = bench(GradNorm, shared=shared), bench(Plain)
    x, label = found.batch()
    parts = alone.losses(x, label).parts
    grads = [torch.autograd.grad(parts[name], [*alone.body.parameters()], retain_graph=True) for name in ALL]
    norms = torch.stack([torch.cat([g.flatten() for g in grad]).norm() for grad in grads])
    assert torch.equal(torch.stack([*found.update().values()]), torch.ones(3, dtype=torch.float64))
    expected = paced_weights(torch.ones(3, dtype=torch.float64), norms, torch.ones(3), alpha=1.5, rate=0.025)
    assert torch.allclose(torch.stack([*found.update().values()]), expected, rtol=1e-12)


def test_the_student_follows_the_sum_weighted_by_gradnorm() -> None:
    found = bench(GradNorm)
    found.update()
    assert distance(found, plain_after(1)) < 1e-15


def test_a_part_that_not_every_loss_reaches_is_refused() -> None:
    with pytest.raises(kdx.PlanError, match="no weight of head is reached by all of ce, kd, hint"):
        bench(GradNorm, shared="head").update()


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def orders(*others: list[int]) -> list[Tensor]:
    """For each loss the others in their order."""
    return [torch.tensor(order, dtype=torch.int64) for order in others]


def test_two_gradients_in_conflict_lose_their_projections() -> None:
    gradients = torch.stack([vector(1, 0), vector(-1, 1)])
    merged, conflicts = without_conflicts(gradients, torch.ones(2, 2, dtype=torch.bool), orders([1], [0]))
    assert merged.tolist() == [0.5, 1.5]  # (1/2, 1/2) and (0, 1)
    assert conflicts.item() == 1.0
    assert bool((gradients @ merged >= 0).all())


def test_gradients_without_conflict_are_left_alone() -> None:
    gradients = torch.stack([vector(1, 2, 0), vector(0, 1, 5), vector(3, 0, 0)])
    merged, conflicts = without_conflicts(
        gradients, torch.ones(3, 3, dtype=torch.bool), orders([1, 2], [2, 0], [0, 1])
    )  # fmt: skip
    assert torch.equal(merged, gradients.sum(0))
    assert conflicts.item() == 0.0


def test_projections_follow_one_another_in_their_order() -> None:
    gradients = torch.stack([vector(1, 0, 0), vector(-1, 1, 0), vector(-1, 0, 1)])
    everything = torch.ones(3, 3, dtype=torch.bool)
    forth, _ = without_conflicts(gradients[:1], everything[:1], orders([]))
    assert torch.equal(forth, gradients[0])
    usual = orders([1, 2], [0, 2], [0, 1])
    first = vector(0.5, 0.5, 0)  # without the second; its product with the third is -1/2
    first = first + 0.25 * gradients[2]
    expected = first + vector(0, 1, 0) + vector(0, 0, 1)
    assert torch.allclose(without_conflicts(gradients, everything, usual)[0], expected)
    other, _ = without_conflicts(gradients, everything, orders([2, 1], [0, 2], [0, 1]))
    assert not torch.allclose(other, expected)


def test_weights_that_one_loss_alone_reaches_do_not_count_between_two() -> None:
    gradients = torch.stack([vector(1, 0, 7), vector(-1, 1, 0)])
    reached = torch.tensor([[True, True, True], [True, True, False]])
    merged, _ = without_conflicts(gradients, reached, orders([1], [0]))
    assert merged.tolist() == [0.5, 1.5, 7.0]


def test_each_loss_meets_every_other_one_once_in_an_order_that_is_drawn() -> None:
    found = bench(PCGrad).updater
    assert isinstance(found, PCGrad)
    found._sums = [[], [], []]
    seen = [tuple(tuple(order.tolist()) for order in found._orders()) for _ in range(60)]
    assert {tuple(tuple(sorted(order)) for order in one) for one in seen} == {((1, 2), (0, 2), (0, 1))}
    assert len(set(seen)) == 8


def test_a_gradient_of_zero_is_no_conflict() -> None:
    gradients = torch.stack([vector(0, 0), vector(-1, 1)])
    merged, conflicts = without_conflicts(gradients, torch.ones(2, 2, dtype=torch.bool), orders([1], [0]))
    assert merged.tolist() == [-1.0, 1.0]
    assert conflicts.item() == 0.0


def test_losses_that_agree_train_as_their_sum_does() -> None:
    surgery, plain = bench(PCGrad), bench(Plain)
    for found in (surgery, plain):
        losses = found.losses(*found.batch())
        parts = {name: losses.parts["ce"] * factor for name, factor in (("ce", 1.0), ("kd", 0.5), ("hint", 2.0))}
        total = torch.stack([*parts.values()]).sum()
        found.updater.backward(Losses(total, losses.terms, {}, parts), 1.0, found.runtime)
        found.updater.step(found.runtime)
    assert distance(surgery, plain) < 1e-15
    assert [value.item() for value in surgery.updater.shown().values()] == [0.0]


def test_losses_in_conflict_do_not_train_as_their_sum_does() -> None:
    found, plain, conflicts = bench(PCGrad), bench(Plain), 0.0
    while not conflicts:
        assert distance(found, plain) < 1e-12
        conflicts = found.update()["train.updater.conflicts"].item()
        plain.update()
        assert found.steps < 10
    assert conflicts <= 1
    assert distance(found, plain) > 1e-4


def two_momenta(found: Bench, updates: int, delta: float, decay: float, *, momentum: float = 0.9) -> dict[str, Tensor]:
    """The weights after the published rule, with both momenta spelt out."""
    weights = dict(found.learner.named_parameters())
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    task, rest = dict(zeros), dict(zeros)
    for at in range(updates):
        found.steps = at
        parts = found.losses(*found.batch()).parts
        c = torch.autograd.grad(parts["ce"], [*weights.values()], retain_graph=True, allow_unused=True)
        d = torch.autograd.grad(parts["kd"] + parts["hint"], [*weights.values()], allow_unused=True)
        for (name, weight), g_c, g_d in zip(weights.items(), c, d, strict=True):
            own = decay * weight.detach() if weight.ndim > 1 else 0.0
            if g_c is None:
                assert g_d is not None
                rest[name] = momentum * rest[name] + g_d + own
            else:
                task[name] = (momentum - delta) * task[name] + g_c + own
                rest[name] = (momentum + delta) * rest[name] + g_d
            weight.data -= 0.05 * (task[name] + rest[name])
    return {f"learner.{name}": weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("delta", [0.0, 0.075])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_two_momenta_have_the_values_of_the_published_rule(delta: float, decay: float) -> None:
    found = bench(DistillationOrientedMomentum, delta=delta, decay=decay)
    for _ in range(8):
        found.update()
    expected = two_momenta(bench(Plain), 8, delta, decay)
    mine = learner(found)
    assert max(float((mine[name] - expected[name]).abs().max()) for name in mine) < 1e-12
    assert (distance(found, plain_after(8, decay=decay)) < 1e-12) == (delta == 0)


def test_the_losses_of_the_task_can_be_named() -> None:
    named, default, other = (
        bench(DistillationOrientedMomentum, task=task) for task in (["ce"], [], ["ce", "hint"])
    )  # fmt: skip
    for found in (named, default, other):
        for _ in range(3):
            found.update()
    assert distance(named, default) == 0.0
    assert distance(named, other) > 1e-6


def test_a_skipped_update_leaves_both_momenta_as_they_were() -> None:
    found = bench(DistillationOrientedMomentum)
    found.runtime._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    found.update()
    before, scale = found.weights(), found.runtime._scaler.get_scale()
    losses = found.losses(*found.batch())
    parts = {**losses.parts, "kd": losses.parts["kd"] * math.inf}
    found.updater.backward(Losses(losses.total, losses.terms, {}, parts), 1.0, found.runtime)
    found.updater.step(found.runtime)
    assert found.runtime._scaler.get_scale() < scale
    assert all(torch.equal(value, before[name]) for name, value in found.weights().items())


def test_half_precision_changes_no_rule() -> None:
    for updater in UPDATERS:
        plain, half = bench(updater), bench(updater)
        half.runtime._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for _ in range(4):
            plain.update()
            half.update()
        assert distance(plain, half) < 1e-6, updater.name


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"updater": {"use": "dot"}, "optimizer": {"use": "adamw"}}, "train.optimizer: found AdamW; dot needs"),
        (
            {"updater": {"use": "dot"}, "optimizer": {"use": "sgd", "momentum": 0.9, "nesterov": True}},
            "train.optimizer: dot needs sgd without nesterov",
        ),
        (
            {"updater": {"use": "dot"}, "optimizer": {"use": "sgd"}},
            r"train\.updater\.delta: found 0\.075 with train\.optimizer\.momentum 0",
        ),
        ({"updater": {"use": "dot", "delta": 0.1}}, r"delta: found 0\.1 .*momentum 0\.9; .* both together below 1"),
        ({"updater": {"use": "dot", "delta": -0.1}}, r"delta: found -0\.1"),
        ({"updater": {"use": "dot", "task": ["hnt"]}}, r"updater\.task: found 'hnt', expected some of ce, kd, hint"),
        ({"updater": {"use": "dwa", "temperature": 0}}, r"updater\.temperature: found 0.0, expected a number above 0"),
        ({"updater": {"use": "gradnorm", "alpha": -1}}, r"updater\.alpha: found -1\.0, expected a number of at least"),
        ({"updater": {"use": "gradnorm", "rate": 1.5}}, r"updater\.rate: found 1\.5, expected a number between"),
        (
            {"updater": {"use": "gradnorm", "shared": "thrid"}},
            r"updater\.shared: found 'thrid', which trains no weights",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(train: dict[str, Any], message: str) -> None:
    found = prepared(DISTIL, {"train": train})
    plan = build_plan(found, quiet(), trained=False)
    with pytest.raises(kdx.ConfigError, match=message):
        check_ready(plan, found.dataset, found.splits, Runtime(found.spec.runtime))


def test_dot_wants_to_know_the_task_where_no_loss_is_cross_entropy() -> None:
    with pytest.raises(kdx.ConfigError, match="none of kd, hint is cross_entropy; say which losses are of the task"):
        bench(DistillationOrientedMomentum, losses=("kd", "hint"))


def test_a_learning_rate_of_zero_stops_every_updater() -> None:
    for updater in UPDATERS:
        found = bench(updater)
        before = learner(found)
        set_lr(found.runtime.optimizer, 0.0)
        found.update()
        assert all(torch.equal(value, before[name]) for name, value in learner(found).items()), updater.name
