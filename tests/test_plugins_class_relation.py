"""Relations within a batch of class probabilities: golden values, invariances and slow references."""

from __future__ import annotations

import pytest
import torch
from golden_inputs import STUDENT, TEACHER, normal, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.class_relation import (
    Correlation,
    MultiLevel,
    class_gap,
    correlation_gap,
    instance_gap,
    pearson,
    sample_gap,
)
from torch import Tensor

import kdx
from kdx.testing import check_loss


def mlkd(*views: Tensor, **options: object) -> Tensor:
    names = ("student", "teacher", "student_strong", "teacher_strong")
    shapes = dict.fromkeys(names[: len(views)], (4,))
    loss = MultiLevel(MultiLevel.Config(**options), kdx.Given(shapes))  # type: ignore[arg-type]
    value: Tensor = loss(*views, *[None] * (4 - len(views)))
    return value


@pytest.mark.parametrize(("temperature", "golden"), [(4.0, 5.5758789503), (1.0, 0.3207696388)])
def test_the_correlation_loss_has_its_golden_value(temperature: float, golden: float) -> None:
    value = Correlation(Correlation.Config(), kdx.Given())(
        STUDENT, TEACHER, number(temperature), number(1.0), number(1.0)
    )
    assert value.shape == (3,)
    assert value.mean().item() == pytest.approx(golden, abs=1e-9)


def test_the_relations_of_several_levels_have_their_golden_values() -> None:
    assert class_gap(STUDENT, TEACHER, 4.0).mean().item() == pytest.approx(0.0031251356, abs=1e-9)
    assert sample_gap(STUDENT, TEACHER, 4.0).mean().item() == pytest.approx(0.0001730291, abs=1e-9)
    assert instance_gap(STUDENT, TEACHER, 4.0).mean().item() == pytest.approx(0.2442403738, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_correlation_ignores_scale_and_origin(seed: int, scale: float, shift: float) -> None:
    a, b = normal(seed, 5, 6), normal(seed + 1, 5, 6)
    for dim in (0, 1):
        expected = torch.stack(
            [
                torch.corrcoef(torch.stack(pair))[0, 1]
                for pair in zip(*((x.T if dim == 0 else x) for x in (a, b)), strict=True)
            ]
        )
        torch.testing.assert_close(pearson(a, b, dim), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pearson(scale * a + shift, b, dim), expected, rtol=1e-6, atol=1e-6)


def test_correlation_with_a_constant_is_zero_and_has_a_finite_gradient() -> None:
    flat = torch.ones(3, 4, requires_grad=True)
    value = pearson(flat, normal(0, 3, 4).float(), 1)
    assert not value.any()
    value.sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_each_part_of_the_correlation_loss_is_at_most_twice_the_squared_temperature() -> None:
    per_sample, along_classes = correlation_gap(3 * STUDENT, -3 * STUDENT, number(3.0))
    assert (per_sample <= 18).all()
    assert per_sample.max() > 9
    assert 9 < along_classes <= 18


def test_a_student_that_mixes_its_answer_with_an_even_one_is_perfect_for_correlation() -> None:
    student = (0.5 * TEACHER.softmax(1) + 0.125).log()
    for gap in correlation_gap(student, TEACHER, number(1.0)):
        assert gap.abs().max() < 1e-6


def test_relations_agree_with_a_slow_reference() -> None:
    p, q = (STUDENT / 3).softmax(1), (TEACHER / 3).softmax(1)
    samples = [sum((q[i] @ q[j] - p[i] @ p[j]).item() ** 2 for j in range(3)) for i in range(3)]
    assert sample_gap(STUDENT, TEACHER, 3.0).tolist() == pytest.approx(samples)
    classes = [sum((q[:, k] @ q[:, m] - p[:, k] @ p[:, m]).item() ** 2 for m in range(4)) for k in range(4)]
    assert class_gap(STUDENT, TEACHER, 3.0).tolist() == pytest.approx(classes)


def test_the_order_of_samples_does_not_count_for_classes_and_moves_with_samples() -> None:
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(class_gap(STUDENT[order], TEACHER[order], 3.0), class_gap(STUDENT, TEACHER, 3.0))
    torch.testing.assert_close(
        sample_gap(STUDENT[order], TEACHER[order], 3.0), sample_gap(STUDENT, TEACHER, 3.0)[order]
    )


def test_one_view_leaves_out_sure_samples_and_frequent_classes() -> None:
    # the teacher's confidence rises from sample 1 over 0 to 2: the median is that of sample 0
    teacher = TEACHER.clone()
    teacher[2, 2] = 6.0
    confidence, frequency = teacher.softmax(1).amax(1), teacher.softmax(1).sum(0)
    assert confidence.argsort().tolist() == [1, 0, 2]
    instances = sum(instance_gap(STUDENT, teacher, tau) for tau in (2.0, 4.0))
    samples = sum(sample_gap(STUDENT, teacher, tau) for tau in (2.0, 4.0))
    classes = sum(class_gap(STUDENT, teacher, tau) for tau in (2.0, 4.0))
    assert isinstance(instances, Tensor)
    assert isinstance(samples, Tensor)
    assert isinstance(classes, Tensor)
    rare = frequency.argsort()[:2]
    expected = instances * torch.tensor([1, 1, 0]) + samples + classes[rare].sum() / 4
    torch.testing.assert_close(mlkd(STUDENT, teacher, temperatures=[4.0, 2.0]), expected)
    as_coded = (instances + samples) * 2 / 3 + classes.mean() / 2
    torch.testing.assert_close(mlkd(STUDENT, teacher, temperatures=[2.0, 4.0], variant="code"), as_coded)


def test_a_strong_view_adds_all_of_its_samples() -> None:
    strong = normal(0, 3, 4), normal(1, 3, 4)
    for variant in ("paper", "code"):
        added = mlkd(STUDENT, TEACHER, *strong, variant=variant) - mlkd(STUDENT, TEACHER, variant=variant)
        ends = (STUDENT, TEACHER) if variant == "code" else strong
        parts = [instance_gap(*ends, tau) for tau in (2.0, 6.0)] + [
            instance_gap(*strong, tau) for tau in (3.0, 4.0, 5.0)
        ]
        torch.testing.assert_close(added, torch.stack(parts).sum(0))


def test_half_of_a_strong_view_is_refused() -> None:
    shapes = {"student": (4,), "teacher": (4,), "student_strong": (4,)}
    with pytest.raises(kdx.PlanError, match="name both of student_strong and teacher_strong, or none"):
        MultiLevel(MultiLevel.Config(), kdx.Given(shapes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "authors"}, "variant: found 'authors', expected one of paper, code"),
        ({"temperatures": []}, r"temperatures: found \[\], expected numbers above 0"),
        ({"temperatures": [2.0, 0.0]}, r"temperatures: found \[2.0, 0.0\], expected numbers above 0"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=message):
        mlkd(STUDENT, TEACHER, **options)


def test_losses_keep_the_contract() -> None:
    check_loss(Correlation, zero_at_equality=True)
    check_loss(Correlation, zero_at_equality=True, temperature=1.0, inter=2.0, intra=0.5)
    for variant in ("paper", "code"):
        check_loss(MultiLevel, zero_at_equality=True, variant=variant)
        strong = {"student_strong": (5,), "teacher_strong": (5,)}
        check_loss(MultiLevel, shapes=strong, zero_at_equality=True, variant=variant)
