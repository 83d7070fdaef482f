"""Weights of teachers from policies that learn from rewards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_inputs import LABEL, STUDENT, TEACHER, normal, number
from kdx_plugins.teacher_policy import (
    Memory,
    PolicyWeights,
    Selection,
    WeightPolicy,
    learn,
    mixture_divergence,
    policy_loss,
    reinforce,
    standardised_rewards,
)
from torch import Tensor

import kdx
from kdx.testing import check_target

TEACHERS = [
    TEACHER,
    torch.tensor([[2.0, 2.0, 0.5, 0.0], [1.0, 0.2, -0.3, 0.9], [0.3, 0.2, 1.0, 0.4]], dtype=torch.float64),
    torch.tensor([[0.0, 1.0, 2.0, -1.0], [0.5, 2.0, 0.0, 0.1], [1.0, 0.1, 0.3, 0.2]], dtype=torch.float64),
]
MAPS = [(5, 2, 2), (6, 2, 2), (7, 3, 3)]
VECTORS = [(5,), (6,), (7,)]
SHAPES = {"embeddings": VECTORS, "features": MAPS, "projected": MAPS}


def policy_weights(count: int = 3, seed: int = 0, order: Sequence[int] = (0, 1, 2), **options: Any) -> PolicyWeights:
    shapes = {name: [shapes[k] for k in order[:count]] for name, shapes in SHAPES.items()}
    given = kdx.Given({"student": (4,), "label": (), "logits": [(4,)] * count, **shapes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PolicyWeights(PolicyWeights.Config(**options), given).double()


def policy_inputs(label: Tensor = LABEL) -> dict[str, Any]:
    return {
        "student": STUDENT,
        "label": label,
        "logits": TEACHERS,
        "embeddings": [normal(k, 3, *shape) for k, shape in enumerate(VECTORS)],
        "features": [normal(10 + k, 3, *shape) for k, shape in enumerate(MAPS)],
        "projected": [normal(20 + k, 3, *shape) for k, shape in enumerate(MAPS)],
        "temperature": number(4.0),
        "feature_weight": number(5.0),
    }


def selection(**options: Any) -> Selection:
    given = kdx.Given({"student": (4,), "encoding": (5,), "label": (), "logits": [(4,)] * 3})
    return Selection(Selection.Config(**options), given).double()


def selection_inputs(label: Tensor = LABEL) -> dict[str, Any]:
    return {
        "student": STUDENT,
        "encoding": normal(1, 3, 5),
        "label": label,
        "logits": TEACHERS,
        "temperature": number(4.0),
    }


def test_the_confidence_weights_have_their_golden_values() -> None:
    errors = torch.stack([F.cross_entropy(teacher, LABEL, reduction="none") for teacher in TEACHERS], 1)
    expected = [
        [0.45974892, 0.39901204, 0.42643473],
        [0.42161871, 0.18281218, 0.35289949],
        [0.11863238, 0.41817578, 0.22066578],
    ]
    for found, row in zip(kdx.confidence_weights(errors).T.tolist(), expected, strict=True):
        assert found == pytest.approx(row, abs=1e-8)
    assert kdx.soft_divergences(STUDENT, TEACHERS, number(4.0)).mean().item() == pytest.approx(0.3704212887, abs=1e-9)


def test_the_weights_are_the_mean_of_three_rules() -> None:
    node, inputs = policy_weights(warmup=0), policy_inputs()
    out = node(**inputs)
    for b in range(3):
        state, kl, cosine, ce = [], [], [], []
        for k in range(3):
            p, q = (TEACHERS[k][b] / 4).softmax(0), (STUDENT[b] / 4).softmax(0)
            kl.append(16 * (p * (p / q).log()).sum())
            ce.append(-TEACHERS[k][b].softmax(0)[LABEL[b]].log())
            pooled, vector = inputs["projected"][k][b].mean((1, 2)), inputs["embeddings"][k][b]
            cosine.append(pooled @ vector / pooled.norm() / vector.norm())
            state += [torch.stack([cosine[k], kl[k], ce[k]]), vector, TEACHERS[k][b]]
        hidden = (node.mixture.policy.hidden.weight @ torch.cat(state)).relu()
        sure = (1 - torch.stack(ce).softmax(0)) / 2
        for name, head, third in zip(out, node.mixture.policy.heads, (kl, cosine), strict=True):
            own = (head.weight @ hidden + head.bias).softmax(0)
            torch.testing.assert_close(out[name][b], (own + sure + torch.stack(third).softmax(0)) / 3)
    torch.testing.assert_close(out["weights"].sum(1), torch.ones(3, dtype=torch.float64))
    assert not out["weights"].requires_grad


def test_all_weights_are_one_in_the_first_epoch() -> None:
    node = policy_weights()
    assert (node(**policy_inputs())["weights"] == 1).all()
    node.after_update(kdx.Clock(1, 2, 10))
    assert (node(**policy_inputs())["feature_weights"] == 1).all()
    node.after_update(kdx.Clock(2, 2, 10))
    assert not (node(**policy_inputs())["weights"] == 1).any()


def test_the_order_of_the_teachers_changes_only_the_order_of_the_weights() -> None:
    order, inputs = [2, 0, 1], policy_inputs()
    node, moved = policy_weights(warmup=0), policy_weights(warmup=0, order=order)
    starts = torch.tensor([0, 12, 25, 39])
    columns = torch.cat([torch.arange(int(starts[k]), int(starts[k + 1])) for k in order])
    moved.mixture.policy.hidden.weight.copy_(node.mixture.policy.hidden.weight[:, columns])
    for ours, theirs in zip(moved.mixture.policy.heads, node.mixture.policy.heads, strict=True):
        ours.weight.copy_(theirs.weight[order])
        ours.bias.copy_(theirs.bias[order])
    found = node(**inputs)
    expected = moved(**{k: [v[i] for i in order] if isinstance(v, list) else v for k, v in inputs.items()})
    for name in found:
        torch.testing.assert_close(expected[name], found[name][:, order])


def test_rewards_are_standardised_over_labelled_samples_and_clamped() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
    known = torch.tensor([True, True, True, False])
    assert standardised_rewards(losses, known).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-5)
    assert not standardised_rewards(losses, known & False).any()
    assert not standardised_rewards(losses[:1], known[:1]).any()


def test_the_policy_learns_by_gradient_descent_on_what_it_has_met() -> None:
    node = policy_weights(lr=0.1, minibatch=2)
    before = copy.deepcopy(node.mixture.policy)
    node(**policy_inputs())
    states, rewards = node.memory.states[:3].clone(), node.memory.rewards[:3, 0].clone()
    assert rewards.max() > 0
    node.after_update(kdx.Clock(1, 2, 10))
    assert int(node.memory.filled) == 3, "neither an epoch has ended nor are 1000 updates done"
    node.after_update(kdx.Clock(2, 2, 10))
    assert int(node.memory.filled) == 0
    optimizer = torch.optim.SGD(before.requires_grad_().parameters(), lr=0.1)
    for part in (slice(0, 2), slice(2, 3)):
        optimizer.zero_grad()
        log_w = before(states[part])
        ones = torch.ones_like(log_w[:, 0])
        loss = sum(
            (rewards[part, None] * F.binary_cross_entropy(log_w[:, k].exp(), ones, reduction="none")).mean()
            for k in range(2)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(node.mixture.policy.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_the_policy_learns_every_so_many_updates() -> None:
    node = policy_weights(every=3)
    node(**policy_inputs())
    node.after_update(kdx.Clock(2, 100, 200))
    assert int(node.memory.filled) == 3
    node.after_update(kdx.Clock(3, 100, 200))
    assert int(node.memory.filled) == 0


def test_nothing_is_met_without_gradient_or_out_of_training() -> None:
    node, choice = policy_weights(), selection()
    with torch.no_grad():
        node(**policy_inputs())
        choice(**selection_inputs())
    node.eval()(**policy_inputs())
    assert int(node.memory.filled) == int(choice.memory.filled) == 0


def test_no_policy_is_seen_by_the_students_optimizer() -> None:
    for node in (policy_weights(), selection()):
        assert [*node.parameters()]
        assert not any(parameter.requires_grad for parameter in node.parameters())


@pytest.mark.parametrize("kind", ["mtkd_rl", "rl_kd"])
def test_a_policy_resumes_exactly(kind: str) -> None:
    def fresh() -> Any:
        return policy_weights(warmup=0) if kind == "mtkd_rl" else selection(warmup=0)

    inputs = policy_inputs() if kind == "mtkd_rl" else selection_inputs()

    def go(node: Any, first: int, last: int) -> Tensor:
        for step in range(first, last):
            weights: Tensor = node(**inputs)["weights"]
            node.after_update(kdx.Clock(step, 3, 30))
        return weights

    straight, stopped, resumed = fresh(), fresh(), fresh()
    expected = go(straight, 1, 9)
    go(stopped, 1, 5)
    resumed.load_state_dict(stopped.state_dict())
    resumed.given.generator.set_state(stopped.given.generator.get_state())
    assert torch.equal(go(resumed, 5, 9), expected)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_learnt_factors_follow_the_rewards_and_start_even() -> None:
    fixed, dynamic = policy_weights(warmup=0), policy_weights(warmup=0, dynamic=True)
    for name, weights in fixed(**policy_inputs()).items():
        torch.testing.assert_close(dynamic(**policy_inputs())[name], weights)
    before = copy.deepcopy(dynamic.mixture)
    met = dynamic.memory.take(64)[0]
    dynamic(**policy_inputs())
    dynamic.after_update(kdx.Clock(3, 3, 30))
    for parameter in before.parameters():
        parameter.requires_grad_()
    policy_loss(before(met["states"][:3].double()), met["rewards"][:3, 0].double()).backward()
    assert before.odds.grad is not None
    torch.testing.assert_close(dynamic.mixture.odds, -0.1 * before.odds.grad)
    torch.testing.assert_close(dynamic.mixture.odds.sum(1), torch.zeros(2, dtype=torch.float64))
    assert dynamic.mixture.odds.abs().max() > 1e-6
    assert not fixed.mixture.odds.any()


def test_selected_teachers_share_the_weight_evenly() -> None:
    node = selection(warmup=0)
    seen = torch.cat([node(**selection_inputs())["weights"] for _ in range(50)])
    allowed = torch.tensor([0, 1 / 3, 1 / 2, 1], dtype=torch.float64)
    assert (seen.unsqueeze(-1) - allowed).abs().amin(-1).max() < 1e-12
    sums = seen.sum(1)
    assert ((sums - 1).abs() < 1e-12).logical_or(sums == 0).all()
    assert 0.05 < (sums == 0).double().mean() < 0.25, "one in eight at even chances"


def test_all_teachers_are_selected_in_the_warmup_and_nothing_is_learnt() -> None:
    node = selection()
    assert (node(**selection_inputs())["weights"] == 1 / 3).all()
    node.after_update(kdx.Clock(1, 1, 10))
    assert not node.policy.weight.any()
    assert node.is_started


def test_the_policies_learn_by_reinforce() -> None:
    odds = normal(0, 4, 3).requires_grad_()
    actions = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64)
    rewards, known = normal(1, 4), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(reinforce(odds, actions, rewards, known), odds)
    mean = rewards[known > 0].mean()
    for b in range(4):
        expected = -(rewards[b] - mean) * known[b] / 3 * (actions[b] - odds[b].sigmoid())
        torch.testing.assert_close(gradient[b], expected.detach())


def test_a_policy_comes_to_select_the_teacher_that_is_rewarded() -> None:
    node, generator = selection(warmup=0, lr=1.0), torch.Generator().manual_seed(0)
    states = torch.ones(256, 3 * 10, dtype=torch.float64)
    for step in range(1, 21):
        chances = node.policy(states.unflatten(1, (3, -1))).sigmoid()
        actions = (torch.rand(chances.shape, generator=generator, dtype=torch.float64) < chances).double()
        rewards = actions[:, :1] - actions[:, 1:2]
        node.memory.add(states=states, actions=actions, rewards=rewards, is_known=torch.ones(256, 1))
        node.after_update(kdx.Clock(step, 1, 100))
    chances = node.policy(states[:1].unflatten(1, (3, -1))).sigmoid()[0]
    assert chances[0] > 0.9
    assert chances[1] < 0.1


def test_the_reward_may_count_the_divergence_from_the_selected() -> None:
    plain, full = selection(warmup=0), selection(warmup=0, reward="ce_kd")
    weights = full(**selection_inputs())["weights"]
    plain(**selection_inputs())
    gap = mixture_divergence(STUDENT, TEACHERS, weights, number(4.0))
    torch.testing.assert_close(plain.memory.rewards[:3, 0] - full.memory.rewards[:3, 0], gap)
    expected = -F.cross_entropy(STUDENT, LABEL, reduction="none")
    torch.testing.assert_close(plain.memory.rewards[:3, 0], expected)


def test_the_divergence_from_a_mixture_is_that_from_its_distribution() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = mixture_divergence(STUDENT, TEACHERS, weights, number(4.0))
    p = (TEACHERS[0][0] / 4).softmax(0) / 2 + (TEACHERS[1][0] / 4).softmax(0) / 2
    assert found[0].item() == pytest.approx(16 * (p * (p.log() - (STUDENT[0] / 4).log_softmax(0))).sum().item())
    assert found[1] == 0
    assert found[2].item() == pytest.approx(kdx.soft_divergences(STUDENT, TEACHERS, number(4.0))[2, 1].item())


def test_samples_without_a_label_teach_a_policy_nothing() -> None:
    none = torch.full((3,), -1)
    node, choice = policy_weights(warmup=0), selection(warmup=0)
    before = [copy.deepcopy(node.mixture.policy), copy.deepcopy(choice.policy)]
    assert node(**policy_inputs(none))["weights"].isfinite().all()
    choice(**selection_inputs(none))
    for changed in (node, choice):
        changed.after_update(kdx.Clock(1, 1, 10))
    for changed, policy in zip((node.mixture.policy, choice.policy), before, strict=True):
        for ours, theirs in zip(changed.parameters(), policy.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_memory_keeps_the_latest_rows_in_order() -> None:
    memory = Memory(4, states=1)
    for first in (0, 3, 6):
        memory.add(states=torch.arange(first, first + 3.0).unsqueeze(1))
    assert [part["states"].flatten().tolist() for part in memory.take(3)] == [[5.0, 6.0, 7.0], [8.0]]
    assert memory.take(3) == []
    memory.add(states=torch.arange(7.0).unsqueeze(1))
    assert memory.take(9)[0]["states"].flatten().tolist() == [3.0, 4.0, 5.0, 6.0]


def test_a_step_of_a_policy_lowers_its_loss() -> None:
    torch.manual_seed(0)
    policy, states, rewards = WeightPolicy(6, 3), normal(0, 8, 6).float(), torch.ones(8)
    before = policy_loss(policy(states), rewards)
    learn(policy, states, lambda log_w: policy_loss(log_w, rewards), 0.1)
    assert policy_loss(policy(states), rewards) < before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: policy_weights(count=1), "it was given one; expected two or more"),
        (lambda: policy_weights(lr=0.0), "lr: found 0.0, expected a number above 0"),
        (lambda: policy_weights(every=0), "every: found 0, expected at least 1"),
        (lambda: policy_weights(warmup=-1), "warmup: found -1, expected 0 epochs or more"),
        (lambda: selection(reward="accuracy"), "reward: found 'accuracy', expected one of ce, ce_kd"),
        (lambda: selection(memory=0), "memory: found 0, expected at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(build: Any, message: str) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        build()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"projected": [(5, 2, 2), (6, 2, 2)]}, "put an aligner for each teacher in between"),
        ({"embeddings": [(5,), (9,)]}, r"maps are \[5, 2, 2\], \[6, 2, 2\] and the embeddings \[5\], \[9\]"),
        ({"logits": [(4,), (6,)]}, r"those of the teachers \[4\], \[6\]; expected the same classes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    maps, vectors = [(5, 2, 2), (6, 2, 2)], [(5,), (6,)]
    shapes: dict[str, Any] = {"student": (4,), "label": (), "logits": [(4,)] * 2}
    shapes |= {"embeddings": vectors, "features": maps, "projected": [*maps], **changed}
    if "projected" in changed:
        shapes["features"] = [(5, 2, 2), (8, 2, 2)]
    with pytest.raises(kdx.PlanError, match=message):
        PolicyWeights(PolicyWeights.Config(), kdx.Given(shapes))


def test_the_targets_keep_the_contract() -> None:
    check_target(PolicyWeights, shapes=SHAPES, warmup=0)
    check_target(Selection, shapes={"encoding": (6,)}, order_matters=True, warmup=0, reward="ce_kd")
