"""The reused teacher classifier: logits of a perfect student, and what is deployed after a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from kdx_plugins.reuse import ReusedClassifier
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss
from kdx.tiny import tiny_run

MAPS: dict[str, kdx.Shape] = {"student": (3, 6, 6), "teacher": (4, 3, 3), "logits": (5,)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(shapes: dict[str, kdx.Shape] = MAPS, **options: Any) -> ReusedClassifier:
    return ReusedClassifier(ReusedClassifier.Config(**options), kdx.Given(shapes=shapes))


def test_the_logits_are_the_teachers_when_the_projected_map_is_the_teachers() -> None:
    loss, head, student = make().eval(), nn.Linear(4, 5), normal(0, 2, 3, 6, 6)
    teacher = loss.projector(kdx.pool_to_smaller(student, normal(1, 2, 4, 3, 3))[0])
    value = loss(student=student, teacher=teacher, logits=head(teacher.mean((2, 3))), head=head)
    torch.testing.assert_close(value, torch.zeros(2))
    torch.testing.assert_close(loss.answer(student=student, head=head), head(teacher.mean((2, 3))))


def test_the_value_is_the_mean_squared_difference_of_the_projected_map() -> None:
    loss, student, teacher = make(factor=1, relu=False).eval(), normal(0, 2, 3, 6, 6), normal(1, 2, 4, 3, 3)
    pooled = student.unflatten(2, (3, 2)).unflatten(4, (3, 2)).mean((3, 5))
    expected = (loss.projector(pooled) - teacher).square().flatten(1).mean(1)
    found = loss(student=student, teacher=teacher, logits=normal(2, 2, 5), head=nn.Linear(4, 5))
    torch.testing.assert_close(found, expected)


def test_a_teacher_with_the_larger_map_is_pooled_to_the_students() -> None:
    loss = make({**MAPS, "teacher": (4, 12, 12)}).eval()
    student, head = normal(0, 2, 3, 6, 6), nn.Linear(4, 5)
    assert loss(student=student, teacher=normal(1, 2, 4, 12, 12), logits=normal(2, 2, 5), head=head).shape == (2,)
    torch.testing.assert_close(
        loss.answer(student=student, head=head), head(loss.projector(student).mean((2, 3)))
    )  # fmt: skip


def test_the_projector_is_the_published_one() -> None:
    layers = [(layer.in_channels, layer.out_channels, layer.kernel_size[0]) for layer in make().projector
              if isinstance(layer, nn.Conv2d)]  # fmt: skip
    assert layers == [(3, 2, 1), (2, 2, 3), (2, 4, 1)]
    assert isinstance(make().projector[-1], nn.ReLU)
    assert isinstance(make(relu=False).projector[-1], nn.BatchNorm2d)


def test_a_teacher_whose_classifier_reads_something_else_is_refused_before_training() -> None:
    loss, teacher, head = make(), normal(0, 2, 4, 3, 3), nn.Linear(4, 5)
    loss.calibrate(student=None, teacher=teacher, logits=head(teacher.mean((2, 3))), head=head)
    with pytest.raises(kdx.PlanError, match=r"not what the borrowed part makes of its map.*say `pool: false`"):
        loss.calibrate(student=None, teacher=teacher, logits=head(teacher.amax((2, 3))), head=head)


def test_a_head_that_pools_and_norms_may_be_borrowed_whole() -> None:
    net = timm.create_model("convnext_atto", in_chans=1, num_classes=5, depths=[1, 1, 1, 1], dims=[4, 4, 6, 8]).eval()
    images = normal(0, 2, 1, 32, 32)
    with torch.no_grad():
        maps, logits = net.forward_features(images), net(images)
        loss = make({**MAPS, "teacher": tuple(maps.shape[1:])}, pool=False)
        loss.calibrate(student=None, teacher=maps, logits=logits * 3, head=lambda x: net.head(x) * 3)
        with pytest.raises(kdx.PlanError, match="stands between the two"):
            make().calibrate(student=None, teacher=maps * 99, logits=logits, head=net.head.fc)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        ({"teacher": (17, 4)}, {}, kdx.PlanError, r"simkd projects maps \[C, H, W\], but .* teacher \[17, 4\]"),
        ({}, {"factor": 0}, kdx.ConfigError, "factor: found 0, expected 1 to the 4 channels"),
        ({}, {"factor": 5}, kdx.ConfigError, "factor: found 5, expected 1 to the 4 channels"),
    ],
)
def test_what_cannot_be_projected_is_refused(
    shapes: dict[str, kdx.Shape], options: dict[str, Any], error: type[kdx.KdxError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make({**MAPS, **shapes}, **options)


def test_simkd_keeps_the_contract() -> None:
    check_loss(ReusedClassifier, shapes=MAPS, modules={"head": nn.Linear(4, 5)})
    check_loss(ReusedClassifier, shapes={**MAPS, "student": (3, 2, 2)}, modules={"head": nn.Linear(4, 5)}, relu=False)


def test_a_run_deploys_the_teachers_classifier(tmp_path: Path) -> None:
    found = tiny_run(tmp_path, losses={"ce": None, "simkd": {"use": "simkd"}})
    student = found.student()
    head = student.parts["head"]
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (16, 10)
    assert "losses.simkd changes what is deployed: it answers from student, head" in (
        (found.folder / "plan.txt").read_text()
    )
