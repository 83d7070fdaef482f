"""Nets of several modalities that learn together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_inputs import LABEL, STUDENT, TEACHER, normal, number
from kdx_plugins.crossmodal_peers import (
    CustomisedTransfer,
    MultipleChoice,
    divergence,
    kendall,
    multiple_choice,
    other_classes,
    winners,
)
from kdx_plugins.logit import soft_targets
from scipy.stats import kendalltau

import kdx
from kdx.testing import check_loss

MAPS = {"student_map": (6, 3, 3), "peer": (5,), "peer_map": (4, 2, 2)}


def test_dmcl_keeps_the_contract_of_a_loss() -> None:
    check_loss(MultipleChoice, shapes={"logits": [(5,)] * 3}, order_matters=False)


def test_the_winner_learns_from_the_label_and_the_others_from_both() -> None:
    nets = [STUDENT, TEACHER, normal(0, 3, 4)]
    errors, won = winners(nets, LABEL)
    tau, share = number(2.0), number(0.3)
    value = multiple_choice(nets, LABEL, tau, share)
    for b in range(3):
        losses = [F.cross_entropy(z[b], LABEL[b]) for z in nets]
        best = min(range(3), key=lambda m: float(losses[m]))
        assert won[b].tolist() == [m == best for m in range(3)]
        slow = losses[best] + sum(
            0.7 * losses[m] + 0.3 * soft_targets(nets[m][b : b + 1], nets[best][b : b + 1], tau)[0]
            for m in range(3)
            if m != best
        )
        torch.testing.assert_close(value[b], slow)
    assert errors.shape == (3, 3)


def test_a_winner_gets_no_gradient_through_the_others() -> None:
    good, bad = (20 * F.one_hot(LABEL, 4).double()).requires_grad_(), normal(1, 3, 4).requires_grad_()
    multiple_choice([good, bad], LABEL, number(2.0), number(1.0)).sum().backward()
    assert good.grad is not None
    assert good.grad.abs().max() < 1e-7  # that of its own cross-entropy, which is 0
    assert bad.grad is not None
    assert bad.grad.abs().max() > 0.1


def test_a_net_that_lacks_its_modality_neither_wins_nor_learns() -> None:
    absent, other = (20 * F.one_hot(LABEL, 4).double()).requires_grad_(), STUDENT.clone().requires_grad_()
    present = torch.tensor([[False, True]] * 3)
    value = multiple_choice([absent, other], LABEL, number(2.0), number(0.5), present)
    torch.testing.assert_close(value, F.cross_entropy(STUDENT, LABEL, reduction="none"))
    value.sum().backward()
    assert absent.grad is None or not absent.grad.any()


def test_samples_without_a_label_have_no_winner() -> None:
    node = MultipleChoice(MultipleChoice.Config(), kdx.Given({"logits": [(4,)] * 2}))
    value = node([STUDENT, TEACHER], torch.tensor([0, -1, -1]), number(2.0), number(0.5))
    assert value[1:].tolist() == [0, 0]
    first = multiple_choice([STUDENT[:1], TEACHER[:1]], LABEL[:1], number(2.0), number(0.5))
    torch.testing.assert_close(value.mean(), first[0])
    with pytest.raises(kdx.PlanError, match="dmcl lets nets win against each other, but it was given one"):
        MultipleChoice(MultipleChoice.Config(), kdx.Given({"logits": [(4,)]}))


def test_rank_correlations_have_their_golden_values() -> None:
    assert kendall(STUDENT, TEACHER).tolist() == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-12)


def test_rank_correlations_are_those_of_scipy_with_ties_as_well() -> None:
    a, b = (normal(seed, 20, 6).mul(2).round() for seed in (2, 3))
    expected = [float(kendalltau(x.numpy(), y.numpy()).statistic) for x, y in zip(a, b, strict=True)]
    assert kendall(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert kendall(torch.ones(1, 4), torch.rand(1, 4)).item() == 0


def test_the_other_classes_have_their_golden_values() -> None:
    assert other_classes(STUDENT, TEACHER, LABEL, "zeroed").mean().item() == pytest.approx(0.1789020026, abs=1e-9)
    assert other_classes(STUDENT, TEACHER, LABEL, "masked").mean().item() == pytest.approx(0.2334501008, abs=1e-9)


@pytest.mark.parametrize("form", ["masked", "zeroed"])
def test_the_true_class_has_no_part_in_the_other_classes(form: str) -> None:
    student = STUDENT.clone().requires_grad_()
    value = other_classes(student, TEACHER, LABEL, form)
    moved = torch.where(F.one_hot(LABEL, 4).bool(), 7.0, STUDENT)
    torch.testing.assert_close(other_classes(moved, TEACHER, LABEL, form), value.detach())
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[torch.arange(3), LABEL].any()
    assert other_classes(TEACHER, TEACHER, LABEL, form).abs().max() < 1e-12


def test_a_sample_without_a_label_keeps_all_its_classes() -> None:
    torch.testing.assert_close(
        other_classes(STUDENT, TEACHER, torch.tensor([-1, -1, -1])), divergence(TEACHER, STUDENT)
    )


def test_c2kd_keeps_the_contract_of_a_loss() -> None:
    for classes in ("masked", "zeroed"):
        check_loss(CustomisedTransfer, shapes=MAPS, classes=classes, order_matters=False)


def c2kd() -> CustomisedTransfer:
    shapes = {"student": (4,), "student_map": (6, 3, 3), "peer": (4,), "peer_map": (5, 2, 2), "label": ()}
    node = CustomisedTransfer(CustomisedTransfer.Config(), kdx.Given(shapes)).double()
    return node.eval()


def test_proxies_of_samples_that_disagree_do_not_meet() -> None:
    node, maps = c2kd(), (normal(4, 3, 6, 3, 3), normal(5, 3, 5, 2, 2))
    ours, theirs = node.proxy(maps[0]), node.peer_proxy(maps[1])
    within = (
        divergence(TEACHER, theirs)
        + divergence(theirs, TEACHER)
        + divergence(STUDENT, ours)
        + divergence(ours, STUDENT)
    )
    between = other_classes(ours, theirs, LABEL) + other_classes(theirs, ours, LABEL)
    for agreement in (-1.0, 0.0, 1.0):
        keeps = kendall(ours, theirs) > agreement
        found = node(STUDENT, maps[0], TEACHER, maps[1], LABEL, number(agreement))
        torch.testing.assert_close(found, within + torch.where(keeps, between, 0.0))
    assert not (kendall(ours, theirs) > 1).any()


def test_student_peer_and_proxies_all_learn() -> None:
    node = c2kd()
    student, peer = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    maps = [normal(6, 3, 6, 3, 3).requires_grad_(), normal(7, 3, 5, 2, 2).requires_grad_()]
    node(student, maps[0], peer, maps[1], LABEL, number(-1.0)).sum().backward()
    for tensor in (student, peer, *maps, *node.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.any()


def test_c2kd_refuses_logits_and_maps_that_do_not_fit() -> None:
    shapes = {"student": (4,), "student_map": (6, 3, 3), "peer": (4,), "peer_map": (5, 2, 2), "label": ()}
    for change, message in (
        ({"peer": (3,)}, r"the logits are \[4\] and \[3\]"),
        ({"peer_map": (5,)}, r"peer_map is \[5\] for one sample, expected \[C, H, W\]"),
    ):
        with pytest.raises(kdx.PlanError, match=message):
            CustomisedTransfer(CustomisedTransfer.Config(), kdx.Given({**shapes, **change}))
    with pytest.raises(kdx.ConfigError, match="classes: found 'all'"):
        CustomisedTransfer(CustomisedTransfer.Config("all"), kdx.Given(shapes))
