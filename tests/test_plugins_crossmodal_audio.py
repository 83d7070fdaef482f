"""Transfer between nets that hear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_inputs import LABEL, STUDENT, TEACHER, normal, number
from kdx_plugins.crossmodal_audio import (
    CrossModelAudio,
    JointAttention,
    StoredPredictions,
    joint_attention,
    softened_teacher,
)

import kdx
from kdx.testing import check_loss

INDEX = torch.tensor([7, 3, 5])
PARTNER = INDEX.roll(1)


def cmkd(activation: str = "softmax", label: tuple[int, ...] = ()) -> CrossModelAudio:
    shapes = {"student": (4,), "teacher": (4,), "label": label}
    return CrossModelAudio(CrossModelAudio.Config(activation), kdx.Given(shapes))


def test_cmkd_keeps_the_contract_of_a_loss() -> None:
    for activation in ("softmax", "sigmoid"):
        check_loss(CrossModelAudio, activation=activation)


def test_only_the_teacher_of_cmkd_is_softened() -> None:
    value = cmkd()(STUDENT, TEACHER, LABEL, number(0.3), number(2.0))
    hard = F.cross_entropy(STUDENT, LABEL, reduction="none")
    soft = -((TEACHER / 2).softmax(1) * STUDENT.log_softmax(1)).sum(1)
    torch.testing.assert_close(value, 0.3 * hard + 0.7 * soft)
    only = cmkd()(STUDENT, TEACHER, LABEL, number(0.0), number(1.0))
    entropy = -(TEACHER.softmax(1) * TEACHER.log_softmax(1)).sum(1)
    assert (only - entropy).mean().item() == pytest.approx(0.1454213744, abs=1e-9)  # `kd` at temperature 1


def test_cmkd_of_several_labels_takes_each_class_by_itself() -> None:
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    value = cmkd("sigmoid", (4,))(STUDENT, TEACHER, labels, number(0.5), number(1.0))
    hard = F.binary_cross_entropy_with_logits(STUDENT, labels.double(), reduction="none").mean(1)
    torch.testing.assert_close(value, (hard + softened_teacher(STUDENT, TEACHER, number(1.0), "sigmoid")) / 2)
    with pytest.raises(kdx.PlanError, match=r"label is \[4\] for one sample, expected one class"):
        cmkd("softmax", (4,))
    with pytest.raises(kdx.ConfigError, match="activation: found 'tanh'"):
        cmkd("tanh")


def test_unlabelled_samples_of_cmkd_have_the_teacher_alone() -> None:
    label = torch.tensor([0, -1, 2])
    value = cmkd()(STUDENT, TEACHER, label, number(1.0), number(1.0))
    assert value[1] == 0
    torch.testing.assert_close(value.mean(), F.cross_entropy(STUDENT, label, ignore_index=-1))


def stored(teachers: int = 1, mixed: bool = True) -> StoredPredictions:
    shapes = {"student": (4,), "teacher": [(4,)] * teachers, "label": (), "index": ()}
    return StoredPredictions(
        StoredPredictions.Config(), kdx.Given(shapes | ({"share": (), "partner": ()} if mixed else {}))
    )


def bce(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(student, target, reduction="none").mean(1)


def test_efficientat_keeps_the_contract_of_a_loss() -> None:
    check_loss(StoredPredictions)
    check_loss(
        StoredPredictions,
        tensors={
            "index": torch.arange(11),
            "share": torch.linspace(0, 1, 11),
            "partner": torch.arange(11).roll(1),
            "known": torch.arange(11) > 2,
        },
    )


def test_the_answers_for_both_parts_of_a_mixture_are_mixed_in_the_loss() -> None:
    share = torch.tensor([0.2, 1.0, 0.7], dtype=torch.float64)
    value = stored()(STUDENT, [TEACHER], LABEL, INDEX, share, PARTNER, None, number(0.1), number(1.0))
    hard, soft = F.one_hot(LABEL, 4).double(), TEACHER.sigmoid()
    for place in range(3):
        row, other, r = STUDENT[place : place + 1], (place - 1) % 3, share[place]
        parts = [r * bce(row, t[place : place + 1]) + (1 - r) * bce(row, t[other : other + 1]) for t in (hard, soft)]
        torch.testing.assert_close(value[place : place + 1], 0.1 * parts[0] + 0.9 * parts[1])


def test_without_a_mixture_the_answers_are_those_of_the_clip() -> None:
    value = stored(2, mixed=False)(
        STUDENT, [TEACHER, 3 * TEACHER], LABEL, INDEX, None, None, None, number(0.1), number(2.0)
    )
    expected = 0.1 * bce(STUDENT, F.one_hot(LABEL, 4).double()) + 0.9 * bce(STUDENT, TEACHER.sigmoid())
    torch.testing.assert_close(value, expected)


def test_what_is_not_known_adds_nothing() -> None:
    share = torch.full((3,), 0.6, dtype=torch.float64)
    known = torch.tensor([True, False, True])
    value = stored()(
        STUDENT, [TEACHER], -torch.ones_like(LABEL), INDEX, share, PARTNER, known, number(0.1), number(1.0)
    )
    soft = TEACHER.sigmoid()
    own, other = bce(STUDENT, soft), bce(STUDENT, soft.roll(1, 0))
    expected = 0.9 * (0.6 * own * known + 0.4 * other * known.roll(1))
    torch.testing.assert_close(value, expected)
    elsewhere = torch.tensor([99, 99, 99])
    alone = stored()(STUDENT, [TEACHER], LABEL, INDEX, share, elsewhere, None, number(0.0), number(1.0))
    torch.testing.assert_close(alone, 0.6 * own)


def test_a_teacher_that_did_not_hear_a_clip_is_left_out_of_its_mean() -> None:
    present = torch.tensor([[True, False], [True, True], [False, True]])
    value = stored(2, mixed=False)(
        STUDENT, [TEACHER, 3 * TEACHER], LABEL, INDEX, None, None, None, number(0.0), number(1.0), present=present
    )
    mean = TEACHER * torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(value, bce(STUDENT, mean.sigmoid()))
    shapes = {"student": (4,), "teacher": [(4,)], "label": (), "index": (), "share": ()}
    with pytest.raises(kdx.PlanError, match="a mixture has a `share` and a `partner`; name both or neither"):
        StoredPredictions(StoredPredictions.Config(), kdx.Given(shapes))


def test_mm_distillnet_keeps_the_contract_of_a_loss() -> None:
    check_loss(
        JointAttention,
        shapes={"student": [(4, 6, 6), (8, 3, 3)], "teacher": [(4, 6, 6), (5, 3, 6), (8, 3, 3), (6, 3, 3)]},
    )


def test_the_joint_attention_is_the_product_of_the_teachers() -> None:
    ours, theirs = normal(0, 2, 3, 4, 4), [normal(1, 2, 5, 4, 4), normal(2, 2, 6, 4, 4)]

    def map_of(x: torch.Tensor) -> torch.Tensor:
        squares = x.square().mean(1).flatten(1)
        return squares / squares.norm(dim=1, keepdim=True)

    joint = map_of(theirs[0]) * map_of(theirs[1])
    joint = joint / joint.sum(1, keepdim=True)
    slow = F.kl_div((map_of(ours) / 9).log_softmax(1), (joint / 9).softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(joint_attention(ours, theirs, number(9.0)), slow)


def test_a_teacher_that_is_absent_has_no_say_in_the_joint_attention() -> None:
    ours, theirs = normal(3, 2, 3, 4, 4), [normal(4, 2, 5, 4, 4), normal(5, 2, 6, 4, 4)]
    found = joint_attention(ours, theirs, number(9.0), torch.tensor([[True, False], [True, True]]))
    torch.testing.assert_close(found[0], joint_attention(ours, theirs[:1], number(9.0))[0])
    torch.testing.assert_close(found[1], joint_attention(ours, theirs, number(9.0))[1])


def test_stages_are_compared_depth_by_depth() -> None:
    ours = [normal(6, 2, 3, 4, 4), normal(7, 2, 3, 2, 2)]
    theirs = [normal(8 + k, 2, 3, *size) for k, size in enumerate([(4, 4), (4, 4), (2, 2), (2, 2)])]
    shapes = {"student": [tuple(x.shape[1:]) for x in ours], "teacher": [tuple(x.shape[1:]) for x in theirs]}
    value = JointAttention(JointAttention.Config(), kdx.Given(shapes))(ours, theirs, number(9.0))
    slow = joint_attention(ours[0], theirs[:2], number(9.0)) + joint_attention(ours[1], theirs[2:], number(9.0))
    torch.testing.assert_close(value, slow)
    with pytest.raises(kdx.PlanError, match="found 3 maps of teachers for 2 of the student"):
        JointAttention(JointAttention.Config(), kdx.Given({**shapes, "teacher": shapes["teacher"][:3]}))
