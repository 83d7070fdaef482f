"""Soft targets and logit regression: golden values, gradients and invariances."""

from __future__ import annotations

import pytest
import torch
from golden_inputs import STUDENT, TEACHER, normal, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.logit import (
    DIVERGENCES,
    AnnealedRegression,
    LogitRegression,
    MultiLabel,
    SoftTargets,
    binary_divergence,
    logit_regression,
    soft_binary_cross_entropy,
    soft_targets,
)

import kdx
from kdx.testing import check_loss


@pytest.mark.parametrize(("temperature", "golden"), [(4.0, 0.2442403738), (1.0, 0.1454213744)])
def test_soft_targets_have_their_golden_value(temperature: float, golden: float) -> None:
    values = soft_targets(STUDENT, TEACHER, number(temperature))
    assert values.shape == (3,)
    assert values.mean().item() == pytest.approx(golden, abs=1e-9)


def test_logit_regression_has_its_golden_value() -> None:
    assert logit_regression(STUDENT, TEACHER).mean().item() == pytest.approx(0.56, abs=1e-9)


def test_soft_targets_at_a_high_temperature_are_half_of_centred_regression() -> None:
    regression = logit_regression(STUDENT, TEACHER, centre=True).mean().item() / 2
    assert regression == pytest.approx(0.2591666667, abs=1e-9)
    assert soft_targets(STUDENT, TEACHER, number(1000.0)).mean().item() == pytest.approx(0.2591377, abs=1e-7)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 20))
def test_the_gradient_of_soft_targets_is_tau_times_the_difference(seed: int, temperature: float) -> None:
    student, teacher = normal(seed, 4, 6).requires_grad_(), normal(seed + 1, 4, 6)
    soft_targets(student, teacher, number(temperature)).mean().backward()
    p = [(logits / temperature).softmax(1) for logits in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, temperature * (p[0] - p[1]) / 4)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(seed: int, shift: float) -> None:
    student, teacher = normal(seed, 4, 6), normal(seed + 1, 4, 6)
    rows = torch.tensor([[shift], [0.0], [-shift], [1.0]], dtype=torch.float64)
    for loss in (
        lambda s, t: soft_targets(s, t, number(2.0)),
        lambda s, t: logit_regression(s, t, centre=True),
    ):
        torch.testing.assert_close(loss(student + rows, teacher), loss(student, teacher))
        torch.testing.assert_close(loss(student, teacher + rows), loss(student, teacher))


def test_a_temperature_per_sample_acts_on_its_own_sample() -> None:
    together = soft_targets(STUDENT, TEACHER, torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    alone = [soft_targets(STUDENT[i : i + 1], TEACHER[i : i + 1], number(t)) for i, t in enumerate((1.0, 4.0, 2.0))]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_logarithm_of_probabilities_serves_as_logits() -> None:
    torch.testing.assert_close(
        soft_targets(STUDENT, TEACHER.softmax(1).log(), number(4.0)), soft_targets(STUDENT, TEACHER, number(4.0))
    )


def test_positions_of_dense_logits_are_averaged_sample_by_sample() -> None:
    student, teacher = normal(0, 2, 5, 3, 4), normal(1, 2, 5, 3, 4)
    rows = [logits.permute(0, 2, 3, 1).reshape(-1, 5) for logits in (student, teacher)]
    for dense, flat in (
        (soft_targets(student, teacher, number(4.0)), soft_targets(rows[0], rows[1], number(4.0))),
        (logit_regression(student, teacher), logit_regression(rows[0], rows[1])),
    ):
        torch.testing.assert_close(dense, flat.reshape(2, -1).mean(1))


def test_a_student_far_from_its_teacher_gives_a_large_but_finite_value() -> None:
    value = soft_targets(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]), torch.tensor(1.0))
    assert value.item() == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("divergence", "mix", "golden"),
    [
        ("reverse_kl", 0.0, 0.1629434157),
        ("jsd", 0.5, 0.0371714856),
        ("jsd", 0.1, 0.0130791811),
        ("skew_kl", 0.1, 0.1178010426),
        ("skew_reverse_kl", 0.1, 0.1255701940),
        ("total_variation", 0.0, 0.2256864868),
    ],
)
def test_divergences_have_their_golden_values(divergence: str, mix: float, golden: float) -> None:
    value = soft_targets(STUDENT, TEACHER, number(1.0), divergence=divergence, mix=mix).mean()
    assert value.item() == pytest.approx(golden, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 20))
def test_divergences_are_never_below_zero_and_ignore_shifts_of_a_row(seed: int, temperature: float) -> None:
    student, teacher = normal(seed, 4, 6), normal(seed + 1, 4, 6)
    for divergence in DIVERGENCES:
        value = soft_targets(student, teacher, number(temperature), divergence=divergence, mix=0.3)
        assert (value > 0).all(), divergence
        moved = soft_targets(student + 7, teacher - 3, number(temperature), divergence=divergence, mix=0.3)
        torch.testing.assert_close(moved, value)


def made(**options: object) -> SoftTargets:
    return SoftTargets(SoftTargets.Config(**options), kdx.Given())  # type: ignore[arg-type]


