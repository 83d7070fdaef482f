"""Losses that take a frozen teacher of one modality to a student of another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_inputs import STUDENT, TEACHER, normal, number
from kdx_plugins.crossmodal import (
    AmbientSound,
    EmotionTransfer,
    SoundNet,
    SupervisionTransfer,
    feature_regression,
    head_divergences,
    strongest,
    texture,
)
from kdx_plugins.logit import soft_targets

import kdx
from kdx.testing import check_loss


def transfer(student: int = 5, teacher: int = 5, **options: Any) -> SupervisionTransfer:
    given = kdx.Given({"student": (student,), "teacher": (teacher,)})
    return SupervisionTransfer(SupervisionTransfer.Config(**options), given)


def test_supervision_transfer_keeps_the_contract_of_a_loss() -> None:
    for options in ({}, {"distance": "cosine"}, {"standardise": False}):
        check_loss(SupervisionTransfer, shapes={"student": (6,), "teacher": (4,)}, **options)
    check_loss(SupervisionTransfer, shapes={"student": (6, 3, 3), "teacher": (4, 2, 5)})
    check_loss(SupervisionTransfer, shapes={"student": (4,), "teacher": (4,)}, zero_at_equality=True)


def test_the_rows_of_one_modality_belong_to_those_of_the_other() -> None:
    ours, theirs = normal(0, 6, 5), normal(1, 6, 5)
    moved = theirs.roll(1, 0)
    assert not torch.allclose(feature_regression(ours, theirs).mean(), feature_regression(ours, moved).mean())
    slow = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 5
        for x, y in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]
    assert feature_regression(ours, theirs).tolist() == pytest.approx(slow, abs=1e-12)


def test_a_teacher_s_numbers_are_standardised_over_what_was_seen_before() -> None:
    node, rows = transfer(), normal(2, 30, 5).float() * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.0]) + 2
    for part in rows.split(7):
        node.calibrate(student=part, teacher=part)
    expected = (rows - rows.mean(0)) / rows.std(0, correction=0)
    expected[:, 4] = rows[:, 4]  # which never varies
    torch.testing.assert_close(node.mean, rows.mean(0))
    assert node(expected, rows).max() < 1e-8


def test_maps_of_two_modalities_are_compared_after_pooling() -> None:
    ours, theirs = normal(3, 2, 5, 3, 4), normal(4, 2, 5, 7, 2)
    given = kdx.Given({"student": (5, 3, 4), "teacher": (5, 7, 2)})
    node = SupervisionTransfer(SupervisionTransfer.Config(standardise=False), given)
    torch.testing.assert_close(node(ours, theirs), feature_regression(ours.mean((2, 3)), theirs.mean((2, 3))))


def test_supervision_transfer_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(kdx.PlanError, match="student has 5 numbers and teacher 4; say `project: true`"):
        transfer(5, 4, project=False)
    with pytest.raises(kdx.ConfigError, match="distance: found 'l7'"):
        transfer(distance="l7")
    with pytest.raises(kdx.PlanError, match="student is one number for a sample"):
        SupervisionTransfer(SupervisionTransfer.Config(), kdx.Given({"student": (), "teacher": (4,)}))


def test_soundnet_keeps_the_contract_of_a_loss() -> None:
    for reduction in ("sum", "mean"):
        check_loss(SoundNet, shapes={"student": (6,), "teacher": [(5,), (3,)]}, reduction=reduction)


def test_the_head_of_a_teacher_meets_the_divergence_at_temperature_1() -> None:
    value = head_divergences([STUDENT], [TEACHER])
    assert value.mean().item() == pytest.approx(0.1454213744, abs=1e-9)
    torch.testing.assert_close(head_divergences([STUDENT], [TEACHER], "mean"), value / 4)
    both = head_divergences([STUDENT, STUDENT], [TEACHER, STUDENT])
    torch.testing.assert_close(both, value / 2)


def test_a_teacher_that_saw_nothing_is_left_out_of_soundnet() -> None:
    present = torch.tensor([[True, True], [False, True], [True, False]])
    value = head_divergences([STUDENT, STUDENT], [TEACHER, 2 * TEACHER], "sum", present)
    one, two = head_divergences([STUDENT], [TEACHER]), head_divergences([STUDENT], [2 * TEACHER])
    torch.testing.assert_close(value, torch.stack([(one[0] + two[0]) / 2, two[1], one[2]]))


def test_soundnet_needs_logits_of_its_teachers() -> None:
    with pytest.raises(kdx.PlanError, match=r"found \[4, 2\] for one sample of a teacher"):
        SoundNet(SoundNet.Config(), kdx.Given({"student": (6,), "teacher": [(4, 2)]}))


def test_texture_is_mean_spread_and_correlation_of_neighbouring_bands() -> None:
    spectra = normal(5, 2, 1, 3, 20)
    found = texture(spectra)
    assert found.shape == (2, 8)
    for b in range(2):
        bands = spectra[b, 0]
        torch.testing.assert_close(found[b, :3], bands.mean(1))
        torch.testing.assert_close(found[b, 3:6], bands.std(1, correction=0))
        torch.testing.assert_close(found[b, 6:], torch.corrcoef(bands).diagonal(1))
    torch.testing.assert_close(texture(spectra.flip(-1)), found)
    assert texture(torch.zeros(2, 1, 3, 20)).isfinite().all()


def sounds(kinds: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectrograms of some kinds, and which kind each is."""
    kind = torch.arange(count) % kinds
    patterns = normal(7, kinds, 1, 4, 10).float()
    return patterns[kind] + normal(6, count, 1, 4, 10).float() * 0.01, kind


