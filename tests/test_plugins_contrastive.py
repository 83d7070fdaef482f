"""Contrastive losses: the published value, what the memory keeps, exact resume, slow references, and the contract."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kdx_plugins.contrastive import (
    ClipDistillation,
    ContrastiveRepresentation,
    affinity_divergence,
    noise_contrast,
    pairing,
)
from torch import Tensor

import kdx
from kdx.testing import check_loss

SHAPES = {"student": (6,), "teacher": (9,), "index": ()}
TEMPERATURE = torch.tensor(0.07)
LABELS = tuple(i % 3 for i in range(24)) + (-1,) * 6
FACTS = kdx.DataFacts(streams={}, classes=("a", "b", "c"), size=30, labels=LABELS)


def memory_loss(facts: kdx.DataFacts = FACTS, seed: int = 0, **options: Any) -> ContrastiveRepresentation:
    torch.manual_seed(seed)
    given = kdx.Given(SHAPES, facts, torch.Generator().manual_seed(seed))
    return ContrastiveRepresentation(ContrastiveRepresentation.Config(**{"dim": 8, **options}), given)


def inputs(seed: int, *index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(len(index), width, generator=generator) for width in (6, 9))
    return student, teacher, torch.tensor(index), TEMPERATURE


def test_the_published_value_of_the_contrast() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.2], [0.3, 0.05, 0.4]], dtype=torch.float64)
    assert noise_contrast(scores, 10).mean().item() == pytest.approx(1.6338337409, abs=1e-9)


def test_losses_keep_the_contract() -> None:
    for options in ({}, {"mode": "relax"}, {"negatives": 7}):
        check_loss(memory_loss(**options), order_matters=True)
    check_loss(memory_loss(replace(FACTS, labels=())), order_matters=True)
    check_loss(ClipDistillation, shapes={"student": (6,), "teacher": (9,)})
    check_loss(ClipDistillation, shapes={"student": (6,), "teacher": (6,)}, terms=["feature"], zero_at_equality=True)
    check_loss(ClipDistillation, shapes={"student": (6,), "teacher": (9,)}, terms=["affinity"])
    both = {"student": (6,), "student_other": (6,), "teacher": (9,), "teacher_other": (9,)}
    check_loss(ClipDistillation, shapes=both)
    check_loss(ClipDistillation, shapes=both, terms=["task", "interactive"])


def test_a_step_changes_only_the_rows_of_its_batch_and_leaves_them_with_length_one() -> None:
    loss = memory_loss()
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    loss(*inputs(0, 4, 9, 27)).mean().backward()
    untouched = torch.tensor([i not in (4, 9, 27) for i in range(30)])
    for name in ("student_memory", "teacher_memory"):
        after = loss.get_buffer(name)
        assert torch.equal(after[untouched], before[name][untouched])
        assert (after[~untouched] != before[name][~untouched]).all()
        torch.testing.assert_close(after[~untouched].norm(dim=1), torch.ones(3))


def test_the_memory_mixes_in_the_embeddings_from_before_the_update() -> None:
    loss = memory_loss(momentum=0.25)
    student, teacher, index, temperature = inputs(0, 4, 9)
    old = loss.student_memory[index]
    expected = F.normalize(0.25 * old + 0.75 * F.normalize(loss.student_layer(student), dim=1), dim=1)
    loss(student, teacher, index, temperature)
    torch.testing.assert_close(loss.student_memory[index], expected)


def test_the_constants_come_from_the_first_batch_and_stay() -> None:
    loss = memory_loss()
    assert loss.student_constant.item() == loss.teacher_constant.item() == -1
    loss(*inputs(0, 4, 9))
    first = loss.student_constant.clone(), loss.teacher_constant.clone()
    assert first[0] > 0
    loss(*inputs(1, 5, 6))
    assert (loss.student_constant, loss.teacher_constant) == first


def test_a_pass_without_gradient_leaves_the_memory_and_the_constants() -> None:
    loss = memory_loss()
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    with torch.no_grad():
        loss(*inputs(0, 4, 9))
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


def train(loss: ContrastiveRepresentation, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    values = []
    for step in steps:
        value = loss(*inputs(step, *[(5 * step + i) % 30 for i in range(5)])).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_a_loss_taken_up_from_its_state_and_generator_goes_on_bit_for_bit(mode: str) -> None:
    whole = memory_loss(mode=mode, negatives=9)
    train(whole, range(4))
    state, place = copy.deepcopy(whole.state_dict()), whole.given.generator.get_state()
    resumed = memory_loss(mode=mode, negatives=9, seed=5)
    resumed.load_state_dict(state)
    resumed.given.generator.set_state(place)
    assert train(whole, range(4, 8)) == train(resumed, range(4, 8))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_negatives_are_of_other_classes_and_none_comes_twice() -> None:
    loss = memory_loss()
    assert loss.negatives == 22  # all but the eight of a class
    for _ in range(5):
        drawn = loss._draw(torch.tensor([4, 9, 27]))
        for row, own in zip(drawn.tolist(), (4, 9, 27), strict=True):
            assert row[0] == own
            assert len(set(row)) == 23
            assert all(LABELS[j] != LABELS[own] or LABELS[own] == -1 for j in row[1:])


def test_relaxed_pairs_are_of_the_same_class_and_all_of_it_come_by() -> None:
    loss = memory_loss(mode="relax", negatives=2)
    pairs = [loss._draw(torch.tensor([4, 27]))[:, 0].tolist() for _ in range(200)]
    assert {first for first, _ in pairs} == {i for i in range(24) if LABELS[i] == LABELS[4]}
    assert {second for _, second in pairs} == {27}


def test_scores_are_those_of_the_other_sides_memory() -> None:
    loss = memory_loss(negatives=3)
    student, teacher, index, temperature = inputs(0, 4, 9)
    place = loss.given.generator.get_state()
    drawn = loss._draw(index)
    loss.given.generator.set_state(place)
    total = torch.zeros(2)
    memories = loss.student_memory.clone(), loss.teacher_memory.clone()
    for rows, memory in (
        (loss.student_layer(student), memories[1]),
        (loss.teacher_layer(teacher), memories[0]),
    ):
        rows = F.normalize(rows, dim=1)
        raw = torch.stack([torch.stack([(memory[j] @ rows[b] / 0.07).exp() for j in drawn[b]]) for b in range(2)])
        scores = raw / (raw.mean() * 30)
        chance = 3 / 30
        total += -(scores[:, 0] / (scores[:, 0] + chance + 1e-7)).log()
        total += -(chance / (scores[:, 1:] + chance + 1e-7)).log().sum(1)
    torch.testing.assert_close(loss(student, teacher, index, temperature), total)


def test_what_a_memory_cannot_be_made_for_is_refused() -> None:
    with pytest.raises(kdx.PlanError, match="how many there are"):
        memory_loss(kdx.DataFacts(streams={}))
    with pytest.raises(kdx.PlanError, match="all 4 training samples have one"):
        memory_loss(replace(FACTS, size=4, labels=(1, 1, 1, 1)))
    with pytest.raises(kdx.PlanError, match="no training sample has a label"):
        memory_loss(replace(FACTS, labels=()), mode="relax")
    for options, message in (
        ({"negatives": 23}, "^negatives: found 23, expected at most 22"),
        ({"negatives": 0}, "^negatives: found 0"),
        ({"mode": "loose"}, "^mode: found 'loose'"),
        ({"dim": 0}, "^dim: found 0"),
        ({"momentum": 1.0}, "^momentum: found 1.0"),
    ):
        with pytest.raises(kdx.ConfigError, match=message):
            memory_loss(**options)


def units(seed: int, *shape: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1)


def test_pairing_is_the_cross_entropy_of_finding_ones_own_column() -> None:
    rows, columns = units(0, 5, 3), units(1, 5, 3)
    expected = F.cross_entropy(10 * rows @ columns.T, torch.arange(5), reduction="none")
    torch.testing.assert_close(pairing(rows, columns, torch.tensor(10.0, dtype=torch.float64)), expected)


def test_affinities_agree_with_a_slow_reference_and_vanish_at_equality() -> None:
    images, texts, teacher_images, teacher_texts = (units(seed, 4, 3) for seed in range(4))
    scale, teacher_scale = (torch.tensor(value, dtype=torch.float64) for value in (5.0, 8.0))
    expected = torch.zeros(4, dtype=torch.float64)
    for ours, theirs in (
        (5 * images @ texts.T, 8 * teacher_images @ teacher_texts.T),
        (5 * texts @ images.T, 8 * teacher_texts @ teacher_images.T),
    ):
        p, q = theirs.softmax(1), ours.softmax(1)
        expected += (p * (p / q).log()).sum(1) / 2
    found = affinity_divergence((images, texts), (teacher_images, teacher_texts), scale, teacher_scale)
    torch.testing.assert_close(found, expected)
    assert affinity_divergence((images, texts), (images, texts), scale, scale).abs().max() < 1e-12


def clip_value(shapes: dict[str, kdx.Shape], tensors: dict[str, Tensor | None], **options: Any) -> Tensor:
    loss = ClipDistillation(ClipDistillation.Config(**options), kdx.Given(shapes))
    knobs = {name: torch.tensor(knob.default) for name, knob in ClipDistillation.knobs.items()}
    return loss(**tensors, **knobs)


def test_the_terms_of_both_modalities_add_up() -> None:
    tensors: dict[str, Tensor | None] = {
        name: torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(("student", "teacher", "student_other", "teacher_other"))
    }
    shapes: dict[str, kdx.Shape] = dict.fromkeys(tensors, (3,))
    parts = [clip_value(shapes, tensors, terms=[term]) for term in ("affinity", "feature", "interactive", "task")]
    torch.testing.assert_close(clip_value(shapes, tensors), torch.stack(parts).sum(0))
    rows = {name: F.normalize(tensor, dim=1) for name, tensor in tensors.items() if tensor is not None}
    gaps = (rows["student"] - rows["teacher"]).square() + (rows["student_other"] - rows["teacher_other"]).square()
    torch.testing.assert_close(parts[1], 2000 * gaps.mean(1))
    scale, label = 1 / 0.07, torch.arange(4)
    crossed = [
        F.cross_entropy(scale * rows[a] @ rows[b].T, label, reduction="none")
        for a, b in (("student", "teacher_other"), ("student_other", "teacher"))
    ]
    torch.testing.assert_close(parts[2], sum(crossed) / 2)
    scores = scale * rows["student"] @ rows["student_other"].T
    own = [F.cross_entropy(one, label, reduction="none") for one in (scores, scores.T)]
    torch.testing.assert_close(parts[3], sum(own) / 2)


def test_the_learnt_scale_starts_as_in_clip_and_is_capped() -> None:
    loss = ClipDistillation(ClipDistillation.Config(), kdx.Given({"student": (3,), "teacher": (3,)}))
    assert loss.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert sum(weight.numel() for weight in loss.parameters()) == 1  # no layer between equal widths
    rows = torch.eye(3)
    knobs = {name: torch.tensor(knob.default) for name, knob in ClipDistillation.knobs.items()}
    with torch.no_grad():
        loss.log_scale.fill_(math.log(100.0))
        capped = loss(rows, rows, None, None, **knobs)
        loss.log_scale.fill_(9.0)
        assert torch.equal(loss(rows, rows, None, None, **knobs), capped)


@pytest.mark.parametrize(
    ("shapes", "terms", "message"),
    [
        ({"student": (3,), "teacher": (3,), "teacher_other": (3,)}, [], "only teacher_other is given"),
        ({"student": (3,), "teacher": (3,)}, ["task"], "needs student_other and teacher_other"),
        (
            {"student": (3,), "teacher": (3,), "student_other": (4,), "teacher_other": (3,)},
            [],
            "multiplies student with student_other, but they have 3 and 4",
        ),
    ],
)
def test_modalities_that_do_not_fit_are_refused(shapes: dict[str, kdx.Shape], terms: list[str], message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        ClipDistillation(ClipDistillation.Config(terms=terms), kdx.Given(shapes))


def test_an_unknown_term_is_refused_by_name() -> None:
    with pytest.raises(kdx.ConfigError, match=r"^terms: found 'affinty'"):
        ClipDistillation(ClipDistillation.Config(terms=["affinty"]), kdx.Given({"student": (3,), "teacher": (3,)}))
