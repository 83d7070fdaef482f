"""The steps of a plan: borrowed parts, precision, weights, and who is named in an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import NET, batch, forward, plan_of
from torch import nn
from toy_plugin import TinyNet

from kdx.calls import Borrowed, NodeCall, execute, find_part, weighted
from kdx.components import Given
from kdx.errors import PlanError
from kdx.plugins import discover

TRAINS = discover([str(Path(__file__).parent / "trains_plugin.py")])
JUDGED: dict[str, Any] = {
    "teachers": {"big": NET},
    "targets": {"judged": {"use": "judged", "inputs": {"features": "big.embedding"}}},
    "losses": {"ce": None, "own": {"use": "cross_entropy", "inputs": {"student": "judged"}}},
}
REUSED = {"teachers": {"big": NET}, "losses": {"ce": None, "reused": {"use": "reused"}}}


def kd_call(weight: str = "w") -> NodeCall:
    component = discover().find("losses", "kd", "x").component
    arguments = {"student": "student.logits", "teacher": "big.logits", "temperature": "t"}
    node = component(component.Config(), Given())
    return NodeCall("losses.kd", "losses", "losses.kd", node, arguments, ("losses.kd",), {}, weight, "losses.kd (kd)")


# --- borrowed parts


@pytest.mark.parametrize("frozen", [True, False])
def test_a_borrowed_part_gives_gradient_to_its_input_and_none_to_its_weights(frozen: bool) -> None:
    part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(not frozen)
    x = torch.randn(5, 3, requires_grad=True)
    out = Borrowed(part)(x)
    torch.testing.assert_close(out, part(x))
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert all(parameter.grad is None for parameter in part.parameters())


def test_a_part_stays_trainable_for_its_owner() -> None:
    part = nn.Linear(3, 4)
    Borrowed(part)(torch.randn(5, 3, requires_grad=True)).sum().backward()
    part(torch.randn(5, 3)).sum().backward()
    assert part.weight.grad is not None


def test_a_loss_through_the_head_of_a_teacher_trains_the_body_of_the_student_alone() -> None:
    plan = plan_of(REUSED)
    learner, losses = forward(plan, batch())
    losses.total.backward()
    student = plan.student.network.net
    assert student.conv1.weight.grad.any()
    assert student.fc.weight.grad is None
    head = plan.loss_calls[0].parts["head"].module
    assert head.weight.grad is None
    assert not any(parameter is head.weight for parameter in learner.parameters())


def test_a_loss_through_the_head_of_the_student_leaves_that_head_alone() -> None:
    plan = plan_of(REUSED, {"losses": {"reused": {"borrows": {"head": "student.classifier"}}}})
    _, losses = forward(plan, batch())
    losses.total.backward()
    student = plan.student.network.net
    assert student.fc.weight.requires_grad
    assert student.fc.weight.grad is None
    assert student.conv1.weight.grad.any()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_part_that_a_node_trains_gets_the_gradient_of_a_plain_call(precision: torch.dtype | None) -> None:
    part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(5, 3, requires_grad=True)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        borrowed, plain = Borrowed(part, trains=True)(x), part(x)
    leaves = [x, *part.parameters()]
    for found, expected in zip(
        torch.autograd.grad(borrowed.square().sum(), leaves),
        torch.autograd.grad(plain.square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert part[1].bias.requires_grad


def test_a_target_that_trains_a_part_has_a_gradient_although_it_reads_a_frozen_teacher() -> None:
    used = {"losses": {"ce": {"use": "cross_entropy", "weight": 0.0}}}
    plan = plan_of(JUDGED, used, plugins=TRAINS)
    assert [call.name for call in plan.learner_calls] == ["judged", "student"]
    _, losses = forward(plan, batch())
    losses.total.backward()
    student = plan.student.network.net
    assert student.fc.weight.grad.any()
    assert not student.conv1.weight.grad.any()


def test_a_peer_may_be_trained_through_its_part() -> None:
    peer = {
        "teachers": {"big": {"trainable": True}},
        "targets": {"judged": {"inputs": {"features": "student.embedding"}, "borrows": {"head": "big.classifier"}}},
    }
    read = {"losses": {"ce": {"use": "cross_entropy", "inputs": {"student": "big.logits"}, "weight": 0.0}}}
    plan = plan_of(JUDGED, peer, read, plugins=TRAINS)
    _, losses = forward(plan, batch())
    losses.total.backward()
    call = next(call for call in plan.learner_calls if isinstance(call, NodeCall))
    assert call.parts["head"].module.weight.grad.any()


@pytest.mark.parametrize(("trainable", "why"), [(False, "is frozen"), (True, "no loss reads")])
def test_a_part_that_nothing_could_train_is_refused(trainable: bool, why: str) -> None:
    borrows = {"inputs": {"features": "student.embedding"}, "borrows": {"head": "teacher.classifier"}}
    layer = {"teachers": {"big": {"trainable": trainable}}, "targets": {"judged": borrows}}
    with pytest.raises(PlanError) as caught:
        plan_of(JUDGED, layer, plugins=TRAINS)
    assert str(caught.value) == (
        "targets.judged.borrows.head: judged trains this part, but teacher.classifier belongs to big, "
        f"which {why}; expected a part of a model that is trained, as in student.classifier"
    )


def test_the_classifier_of_any_net_is_what_makes_its_logits() -> None:
    net = TinyNet(1, 4, 3)
    assert find_part(net, "classifier", "x") is net.head
    assert find_part(net, "norm", "x") is net.norm
    assert find_part(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "classifier", "x").out_features == 2


def test_a_part_that_is_not_there_is_refused_with_its_place() -> None:
    with pytest.raises(PlanError, match=r"^losses.x.borrows.head: TinyNet has no part 'neck'"):
        find_part(TinyNet(1, 4, 3), "neck", "losses.x.borrows.head")
    with pytest.raises(PlanError, match=r"^here: Flatten has no part 'classifier'"):
        find_part(nn.Flatten(), "classifier", "here")


# --- running


def test_a_loss_gets_full_precision_whatever_the_networks_compute_in() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator) for _ in range(2))
    results = []
    for cast in (torch.bfloat16, torch.float32):
        values = {
            "student.logits": student.to(torch.bfloat16).to(cast),
            "big.logits": teacher.to(torch.bfloat16).to(cast),
            "t": torch.tensor(4.0),
        }
        execute([kd_call()], values)
        results.append(values["losses.kd"])
    assert results[0].dtype == torch.float32
    assert torch.equal(results[0], results[1])


def test_an_error_in_a_node_says_where_and_keeps_its_type() -> None:
    values = {"student.logits": torch.zeros(4, 3), "big.logits": torch.zeros(4, 2), "t": torch.tensor(4.0)}
    with pytest.raises(RuntimeError) as caught:
        execute([kd_call()], values)
    assert caught.value.__notes__ == ["in losses.kd (kd)"]


def test_a_call_reads_its_inputs_its_knobs_and_its_weight() -> None:
    assert kd_call().reads == ("student.logits", "big.logits", "t", "w")


@pytest.mark.parametrize(
    ("weight", "term", "total"),
    [
        (torch.tensor(2.0), torch.tensor(3.0), 6.0),
        (torch.tensor(2.0), torch.tensor([1.0, 3.0]), 4.0),
        (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 5.0]), 8.0),
        (torch.tensor([1.0, 3.0]), torch.tensor(5.0), 10.0),
    ],
)
def test_a_term_is_weighted_sample_by_sample_and_then_averaged(
    weight: torch.Tensor, term: torch.Tensor, total: float
) -> None:
    values = {"w": weight, "losses.kd": term}
    means, parts = weighted([kd_call()], values)
    assert list(parts) == list(means) == ["kd"]
    assert parts["kd"].shape == means["kd"].shape == ()
    assert parts["kd"].item() == total
    assert means["kd"].item() == term.mean().item()