def ambient(clusters: int = 3) -> AmbientSound:
    return AmbientSound(AmbientSound.Config(clusters), kdx.Given({"student": (6,), "sound": (1, 4, 10)}))


def test_ambient_sound_keeps_the_contract_of_a_loss() -> None:
    check_loss(AmbientSound, shapes={"student": (6,), "sound": (1, 4, 10)}, clusters=3)


def test_sounds_of_one_kind_are_one_cluster() -> None:
    node, (spectra, kind) = ambient(), sounds(3, 24)
    for part in spectra.split(12):
        node.calibrate(student=torch.zeros(12, 6), sound=part)
    cluster = node._nearest(texture(spectra))
    assert len({(int(a), int(b)) for a, b in zip(kind, cluster, strict=True)}) == 3
    assert sorted(node.sizes.tolist()) == [8, 8, 8]


def test_the_number_of_the_cluster_is_what_the_student_learns() -> None:
    node, (spectra, _) = ambient(), sounds(3, 24)
    node.calibrate(student=torch.zeros(24, 6), sound=spectra)
    cluster = node._nearest(texture(spectra))
    student = torch.nn.functional.one_hot(cluster, 6).float()
    with torch.no_grad():
        node.head.weight.copy_(20 * torch.eye(3, 6))
        node.head.bias.zero_()
    assert node(student, spectra).max() < 1e-6
    assert node(student.roll(1, 0), spectra).min() > 5


def test_clusters_cannot_start_from_fewer_sounds() -> None:
    with pytest.raises(kdx.PlanError, match="30 clusters cannot start from a batch with 12 sounds"):
        ambient(30).calibrate(student=torch.zeros(12, 6), sound=sounds(3, 12)[0])
    with pytest.raises(kdx.ConfigError, match="clusters: found 1"):
        ambient(1)
    with pytest.raises(kdx.PlanError, match=r"sound is \[5\] for one sample, expected a spectrogram"):
        AmbientSound(AmbientSound.Config(), kdx.Given({"student": (6,), "sound": (5,)}))


def test_emotion_transfer_keeps_the_contract_of_a_loss() -> None:
    check_loss(EmotionTransfer)
    check_loss(EmotionTransfer, shapes={"student": (5,), "teacher": [(7, 5)]})


def test_the_largest_logit_over_the_frames_counts() -> None:
    frames = normal(7, 2, 3, 4)
    torch.testing.assert_close(strongest([frames]), frames.amax(1))
    torch.testing.assert_close(strongest(list(frames.unbind(1))), frames.amax(1))
    present = torch.tensor([[True, False, True], [False, True, False]])
    found = strongest(list(frames.unbind(1)), present)
    torch.testing.assert_close(found, torch.stack([frames[0, [0, 2]].amax(0), frames[1, 1]]))


def test_the_gradient_is_that_of_soft_targets_without_the_squared_temperature() -> None:
    node = EmotionTransfer(EmotionTransfer.Config(), kdx.Given({"student": (4,), "teacher": [(4,)]}))
    student = STUDENT.clone().requires_grad_()
    (ours,) = torch.autograd.grad(node(student, [TEACHER], number(2.0)).sum(), student)
    (theirs,) = torch.autograd.grad(soft_targets(student, TEACHER, number(2.0)).sum(), student)
    torch.testing.assert_close(4 * ours, theirs)


def test_the_least_value_of_emotion_transfer_is_the_teacher_s_entropy() -> None:
    node = EmotionTransfer(EmotionTransfer.Config(), kdx.Given({"student": (4,), "teacher": [(4,)]}))
    p = (TEACHER / 2).softmax(1)
    torch.testing.assert_close(node(TEACHER, [TEACHER], number(2.0)), -(p * p.log()).sum(1))
    with pytest.raises(kdx.PlanError, match=r"found \[3\] for one sample of a teacher, expected \[4\]"):
        EmotionTransfer(EmotionTransfer.Config(), kdx.Given({"student": (4,), "teacher": [(3,)]}))
