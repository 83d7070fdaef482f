"""What a view mixes and how, the record of it, and the losses and targets that read that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_inputs import LABEL, LOGITS, STUDENT, TEACHER, number
from kdx_plugins.soft_labels import MixedAnswers, MixedCrossEntropy
from mixed_run import MIXED, pictures
from small_run import prepared, quiet, run_in, weights_of
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from timm.loss import SoftTargetCrossEntropy

import kdx
from kdx.api import RunResult
from kdx.builtin.augment import CutMix, rectangles
from kdx.builtin.images import FashionMnist
from kdx.builtin.spoken_digits import SpokenDigits
from kdx.builtin.tensor_data import TensorDataset
from kdx.errors import ConfigError, KdxError
from kdx.loop import make_session
from kdx.micro_batch import fit
from kdx.randomness import Randomness
from kdx.runs import build_plan
from kdx.runtime import Runtime
from kdx.testing import check_loss, check_target
from kdx.types import Batch
from kdx.views import with_views

INDEX = torch.tensor([40, 7, 300, 12])


def mixing() -> tuple[SpokenDigits, Batch]:
    data = SpokenDigits(SpokenDigits.Config(mel={}))
    return data, {**data.train().fetch(INDEX.tolist()), "index": INDEX}


def test_shares_and_partners_say_how_a_view_is_made() -> None:
    data, batch = mixing()
    viewed = with_views(data, {"mixed": {"augment": {"mixup": {}, "mixup_mel": {}}}})
    found = viewed.on_device(batch, Randomness(0, 0, INDEX))
    share = found["mix_share@mixed"]
    assert share.shape == (4,)
    assert len(set(share.tolist())) == 4
    assert found["mix_partner@mixed"].tolist() == INDEX.roll(1).tolist()
    for stream in ("image", "mel"):
        r = share.reshape(-1, 1, 1, 1)
        expected = r * found[stream] + (1 - r) * found[stream].roll(1, 0)
        torch.testing.assert_close(found[f"{stream}@mixed"], expected)


def test_a_record_is_declared_where_a_view_mixes_and_nowhere_else() -> None:
    data, _ = mixing()
    viewed = with_views(data, {"mixed": {"augment": {"mixup_mel": {}}}, "loud": {"augment": {"gain": {}}}})
    streams = viewed.facts().streams
    assert {"mix_share@mixed", "mix_partner@mixed"} <= set(streams)
    assert not {name for name in streams if name.startswith("mix_") and not name.endswith("@mixed")}
    assert data.records == {}


def test_in_evaluation_each_sample_is_itself() -> None:
    data, batch = mixing()
    found = with_views(data, {"mixed": {"augment": {"mixup_mel": {}}}}).on_device(batch, None)
    assert found["mix_share@mixed"].tolist() == [1, 1, 1, 1]
    assert torch.equal(found["mix_partner@mixed"], INDEX)
    assert torch.equal(found["mel@mixed"], found["mel"])


# --- rectangles


def randomness(count: int, view: int = 0) -> Randomness:
    return Randomness(5, view, torch.arange(count))


def test_cutmix_puts_a_rectangle_of_the_image_before_into_each_and_tells_the_share_that_stays() -> None:
    images = torch.arange(400.0)[:, None, None, None].expand(400, 2, 12, 10)
    cutmix = CutMix()
    mixed = cutmix(images, randomness(400))
    is_own = mixed == images
    assert torch.equal(mixed, torch.where(is_own, images, images.roll(1, 0)))
    assert torch.equal(is_own[:, 0], is_own[:, 1])
    shares = cutmix.shares(randomness(400), (12, 10))
    torch.testing.assert_close(is_own[:, 0].float().mean((1, 2)), shares)
    assert 0.65 < shares.mean() < 0.75  # of 0.5 that are drawn: borders cut some of the rectangles
    for kept, (top, bottom, left, right) in zip(is_own[:, 0], cutmix.box(randomness(400), (12, 10)).T, strict=True):
        assert not kept[top:bottom, left:right].any()
        assert int((~kept).sum()) == (bottom - top) * (right - left)
    assert not torch.equal(cutmix(images, randomness(400, view=1)), mixed)


def test_the_rectangles_of_cutmix_are_those_of_timm() -> None:
    shape = (11, 28)
    for seed in range(100):
        share = (seed + 0.37) / 100
        np.random.seed(seed)
        expected, corrected = cutmix_bbox_and_lam((3, *shape), share)
        np.random.seed(seed)
        centre = [(np.random.randint(0, extent) + 0.5) / extent for extent in shape]
        box = rectangles(torch.tensor([share]), torch.tensor([centre]), shape)[:, 0].tolist()
        assert tuple(box) == expected
        same = CutMix(low=corrected, high=corrected)
        assert (box[1] - box[0]) * (box[3] - box[2]) == round((1 - same.low) * 11 * 28)


def test_cutmix_leaves_images_whole_by_its_probability_and_its_share() -> None:
    images = torch.rand(64, 2, 9, 9)
    assert torch.equal(CutMix(low=1)(images, randomness(64)), images)
    assert torch.equal(CutMix(probability=0)(images, randomness(64)), images)
    assert torch.equal(CutMix(high=0)(images[:1], randomness(1)), images[:1])
    shares = CutMix(probability=0.25).shares(randomness(1000), (28, 28))
    assert 0.7 < shares.eq(1).float().mean() < 0.82  # and rectangles that are too small for a pixel


def test_a_view_with_cutmix_records_the_shares_of_the_pixels() -> None:
    data = FashionMnist(FashionMnist.Config(augment={}))
    viewed = with_views(data, {"mixed": {"augment": {"cutmix": {"low": 0.2}}}})
    found = viewed.on_device({**data.train().fetch(INDEX.tolist()), "index": INDEX}, Randomness(0, 0, INDEX))
    image, mixed, share = found["image"], found["image@mixed"], found["mix_share@mixed"]
    is_other = mixed != image
    assert torch.equal(mixed[is_other], image.roll(1, 0)[is_other])
    assert share.tolist() == CutMix(low=0.2).shares(Randomness(0, 0, INDEX), (28, 28)).tolist()
    assert (is_other.float().mean((1, 2, 3)) <= 1 - share + 1e-6).all()  # where both are black, nobody can tell
    assert found["mix_partner@mixed"].tolist() == INDEX.roll(1).tolist()


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"mixup": {}, "cutmix": {}}, r"data.views.mixed: data.augment.cutmix: found mixup and cutmix in one view"),
        ({"mixup": {}, "mixup_mel": {"low": 0.5}}, r"augment.mixup_mel: found mixup and mixup_mel in one view"),
        ({"cutmix": {}, "flip": {}, "gain": {}}, r"augment.cutmix: found flip after it, expected it last"),
    ],
)
def test_a_view_mixes_in_one_way(augment: dict[str, Any], message: str) -> None:
    data, _ = mixing()
    with pytest.raises(ConfigError, match=message):
        with_views(data, {"mixed": {"augment": augment}})


def test_cutmix_is_refused_for_images_of_several_sizes_and_where_labels_are_read() -> None:
    train = {"image": torch.rand(6, 1, 8, 8), "thumb": torch.rand(6, 1, 4, 4), "label": torch.arange(6) % 3}
    data = TensorDataset.from_tensors(train=train, classes=["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"data.augment.cutmix: found images of 2 sizes, expected one"):
        with_views(data, {"mixed": {"augment": {"cutmix": {}}}})
    with pytest.raises(ConfigError, match=r"data.augment.cutmix: it mixes images, and a label stays that of"):
        FashionMnist(FashionMnist.Config(augment={"cutmix": {}}))


# --- answers and labels of mixtures

SHARE = torch.tensor([0.25, 1.0, 0.7], dtype=torch.float64)
ROWS = torch.tensor([5, 9, 2])
BEFORE = ROWS.roll(1)


def answers_for(temperature: float, share: torch.Tensor = SHARE) -> torch.Tensor:
    target = MixedAnswers(MixedAnswers.Config(), kdx.Given({"logits": (4,), "share": (), "partner": (), "index": ()}))
    found: torch.Tensor = target(TEACHER, share, BEFORE, ROWS, number(temperature))["logits"]
    return found


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_stored_answers_are_mixed_as_probabilities_at_the_temperature(temperature: float) -> None:
    softened = (TEACHER / temperature).softmax(1)
    expected = SHARE[:, None] * softened + (1 - SHARE[:, None]) * softened.roll(1, 0)
    found = answers_for(temperature)
    torch.testing.assert_close((found / temperature).softmax(1), expected)
    torch.testing.assert_close((found / temperature).softmax(1)[1], softened[1])


def test_kd_with_mixed_answers_has_the_gradient_of_both_divergences_in_their_shares() -> None:
    student = STUDENT.clone().requires_grad_()

    def divergences(teacher: torch.Tensor) -> torch.Tensor:
        log_p = (student / 2.0).log_softmax(1)
        return 4 * torch.nn.functional.kl_div(log_p, (teacher / 2.0).softmax(1), reduction="none").sum(1)

    apart = SHARE * divergences(TEACHER) + (1 - SHARE) * divergences(TEACHER.roll(1, 0))
    (expected,) = torch.autograd.grad(apart.mean(), student)
    (found,) = torch.autograd.grad(divergences(answers_for(2.0)).mean(), student)
    torch.testing.assert_close(found, expected)


def entropy_of(
    label: torch.Tensor,
    share: torch.Tensor,
    partner: torch.Tensor,
    rows: torch.Tensor,
    smoothing: float = 0.0,
    student: torch.Tensor = STUDENT,
) -> torch.Tensor:
    loss = MixedCrossEntropy(MixedCrossEntropy.Config(smoothing), kdx.Given({"student": (4,)}))
    found: torch.Tensor = loss(student, label, share, partner, rows)
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_mixtures_is_that_of_timm(smoothing: float) -> None:
    rows, share = ROWS[:2], torch.full((2,), 0.3, dtype=torch.float64)
    target = mixup_target(LABEL[:2], 4, lam=0.3, smoothing=smoothing)
    expected = SoftTargetCrossEntropy()(STUDENT[:2], target.double())
    found = entropy_of(LABEL[:2], share, rows.flip(0), rows, smoothing, STUDENT[:2])
    torch.testing.assert_close(found.mean(), expected, rtol=1e-6, atol=0)


def test_samples_without_a_label_count_nothing_in_a_mixture() -> None:
    label = LABEL.clone()
    label[1] = -1
    found = entropy_of(label, SHARE, BEFORE, ROWS)
    own = torch.nn.functional.cross_entropy(STUDENT, LABEL, reduction="none")
    other = torch.nn.functional.cross_entropy(STUDENT, LABEL.roll(1), reduction="none")
    parts = torch.stack([SHARE[0] * own[0] + (1 - SHARE[0]) * other[0], (1 - SHARE[1]) * other[1], SHARE[2] * own[2]])
    known = 1 + (1 - SHARE[1]) + SHARE[2]
    torch.testing.assert_close(found, parts * 3 / known)
    assert entropy_of(-torch.ones_like(LABEL), SHARE, BEFORE, ROWS).eq(0).all()


def test_mixed_answers_and_labels_keep_their_contracts() -> None:
    record = {"index": torch.arange(11), "share": torch.linspace(0, 1, 11), "partner": torch.arange(11).roll(1)}
    check_target(MixedAnswers, tensors=record)
    check_loss(MixedCrossEntropy, shapes={"student": (5,)}, tensors=record)
    with pytest.raises(kdx.PlanError, match="mixed_answers needs logits"):
        MixedAnswers(MixedAnswers.Config(), kdx.Given({"logits": (4, 2)}))
    with pytest.raises(kdx.PlanError, match="mixed_cross_entropy needs logits"):
        MixedCrossEntropy(MixedCrossEntropy.Config(), kdx.Given({"student": (1,)}))
    with pytest.raises(kdx.ConfigError, match="label_smoothing: found 1, expected from 0 and below 1"):
        MixedCrossEntropy(MixedCrossEntropy.Config(1), LOGITS)


def mixed_run(out: Path, *layers: Any) -> RunResult:
    return run_in(out, MIXED, *layers, data=pictures())


@pytest.mark.parametrize("way", ["cutmix", "mixup"])
def test_a_student_on_mixtures_of_stored_answers_is_that_of_the_live_teacher(tmp_path: Path, way: str) -> None:
    view = {"data": {"views": {"mixed": {"augment": {"cutmix": None, way: {}}}}}}
    live = mixed_run(tmp_path / "live", view)
    cached = mixed_run(tmp_path / "cached", view, {"teachers": {"wide": {"cache": True}}})
    mine, own = weights_of(live.folder), weights_of(cached.folder)
    assert all(torch.equal(mine[name], own[name]) for name in mine)


@pytest.mark.parametrize("layer", [{"train": {"accumulate": 2}}, {"train": {"micro_batch": 6}}])
def test_mixtures_are_refused_where_partners_are_in_other_parts_of_the_batch(
    tmp_path: Path, layer: dict[str, Any]
) -> None:
    message = (
        r"targets.both: mixed_answers needs all samples of a batch at once, but train.accumulate or train.micro_batch "
        r"splits it into 2 parts; expected 1"
    )
    with pytest.raises(ConfigError, match=message):
        mixed_run(tmp_path, layer)


def test_a_batch_of_mixtures_that_does_not_fit_is_not_split() -> None:
    options = quiet(data=pictures())
    found = prepared(MIXED, {"train": {"micro_batch": "auto"}}, options=options)
    plan = build_plan(found, options, trained=True)
    session = make_session(found.spec, plan, found.dataset, found.splits, Runtime(found.spec.runtime))

    def full(module: torch.nn.Module, inputs: Any) -> None:
        if module.training:
            raise RuntimeError("CUDA out of memory")

    session.learner.register_forward_pre_hook(full)
    with pytest.raises(KdxError, match="out of memory in update 1"):
        fit(session, None)
    assert session.accumulate == 1


@pytest.mark.parametrize("step", [{"mixup": {}}, {"cutmix": {"probability": 0.001}}, {"mixup": {"low": 0.99999}}])
def test_a_stored_teacher_that_is_to_see_mixtures_is_refused_however_seldom_they_are(
    tmp_path: Path, step: dict[str, Any]
) -> None:
    seen = {
        "data": {"views": {"count": 2, "mixed": {"augment": {"cutmix": None, **step}}}},
        "targets": None,
        "losses": {"ce": None, "kd": {"inputs": {"teacher": "wide@mixed.logits"}}},
        "teachers": {"wide": {"cache": True}},
    }
    message = r"teachers.wide.cache: image@mixed is mixed from several .* `mixed_answers`"
    with pytest.raises(ConfigError, match=message):
        mixed_run(tmp_path, seen)
