"""A net with two heads: a ref to each by a tap, also in training; it answers with the mean of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import batch, forward, plan_of, run_calls
from small_run import quiet

from kdx.builtin.images import FashionMnist
from kdx.config import load_mapping
from kdx.runs import build_plan, prepare
from kdx.tiny import tiny_run

ARGS = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}
DISTILLED = {
    "use": "timm",
    "model": "deit_tiny_distilled_patch16_224",
    "args": ARGS,
    "taps": {"cls": "head", "dist": "head_dist"},
}
TEACHER = {"teachers": {"wide": {"use": "timm", "model": "vit_tiny_patch16_224", "args": ARGS}}}
LOSSES = {
    "losses": {
        "ce": {"use": "cross_entropy", "weight": 0.0},
        "token": {"use": "deit_token", "inputs": {"cls": "student.cls", "dist": "student.dist"}},
    }
}


@pytest.mark.parametrize("training", [True, False])
def test_taps_give_each_head_and_logits_are_their_mean(training: bool) -> None:
    plan = plan_of({"student": None}, {"student": DISTILLED}, TEACHER, LOSSES)
    plan.student.train(training)
    values = run_calls(plan, batch())
    cls, dist = values["student.cls"], values["student.dist"]
    assert cls.shape == dist.shape == (4, 3)
    assert not torch.equal(cls, dist)
    torch.testing.assert_close(values["student.logits"], (cls + dist) / 2)
    if not training:
        torch.testing.assert_close(plan.student.network.answer(batch()), (cls + dist) / 2)


def test_both_heads_learn_and_the_teacher_says_nothing_to_the_first() -> None:
    plan = plan_of({"student": None}, {"student": DISTILLED}, TEACHER, LOSSES, {"losses": {"token": {"alpha": 0.0}}})
    learner, losses = forward(plan, batch())
    learner.zero_grad()
    losses.total.backward()
    net = plan.student.network.net
    assert net.head.weight.grad.any()
    assert not net.head_dist.weight.grad.any()
    taught = plan_of({"student": None}, {"student": DISTILLED}, TEACHER, LOSSES, {"losses": {"token": {"alpha": 1.0}}})
    _, losses = forward(taught, batch())
    losses.total.backward()
    net = taught.student.network.net
    assert not net.head.weight.grad.any()
    assert net.head_dist.weight.grad.any()


def test_a_run_evaluates_the_mean_of_both_heads(tmp_path: Path) -> None:
    own = {"layers": None, "channels": None, "stem_width": None, "output_stride": None, **ARGS}
    found = tiny_run(tmp_path, student={**DISTILLED, "args": own}, losses=LOSSES["losses"], train={"updates": 2})
    student = found.student()
    source = FashionMnist(FashionMnist.Config()).test()
    assert source is not None
    images = source.fetch(range(40, 80))  # those of a tiny run
    with torch.no_grad():
        tokens = student.net.forward_features(student.prepare(images["image"].float() / 255))
        logits = (student.net.head(tokens[:, 0]) + student.net.head_dist(tokens[:, 1])) / 2
    assert found.metrics["cross_entropy"] == pytest.approx(F.cross_entropy(logits, images["label"]).item(), rel=1e-5)


def test_the_config_of_the_distillation_token_reads_both_heads() -> None:
    config = load_mapping({"extends": str(Path(__file__).parent.parent / "configs" / "methods" / "deit_token.yaml")})
    plan = build_plan(prepare({**config, "baseline": False}, quiet()), quiet(), trained=False)
    assert plan.shapes["student.cls"] == plan.shapes["student.dist"] == (10,)