def test_the_ends_of_the_mixtures_are_plain_divergences() -> None:
    forward = made()(STUDENT, TEACHER, number(2.0))
    reverse = made(divergence="reverse_kl")(STUDENT, TEACHER, number(2.0))
    torch.testing.assert_close(made(divergence="jsd", beta=0.0)(STUDENT, TEACHER, number(2.0)), forward)
    torch.testing.assert_close(made(divergence="jsd", beta=1.0)(STUDENT, TEACHER, number(2.0)), reverse)
    torch.testing.assert_close(made(divergence="skew_kl", alpha=0.0)(STUDENT, TEACHER, number(2.0)), forward)
    torch.testing.assert_close(made(divergence="skew_reverse_kl", alpha=0.0)(STUDENT, TEACHER, number(2.0)), reverse)
    torch.testing.assert_close(reverse, soft_targets(TEACHER, STUDENT, number(2.0)))


def test_options_of_a_divergence_are_used_and_have_their_published_defaults() -> None:
    half, tenth = made(divergence="jsd"), made(divergence="jsd", beta=0.1)
    assert half(STUDENT, TEACHER, number(1.0)).mean().item() == pytest.approx(0.0371714856, abs=1e-9)
    assert tenth(STUDENT, TEACHER, number(1.0)).mean().item() == pytest.approx(0.0130791811, abs=1e-9)
    skewed = made(divergence="skew_kl")(STUDENT, TEACHER, number(1.0))
    assert skewed.mean().item() == pytest.approx(0.1178010426, abs=1e-9)
    evenly = made(divergence="jsd")
    torch.testing.assert_close(evenly(STUDENT, TEACHER, number(1.0)), evenly(TEACHER, STUDENT, number(1.0)))


def test_the_mean_over_classes_is_the_sum_divided_by_their_number() -> None:
    torch.testing.assert_close(
        made(reduction="mean")(STUDENT, TEACHER, number(4.0)) * 4, made()(STUDENT, TEACHER, number(4.0))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence: found 'kl', expected one of forward_kl, reverse_kl"),
        ({"reduction": "batchmean"}, "reduction: found 'batchmean', expected one of sum, mean"),
        ({"beta": 0.5}, "beta: `divergence: forward_kl` does not read it, only jsd"),
        ({"divergence": "jsd", "alpha": 0.1}, "alpha: `divergence: jsd` does not read it, only skew_kl and"),
        ({"divergence": "jsd", "beta": 1.5}, r"beta: found 1.5, expected a share from 0 to 1"),
        ({"divergence": "skew_kl", "alpha": 1.0}, r"alpha: found 1.0, expected a share from 0 to 0.99"),
    ],
)
def test_a_wrong_option_of_soft_targets_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(kdx.ConfigError, match=message):
        made(**options)


def test_the_teachers_logits_are_shrunken_by_the_annealing_factor() -> None:
    loss = AnnealedRegression(AnnealedRegression.Config(highest=5.0), kdx.Given())
    for temperature, factor in ((1.0, 1.0), (3.0, 0.6), (5.0, 0.2)):
        value = loss(STUDENT, TEACHER, number(temperature))
        torch.testing.assert_close(value, (STUDENT - factor * TEACHER).square().mean(1))


def test_multi_label_losses_have_their_golden_values() -> None:
    assert soft_binary_cross_entropy(STUDENT, TEACHER, number(1.0)).mean().item() == pytest.approx(
        0.6127506480, abs=1e-9
    )
    assert binary_divergence(STUDENT, TEACHER, number(1.0)).mean().item() == pytest.approx(0.2198515681, abs=1e-9)


def test_the_binary_cross_entropy_of_a_perfect_student_has_no_gradient() -> None:
    student = TEACHER.clone().requires_grad_()
    soft_binary_cross_entropy(student, TEACHER, number(1.0)).sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


def test_the_two_multi_label_forms_have_gradients_that_differ_by_the_number_of_classes() -> None:
    gradients = []
    for form in ("bce", "binary_kl"):
        student = STUDENT.clone().requires_grad_()
        MultiLabel(MultiLabel.Config(form=form), kdx.Given())(student, TEACHER, number(1.0)).sum().backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0] * 4, gradients[1])


def test_wrong_options_of_the_others_are_refused() -> None:
    with pytest.raises(kdx.ConfigError, match=r"highest: found 0\.5, expected a temperature of at least 1"):
        AnnealedRegression(AnnealedRegression.Config(highest=0.5), kdx.Given())
    with pytest.raises(kdx.ConfigError, match="form: found 'kl', expected one of bce, binary_kl"):
        MultiLabel(MultiLabel.Config(form="kl"), kdx.Given())


def test_logit_losses_keep_the_contract() -> None:
    check_loss(SoftTargets, zero_at_equality=True)
    check_loss(SoftTargets, zero_at_equality=True, temperature=1.0)
    check_loss(SoftTargets, shapes={"student": (5, 3, 3), "teacher": (5, 3, 3)}, zero_at_equality=True)
    check_loss(LogitRegression, zero_at_equality=True)
    check_loss(LogitRegression, zero_at_equality=True, centre=True)
    for divergence in DIVERGENCES:
        check_loss(SoftTargets, zero_at_equality=True, divergence=divergence)
    check_loss(SoftTargets, zero_at_equality=True, reduction="mean")
    check_loss(AnnealedRegression, zero_at_equality=True)
    check_loss(AnnealedRegression, temperature=4.0)
    check_loss(MultiLabel)
    check_loss(MultiLabel, form="binary_kl", zero_at_equality=True, temperature=2.0)
