"""SSKD: selection of rows, the similarity task, and a run on turned views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kdx_plugins.self_supervision import (
    AlteredLogits,
    SelfSupervision,
    divergence,
    mean_of,
    rank,
    selected,
    similarities,
)
from torch import Tensor

import kdx
from kdx.config import load
from kdx.randomness import Randomness
from kdx.runs import Options, build_plan, prepare
from kdx.testing import check_loss
from kdx.tiny import tiny_run

ROOT = Path(__file__).parent.parent
Z_S = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, -0.5, 1.0], [1.0, -1.0, 2.0, 0.0]], dtype=torch.float64)
Z_T = torch.tensor([[3.0, 1.0, 0.2, -1.2], [0.1, 1.5, -0.3, 0.7], [0.0, 0.5, 2.5, -1.0]], dtype=torch.float64)
K = torch.arange(20, dtype=torch.float64).reshape(4, 5)
E_S, E_T = (0.1 * K).sin(), (0.1 * K).cos()
LOGITS: dict[str, Any] = {"student_views": [(5,)] * 3, "teacher_views": [(5,)] * 3}
EMBEDDINGS: dict[str, Any] = {
    "student": (6,), "teacher": (7,), "student_views": [(6,)] * 3, "teacher_views": [(7,)] * 3,
}  # fmt: skip


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_loss(views: int = 3, classes: int = 4, **options: Any) -> AlteredLogits:
    shapes = {"student_views": [(classes,)] * views, "teacher_views": [(classes,)] * views}
    return AlteredLogits(AlteredLogits.Config(**options), kdx.Given(shapes=shapes))


ONE = torch.tensor(1.0)


def embedding_loss(shapes: dict[str, Any] = EMBEDDINGS, **options: Any) -> SelfSupervision:
    return SelfSupervision(SelfSupervision.Config(**options), kdx.Given(shapes=shapes))


def test_the_rank_is_how_many_classes_stand_above_the_right_one() -> None:
    assert rank(Z_T, torch.tensor([0, 3, 3])).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1.0, [True, True, True, True, True]),
        (0.75, [True, True, True, False, True]),  # of three wrong ones, two are kept
        (0.5, [True, False, True, False, True]),
        (0.0, [True, False, False, False, True]),
    ],
)
def test_right_rows_are_kept_and_of_the_wrong_ones_the_best_ranked(keep: float, expected: list[bool]) -> None:
    assert selected(torch.tensor([0, 2, 1, 5, 0]), keep).tolist() == expected


def test_the_mean_is_that_of_the_kept_rows_and_0_where_none_is_kept() -> None:
    values = torch.tensor([1.0, 5.0, 9.0])
    assert mean_of(values, torch.tensor([True, False, True])) == 5
    assert mean_of(values, torch.zeros(3, dtype=torch.bool)) == 0


def test_the_divergence_at_temperature_4_is_that_of_kd() -> None:
    temperature = torch.tensor(4.0, dtype=torch.float64)
    assert divergence(Z_S, Z_T, temperature).mean().item() == pytest.approx(0.2442403738, abs=1e-9)


def test_altered_logits_are_kd_where_all_are_kept() -> None:
    teacher, temperature = normal(0, 3, 4), torch.tensor(2.0)
    views = [normal(i, 3, 4) for i in range(1, 7)]
    found = logits_loss()(views[:3], views[3:], teacher, torch.tensor([0, 1, -1]), temperature)
    expected = [divergence(s, t, temperature).mean() for s, t in zip(views[:3], views[3:], strict=True)]
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_a_view_that_the_teacher_gets_wrong_is_left_out_where_none_of_those_is_kept() -> None:
    loss = logits_loss(1, keep=0.0)
    temperature = torch.tensor(4.0, dtype=torch.float64)
    found = loss([Z_S], [Z_T], Z_T, torch.tensor([0, 3, 2]), temperature)
    torch.testing.assert_close(found, divergence(Z_S, Z_T, temperature)[[0, 2]].mean())


def test_a_sample_without_a_label_takes_the_teachers_choice_for_the_plain_image() -> None:
    loss = logits_loss(1, keep=0.0)
    temperature = torch.tensor(4.0, dtype=torch.float64)
    plain = torch.eye(4, dtype=torch.float64)[[0, 3, 2]]  # for the second, which the view tells apart, it says 3
    found = loss([Z_S], [Z_T], plain, torch.full((3,), -1), temperature)
    torch.testing.assert_close(found, divergence(Z_S, Z_T, temperature)[[0, 2]].mean())


def test_similarities_are_cosines_of_each_view_with_each_plain_image() -> None:
    views = torch.cat([E_T, 2 * E_S])
    expected = [[F.cosine_similarity(view, plain, dim=0) for plain in E_S] for view in views]
    torch.testing.assert_close(similarities(E_S, views), torch.tensor(expected, dtype=torch.float64))
    assert similarities(E_S, views)[4:].diagonal().tolist() == pytest.approx([1.0] * 4)


def slow_value(loss: SelfSupervision, inputs: dict[str, Any], temperature: Tensor, keep: float) -> Tensor:
    """The published value, row by row."""
    rows: list[tuple[int, Tensor]] = []
    task = []
    sides = {who: [getattr(loss, f"{who}_head")(x) for x in (inputs[who], *inputs[f"{who}_views"])]
             for who in ("student", "teacher")}  # fmt: skip
    for view in range(1, 4):
        for i in range(len(inputs["student"])):
            s, t = (
                torch.stack([F.cosine_similarity(sides[who][view][i], plain, dim=0) for plain in sides[who][0]])
                for who in ("student", "teacher")
            )
            task.append(F.cross_entropy(t, torch.tensor(i)))
            gap = (t / temperature).softmax(0) * ((t / temperature).log_softmax(0) - (s / temperature).log_softmax(0))
            order = t.argsort(descending=True).tolist()
            rows.append((order.index(i), temperature.square() * gap.sum()))
    rows.sort(key=lambda row: row[0])
    right = sum(place == 0 for place, _ in rows)
    kept = rows[: right + int(keep * (len(rows) - right))]
    return torch.stack([value for _, value in kept]).mean() + torch.stack(task).mean()


def test_sskd_is_the_published_sum_of_both_terms() -> None:
    inputs = {name: [normal(i, 8, *one) for i, one in enumerate(shape)] if isinstance(shape, list)
              else normal(9 + len(name), 8, *shape) for name, shape in EMBEDDINGS.items()}  # fmt: skip
    temperature = torch.tensor(0.5)
    for keep in (0.0, 0.5, 1.0):
        loss = embedding_loss(keep=keep)
        found = loss(**inputs, temperature=temperature, transfer=ONE, task=ONE)
        torch.testing.assert_close(found, slow_value(loss, inputs, temperature, keep))


def test_the_teachers_head_learns_the_task_alone() -> None:
    loss = embedding_loss()
    inputs = {name: [normal(i, 8, *one) for i, one in enumerate(shape)] if isinstance(shape, list)
              else normal(9, 8, *shape) for name, shape in EMBEDDINGS.items()}  # fmt: skip
    loss(**inputs, temperature=torch.tensor(0.5), transfer=ONE, task=ONE).backward()
    views = similarities(loss.teacher_head(inputs["teacher"]), loss.teacher_head(torch.cat(inputs["teacher_views"])))
    task = F.cross_entropy(views, torch.arange(8).repeat(3))
    for parameter, expected in zip(
        loss.teacher_head.parameters(), torch.autograd.grad(task, [*loss.teacher_head.parameters()]), strict=True
    ):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected)
    assert all(parameter.grad is not None for parameter in loss.student_head.parameters())


def test_either_stage_trains_one_head_only() -> None:
    inputs = {name: [normal(i, 8, *one) for i, one in enumerate(shape)] if isinstance(shape, list)
              else normal(9, 8, *shape) for name, shape in EMBEDDINGS.items()}  # fmt: skip
    for transfer, still in ((torch.tensor(0.0), "student_head"), (ONE, "teacher_head")):
        loss = embedding_loss()
        loss(**inputs, temperature=torch.tensor(0.5), transfer=transfer, task=1 - transfer).backward()
        moved = {name.partition(".")[0] for name, value in loss.named_parameters() if value.grad.abs().sum() > 0}
        assert moved == {"student_head", "teacher_head"} - {still}


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        ({}, {"keep": 1.5}, kdx.ConfigError, "keep: found 1.5, expected a share from 0 to 1"),
        ({}, {"width": 0}, kdx.ConfigError, "width: found 0"),
        ({"student": (6, 3, 3)}, {}, kdx.PlanError, r"sskd compares embeddings \[D\] of equal width, but student"),
        ({"teacher_views": [(7,)]}, {}, kdx.PlanError, "found 3 student_views and 1 teacher_views, expected as many"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    shapes: dict[str, Any], options: dict[str, Any], error: type[kdx.KdxError], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedding_loss({**EMBEDDINGS, **shapes}, **options)


def test_the_losses_keep_the_contract() -> None:
    check_loss(AlteredLogits, shapes=LOGITS)
    check_loss(AlteredLogits, shapes=LOGITS, keep=0.5)
    check_loss(SelfSupervision, shapes=EMBEDDINGS, width=4)


def test_without_the_views_a_config_is_told_which_ones_are_missing(tmp_path: Path) -> None:
    with pytest.raises(kdx.PlanError, match=r"losses\.sskd\.inputs\.student_views: the data has no view 'r90'"):
        tiny_run(tmp_path, losses={"sskd": {"use": "sskd"}})


def test_the_config_turns_images_that_were_moved_alike() -> None:
    found = prepare(load(ROOT / "configs" / "methods" / "sskd.yaml", ["baseline=false"]), Options(quiet=True))
    assert found.reached.views == ("r90", "r180", "r270")
    batch = found.splits.train.fetch(range(6))
    seen = found.dataset.on_device(batch, Randomness(0, 0, batch["index"]))
    for quarters, view in enumerate(("r90", "r180", "r270"), start=1):
        assert torch.equal(seen[f"image@{view}"], torch.rot90(seen["image"], quarters, (2, 3)))
    plan = build_plan(found, Options(quiet=True), trained=False)
    assert {call.name for call in plan.teacher_calls} == {"cnn", "cnn@r90", "cnn@r180", "cnn@r270"}


def test_a_run_on_turned_views_trains_both_heads(tmp_path: Path) -> None:
    views = {view: {"augment": {"rotate": {"degrees": degrees}}} for view, degrees in
             (("r90", 90), ("r180", 180), ("r270", 270))}  # fmt: skip
    losses = {"turned": {"use": "sskd_logits"}, "sskd": {"use": "sskd"}}
    found = tiny_run(tmp_path, data={"views": views}, losses=losses, train={"updates": 2})
    assert found.result.status == "finished"
    assert list(found.result.teachers) == ["teacher"]
