"""Information, review and matched layers: golden values, and slow references for what is trained in between."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kdx_plugins.stages import (
    Fusion,
    KnowledgeReview,
    SemanticCalibration,
    VariationalInformation,
    group_similarities,
    hierarchical_distance,
    variational_information,
)
from torch import Tensor, nn

import kdx
from kdx.testing import check_loss

STAGES = {"student": [(4, 6, 6), (5, 3, 3)], "teacher": [(3, 6, 6), (7, 4, 4)]}


def waves(*shape: int) -> tuple[Tensor, Tensor]:
    """sin and cos of 0, 0.1, 0.2, ..."""
    steps = 0.1 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return steps.sin(), steps.cos()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: type[Any], student: Any, teacher: Any, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes={"student": student, "teacher": teacher}))


def test_variational_information_starts_at_its_golden_value() -> None:
    loss = make(VariationalInformation, [(3, 4, 4)], [(3, 4, 4)])
    raw = loss.raw_variances[0].detach().double()
    assert raw.tolist() == pytest.approx([4.9932291828] * 3, abs=1e-6)
    exact = torch.full((3,), math.log(math.expm1(5 - 1e-5)), dtype=torch.float64)
    teacher = waves(2, 3, 4, 4)[1]
    assert variational_information(teacher, teacher, exact).mean().item() == pytest.approx(0.8047189562, abs=1e-9)


def test_variational_information_is_the_density_of_a_normal_distribution() -> None:
    mean, teacher, raw = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4), normal(2, 3)
    deviation = (nn.functional.softplus(raw) + 1e-5).sqrt()[:, None, None]
    density = torch.distributions.Normal(mean, deviation).log_prob(teacher)
    expected = -density.mean((1, 2, 3)) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(variational_information(mean, teacher, raw), expected)


def test_the_variances_are_trained() -> None:
    loss = make(VariationalInformation, STAGES["student"], STAGES["teacher"])
    maps = {side: [normal(i, 2, *shape) for i, shape in enumerate(shapes)] for side, shapes in STAGES.items()}
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    before = [raw.detach().clone() for raw in loss.raw_variances]
    loss(**maps).mean().backward()
    optimizer.step()
    assert all((raw < old).all() for raw, old in zip(loss.raw_variances, before, strict=True))


@pytest.mark.parametrize(("size", "golden"), [(4, 0.9587015694), (8, 0.8310555614)])
def test_the_hierarchical_distance_has_its_golden_value(size: int, golden: float) -> None:
    assert hierarchical_distance(*waves(2, 3, size, size)).mean().item() == pytest.approx(golden, abs=1e-9)


def test_the_hierarchical_distance_of_single_places_is_the_mean_squared_one() -> None:
    a, b = normal(0, 2, 3, 1, 1), normal(1, 2, 3, 1, 1)
    torch.testing.assert_close(hierarchical_distance(a, b), (a - b).square().mean((1, 2, 3)))
    assert hierarchical_distance(a, a).tolist() == [0, 0]


@pytest.mark.parametrize("own", [True, False])
def test_a_fusion_takes_its_own_map_and_the_deeper_one_in_learnt_shares(own: bool) -> None:
    fusion = Fusion((3, 4, 4), (5, 8, 8), 6, deepest=False).eval()
    assert fusion.shares is not None
    with torch.no_grad():
        fusion.shares[0].weight.zero_()
        fusion.shares[0].bias.copy_(torch.tensor([60.0, -60.0] if own else [-60.0, 60.0]))
    student, deeper = normal(0, 2, 3, 4, 4), normal(1, 2, 6, 2, 2)
    entered = fusion.enter(student) if own else deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = entered.repeat_interleave(2, 2).repeat_interleave(2, 3)
    result, handed_on = fusion(student, deeper)
    torch.testing.assert_close(handed_on, expected)
    torch.testing.assert_close(result, fusion.leave(expected))


def test_a_deep_map_takes_part_in_all_shallower_comparisons_and_no_shallow_one_in_deeper_ones() -> None:
    review = make(KnowledgeReview, [(4, 6, 6), (5, 3, 3), (6,)], [(3, 6, 6), (7, 3, 3), (8,)]).eval()
    assert review.fusions[0].enter[0].out_channels == 6
    student = [normal(0, 2, 4, 6, 6), normal(1, 2, 5, 3, 3), normal(2, 2, 6)]
    results: list[list[Tensor]] = []
    for changed in (None, 0, 2):
        maps = [feature + 1 if place == changed else feature for place, feature in enumerate(student)]
        deeper, found = None, []
        for fusion, feature in reversed(list(zip(review.fusions, maps, strict=True))):
            result, deeper = fusion(feature if feature.ndim == 4 else feature[:, :, None, None], deeper)
            found.append(result)
        results.append(found[::-1])
    plain, shallow, deep = results
    assert [torch.equal(a, b) for a, b in zip(plain, shallow, strict=True)] == [False, True, True]
    assert [torch.equal(a, b) for a, b in zip(plain, deep, strict=True)] == [False, False, False]
    targets = [result.detach() for result in plain]
    targets[2] = targets[2].flatten(1)
    assert review(student, targets).abs().max() == 0


def test_similarities_are_those_within_groups_of_neighbours() -> None:
    feature = normal(0, 5, 3, 2, 2)
    rows = feature.flatten(1)
    found = group_similarities(feature, 4)
    torch.testing.assert_close(found[:4], rows[:4] @ rows[:4].T)
    torch.testing.assert_close(found[4], torch.tensor([rows[4].square().sum().item(), 0.0, 0.0, 0.0]))


def test_semantic_calibration_weights_every_pair_of_layers_per_sample() -> None:
    shapes = [(4, 6, 6), (5, 3, 3)], [(3, 6, 6), (7, 4, 4), (2, 2, 2)]
    loss = make(SemanticCalibration, *shapes, group=4).eval()
    student, teacher = ([normal(i, 4, *shape) for i, shape in enumerate(side)] for side in shapes)
    expected = torch.zeros(4)
    for i, ours in enumerate(student):
        scores, gaps = [], []
        for j, theirs in enumerate(teacher):
            query = loss.queries[i](ours.flatten(1) @ ours.flatten(1).T)
            key = loss.keys[j](theirs.flatten(1) @ theirs.flatten(1).T)
            scores.append(nn.functional.cosine_similarity(query, key, dim=1))
            size = min(ours.shape[2], theirs.shape[2])
            pooled = [nn.functional.adaptive_avg_pool2d(feature, size) for feature in (ours, theirs)]
            gaps.append((loss.projections[i][j](pooled[0]) - pooled[1]).square().mean((1, 2, 3)))
        expected += (torch.stack(scores).softmax(0) * torch.stack(gaps)).sum(0) / len(student)
    torch.testing.assert_close(loss(student, teacher), expected)


def test_a_group_must_feed_the_small_nets() -> None:
    with pytest.raises(kdx.ConfigError, match="group: found 3, expected a number of samples from 4"):
        make(SemanticCalibration, [(4, 6, 6)], [(4, 6, 6)], group=3)


@pytest.mark.parametrize("kind", [VariationalInformation, KnowledgeReview, SemanticCalibration])
def test_stages_that_cannot_be_compared_are_refused(kind: type[Any]) -> None:
    with pytest.raises(kdx.PlanError, match=rf"^{kind.name} .*one of teacher is \[16, 8\]; tap a stage, as in teacher"):
        make(kind, [(4, 6, 6)], [(16, 8)])
    if kind is not SemanticCalibration:
        with pytest.raises(kdx.PlanError, match=f"^{kind.name} .* 2 of the student and 1 of the teacher; name as many"):
            make(kind, [(4, 6, 6)] * 2, [(4, 6, 6)])


def test_losses_over_stages_keep_the_contract() -> None:
    check_loss(VariationalInformation, shapes=STAGES)
    with_vectors = {side: [*shapes, (6,)] for side, shapes in STAGES.items()}
    check_loss(KnowledgeReview, shapes=with_vectors)
    check_loss(SemanticCalibration, shapes=STAGES, order_matters=True, group=8)
