"""Losses on relations within a batch: published values, invariants, slow references, and the plugin contract."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from kdx_plugins.relation import (
    CorrelationCongruence,
    DarkRank,
    ProbabilisticTransfer,
    RelationalDistillation,
    RelationGraph,
    SimilarityPreserving,
    adjacent_correlation,
    correlation_congruence,
    probabilistic_transfer,
    rank_transfer,
    relation_graph_edges,
    relation_graph_steps,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from torch import Tensor

import kdx
from kdx.testing import check_loss

MAPS = {"student": (6, 4, 4), "teacher": (10, 3, 3)}
VECTORS = {"student": (6,), "teacher": (10,)}


def waves(*shape: int) -> tuple[Tensor, Tensor]:
    """The inputs of the published values: sine and cosine of 0.1 k, in float64."""
    k = 0.1 * torch.arange(math.prod(shape), dtype=torch.float64)
    return k.sin().reshape(shape), k.cos().reshape(shape)


def turned(rows: Tensor) -> Tensor:
    """The same rows in other axes."""
    width = rows.shape[1]
    axes = torch.linalg.qr(torch.randn(width, width, dtype=rows.dtype, generator=torch.Generator().manual_seed(3)))[0]
    return rows @ axes


FEATURES = waves(2, 3, 4, 4)
VECTOR = waves(4, 5)


def test_published_values() -> None:
    for value, expected in (
        (similarity_preserving(*FEATURES).mean(), 0.0802419351),
        (adjacent_correlation(*VECTOR), 1.5044390678),
        (correlation_congruence(*VECTOR).mean(), 0.1407753589),
        (relational_distance(*VECTOR).mean(), 0.0926932121),
        (relational_angle(*VECTOR).mean(), 0.0026623561),
        (probabilistic_transfer(*VECTOR).mean(), 0.0365521059),
    ):
        assert value.item() == pytest.approx(expected, abs=1e-9)


def test_losses_keep_the_contract() -> None:
    check_loss(SimilarityPreserving, shapes=MAPS)
    check_loss(SimilarityPreserving, shapes=dict.fromkeys(MAPS, (6, 4, 4)), zero_at_equality=True)
    check_loss(CorrelationCongruence, shapes=VECTORS)
    check_loss(CorrelationCongruence, shapes=dict.fromkeys(VECTORS, (6,)), embed=0, zero_at_equality=True)
    check_loss(CorrelationCongruence, shapes=VECTORS, form="adjacent", order_matters=True)
    for normalize in (False, True):
        check_loss(RelationalDistillation, shapes=VECTORS, normalize=normalize)
    check_loss(RelationalDistillation, shapes=dict.fromkeys(VECTORS, (6,)), zero_at_equality=True)
    check_loss(ProbabilisticTransfer, shapes=dict.fromkeys(VECTORS, (6,)), zero_at_equality=True)
    check_loss(ProbabilisticTransfer, shapes=MAPS)
    check_loss(DarkRank, shapes=VECTORS, alpha=2.0, beta=1.0)
    check_loss(DarkRank, shapes=VECTORS, length=3, normalize=False, alpha=0.1)
    check_loss(
        RelationGraph,
        shapes={"student": [(4, 6, 6), (8, 3, 3), (5,)], "teacher": [(12, 4, 4), (10, 4, 4), (7,)]},
    )
    check_loss(RelationGraph, shapes={"student": [(9, 4), (9, 4)], "teacher": [(6, 4, 4), (3, 2, 2)]})


@pytest.mark.parametrize("change", [lambda x: 3 * x, lambda x: turned(x.flatten(1))])
def test_scale_and_axes_of_a_feature_do_not_count_for_similarities(
    change: Callable[[Tensor], Tensor],
) -> None:
    student, teacher = FEATURES
    torch.testing.assert_close(similarity_preserving(change(student), teacher), similarity_preserving(student, teacher))


def test_scale_axes_and_origin_do_not_count_for_relational_distillation() -> None:
    student, teacher = VECTOR
    moved = turned(5 * student) + 2
    torch.testing.assert_close(relational_distance(moved, teacher), relational_distance(student, teacher))
    torch.testing.assert_close(relational_angle(moved, teacher), relational_angle(student, teacher))


def test_scale_and_axes_do_not_count_for_probabilistic_transfer() -> None:
    student, teacher = VECTOR
    torch.testing.assert_close(
        probabilistic_transfer(turned(0.1 * student), teacher), probabilistic_transfer(student, teacher)
    )


def test_angles_agree_with_a_slow_reference() -> None:
    student, teacher = VECTOR

    def cosine(rows: Tensor, i: int, j: int, k: int) -> float:
        a, b = rows[j] - rows[i], rows[k] - rows[i]
        return (a @ b / (a.norm() * b.norm())).item() if i not in (j, k) else 0.0

    for i in range(4):
        gaps = [abs(cosine(student, i, j, k) - cosine(teacher, i, j, k)) for j in range(4) for k in range(4)]
        expected = sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / 16
        assert relational_angle(student, teacher)[i].item() == pytest.approx(expected, abs=1e-12)


def test_equal_samples_of_the_student_have_a_finite_gradient() -> None:
    student = torch.zeros(5, 3).requires_grad_()
    teacher = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    loss = RelationalDistillation(RelationalDistillation.Config(), kdx.Given())
    loss(student, teacher, torch.tensor(1.0), torch.tensor(2.0)).mean().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_rank_loss_is_the_likelihood_of_the_teachers_order_among_all_orders() -> None:
    student, teacher = VECTOR
    alpha, beta = torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    values = rank_transfer(student, teacher, alpha, beta, length=3)
    for i in range(4):
        others = [j for j in range(4) if j != i]
        order = sorted(others, key=lambda j: (teacher[i] - teacher[j]).norm().item())
        worth = {j: math.exp(-0.5 * (student[i] - student[j]).norm().item() ** 2) for j in others}
        chances = {}
        for one in itertools.permutations(others):
            chances[one] = math.prod(worth[j] / sum(worth[k] for k in one[n:]) for n, j in enumerate(one))
        assert sum(chances.values()) == pytest.approx(1)
        assert values[i].item() == pytest.approx(-math.log(chances[tuple(order)]), abs=1e-9)


def test_a_batch_of_one_or_two_gives_a_number() -> None:
    for size in (1, 2):
        student, teacher = torch.randn(2, size, 4, generator=torch.Generator().manual_seed(1)).unbind()
        for component in (SimilarityPreserving, RelationalDistillation, ProbabilisticTransfer, DarkRank):
            knobs = {name: torch.tensor(knob.default) for name, knob in component.knobs.items()}
            value = component(component.Config(), kdx.Given())(student, teacher, **knobs)
            assert value.isfinite().all(), component.name
        assert adjacent_correlation(student, teacher).isfinite()


def test_graph_edges_and_steps_agree_with_a_slow_reference() -> None:
    (student, teacher), (student_next, teacher_next) = waves(3, 4, 4, 4), waves(3, 2, 2, 2)

    def edges(feature: Tensor) -> Tensor:
        rows = feature.flatten(1)
        squares = torch.stack([torch.stack([(a - b).square().sum() for b in rows]) for a in rows])
        return squares / squares.max()

    expected = (edges(student) - edges(teacher)).square().mean()
    assert relation_graph_edges(student, teacher).mean().item() == pytest.approx(expected.item(), abs=1e-9)

    def step(before: Tensor, after: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d((before[:, 0::2] + before[:, 1::2]) / 2, 2)
        squares = (pooled - after).square().sum((1, 2, 3))
        return squares / squares.max()

    moved = (step(student, student_next) - step(teacher, teacher_next)).square()
    found = relation_graph_steps((student, student_next), (teacher, teacher_next))
    torch.testing.assert_close(found, moved)


def test_the_graph_of_a_perfect_student_is_zero() -> None:
    layers = [torch.randn(3, 4, 4, 4), torch.randn(3, 6, 2, 2), torch.randn(3, 5)]
    logits = torch.randn(3, 4)
    given = kdx.Given({side: [(4, 4, 4), (6, 2, 2), (5,)] for side in ("student", "teacher")})
    loss = RelationGraph(RelationGraph.Config(), given)
    assert not loss(layers, layers, logits, logits, *[torch.tensor(1.0)] * 3).any()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([(4, 4, 4), (6, 2, 2)], [(4, 4, 4), (6,)], "a map, a map and teacher a map, a vector"),
        ([(4, 4, 4), (6,)], [(4, 4, 4), (6,)], "at least two maps"),
    ],
)
def test_a_graph_of_layers_that_do_not_match_is_refused(
    student: list[kdx.Shape], teacher: list[kdx.Shape], message: str
) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        RelationGraph(RelationGraph.Config(), kdx.Given({"student": student, "teacher": teacher}))


def test_wrong_options_are_refused_by_name() -> None:
    given = kdx.Given(VECTORS)
    for options, message in (
        ({"form": "benchmark"}, "^form: found 'benchmark'"),
        ({"embed": -1}, "^embed: found -1"),
        ({"gamma": 0.0}, "^gamma, order: found 0.0"),
    ):
        with pytest.raises(kdx.ConfigError, match=message):
            CorrelationCongruence(CorrelationCongruence.Config(**options), given)
    with pytest.raises(kdx.PlanError, match=r"6 and 10 numbers; say `embed`"):
        CorrelationCongruence(CorrelationCongruence.Config(form="adjacent", embed=0), given)
    with pytest.raises(kdx.ConfigError, match=r"^length: found 1"):
        DarkRank(DarkRank.Config(length=1), given)
