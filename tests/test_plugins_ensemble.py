"""Ensembles of teachers: what they mix, how they weigh, and the published values they reproduce."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.ensemble import ConfidenceMean, EntropyMean, Mean, entropy, entropy_weights, log_confidence_weights
from kdx_plugins.logit import soft_targets
from torch import Tensor

import kdx
from kdx.testing import check_target

STUDENT = torch.tensor(
    [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, -0.5, 1.0], [1.0, -1.0, 2.0, 0.0]],
    dtype=torch.float64,
)
TEACHERS = [
    torch.tensor([[3.0, 1.0, 0.2, -1.2], [0.1, 1.5, -0.3, 0.7], [0.0, 0.5, 2.5, -1.0]], dtype=torch.float64),
    torch.tensor([[2.0, 2.0, 0.5, 0.0], [1.0, 0.2, -0.3, 0.9], [0.3, 0.2, 1.0, 0.4]], dtype=torch.float64),
    torch.tensor([[0.0, 1.0, 2.0, -1.0], [0.5, 2.0, 0.0, 0.1], [1.0, 0.1, 0.3, 0.2]], dtype=torch.float64),
]
ONE = torch.tensor(1.0, dtype=torch.float64)
FOUR = torch.tensor(4.0, dtype=torch.float64)


def make(kind: type[Any], count: int = 3, **options: Any) -> Any:
    return kind(kind.Config(**options), kdx.Given(shapes={"logits": [(4,)] * count}))


def divergences() -> Tensor:
    """tau^2 KL of each teacher at temperature 4, [B, M]."""
    return torch.stack([soft_targets(STUDENT, teacher, FOUR) for teacher in TEACHERS], 1)


def gradient(value: Any) -> Tensor:
    student = STUDENT.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(student), student)
    return grad


def test_the_mean_of_the_divergences_has_its_golden_value() -> None:
    assert divergences().mean().item() == pytest.approx(0.3704212887, abs=1e-9)


def test_the_divergence_from_the_mean_has_the_gradient_of_the_mean_divergence() -> None:
    mixture = make(Mean)(TEACHERS, FOUR)["logits"]
    of_mean = gradient(lambda student: soft_targets(student, mixture, FOUR).mean())
    mean_of = gradient(lambda student: torch.stack([soft_targets(student, t, FOUR).mean() for t in TEACHERS]).mean())
    torch.testing.assert_close(of_mean, mean_of, rtol=0, atol=1e-12)


def test_the_published_entropy_weights_have_their_golden_loss() -> None:
    weights = entropy_weights(TEACHERS)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    loss = (2 * weights * divergences()).sum(1).mean() / 3
    assert loss.item() == pytest.approx(0.2467036690, abs=1e-9)


def test_the_entropy_ensemble_has_the_gradient_of_the_published_loss() -> None:
    out = make(EntropyMean)(TEACHERS, FOUR)
    published = gradient(
        lambda student: (
            (2 * out["weights"] * torch.stack([soft_targets(student, t, FOUR) for t in TEACHERS], 1)).sum(1).mean() / 3
        )
    )
    of_mixture = gradient(lambda student: soft_targets(student, out["logits"], FOUR).mean())
    torch.testing.assert_close(of_mixture * 2 / 3, published, rtol=0, atol=1e-12)


def test_the_mean_of_probabilities_and_of_logits_are_what_they_say() -> None:
    probabilities = make(Mean)(TEACHERS, ONE)["logits"].softmax(1)
    torch.testing.assert_close(probabilities, torch.stack(TEACHERS).softmax(2).mean(0))
    for temperature in (ONE, FOUR):
        logits = make(Mean, of="logits")(TEACHERS, temperature)["logits"]
        torch.testing.assert_close(logits, torch.stack(TEACHERS).mean(0))


def test_fixed_weights_are_scaled_to_one_and_a_zero_leaves_a_teacher_out() -> None:
    for of in ("probabilities", "logits"):
        weighted = make(Mean, of=of, weights=[2.0, 6.0, 0.0])(TEACHERS, ONE)["logits"]
        repeated = make(Mean, 4, of=of)([TEACHERS[0], *[TEACHERS[1]] * 3], ONE)["logits"]
        torch.testing.assert_close(weighted.log_softmax(1), repeated.log_softmax(1))


def test_a_surer_teacher_counts_more_and_more_so_with_sharpness() -> None:
    logits = [torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])]
    weights = [log_confidence_weights(logits, torch.tensor(sharpness)).exp()[0, 0] for sharpness in (0.0, 2.0, 50.0)]
    assert weights[0] == pytest.approx(0.5)
    assert weights[0] < weights[1] < weights[2]
    assert weights[2] > 0.999


def test_the_confidence_weights_follow_their_formula() -> None:
    confidence = torch.stack([1 - entropy(teacher) / math.log(4) for teacher in TEACHERS], 1)
    out = make(ConfidenceMean)(TEACHERS, FOUR, ONE)
    torch.testing.assert_close(out["weights"], (4 * confidence).softmax(1))
    mixed = sum(out["weights"][:, k, None] * teacher.softmax(1) for k, teacher in enumerate(TEACHERS))
    torch.testing.assert_close(out["logits"].softmax(1), mixed)


def test_sharpness_zero_is_the_plain_mean() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(
        make(ConfidenceMean)(TEACHERS, zero, FOUR)["logits"], make(Mean)(TEACHERS, FOUR)["logits"]
    )


@settings(deadline=None)
@given(order=st.permutations(range(3)))
def test_the_order_of_the_teachers_changes_only_the_order_of_the_weights(order: list[int]) -> None:
    for kind, knobs in ((Mean, (FOUR,)), (ConfidenceMean, (FOUR, FOUR)), (EntropyMean, (FOUR,))):
        out, shuffled = make(kind)(TEACHERS, *knobs), make(kind)([TEACHERS[k] for k in order], *knobs)
        torch.testing.assert_close(shuffled["logits"], out["logits"])
        if "weights" in out:
            torch.testing.assert_close(shuffled["weights"], out["weights"][:, order])


def test_equal_teachers_mix_to_themselves_with_equal_weights() -> None:
    same = [TEACHERS[0]] * 3
    for kind, knobs in ((Mean, (FOUR,)), (ConfidenceMean, (FOUR, FOUR)), (EntropyMean, (FOUR,))):
        out = make(kind)(same, *knobs)
        torch.testing.assert_close(out["logits"].log_softmax(1), TEACHERS[0].log_softmax(1))
        if "weights" in out:
            torch.testing.assert_close(out["weights"], torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_teachers_without_any_doubt_get_equal_finite_weights() -> None:
    sure = [torch.eye(4)[:2] * 1e4, torch.eye(4)[1:3] * 1e4]
    out = make(EntropyMean, 2)(sure, torch.tensor(4.0))
    torch.testing.assert_close(out["weights"], torch.full((2, 2), 0.5))
    assert out["logits"].isfinite().all()


def test_half_precision_teachers_are_mixed_in_single_precision() -> None:
    half = [teacher.to(torch.bfloat16) for teacher in TEACHERS]
    assert make(Mean)(half, torch.tensor(4.0))["logits"].dtype == torch.float32
    assert make(ConfidenceMean)(half, torch.tensor(4.0), torch.tensor(1.0))["weights"].dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "shapes", "options", "message"),
    [
        (Mean, [(4,), (5,)], {}, r"logits: found \[4\], \[5\] for one sample, expected \[K\] with the same K"),
        (ConfidenceMean, [(4, 2, 2)] * 2, {}, r"logits: found \[4, 2, 2\]"),
        (EntropyMean, [(4,)], {}, "it was given one; expected two or more"),
        (Mean, [(4,)] * 2, {"weights": [1.0]}, "weights: found 1 of them for 2 teachers"),
        (Mean, [(4,)] * 2, {"weights": [1.0, -1.0]}, r"weights: found \[1.0, -1.0\], expected numbers from 0"),
        (Mean, [(4,)] * 2, {"weights": [0.0, 0.0]}, "that are not all 0"),
        (Mean, [(4,)] * 2, {"of": "logit"}, "of: found 'logit', expected probabilities or logits"),
    ],
)
def test_ensembles_that_cannot_be_are_refused(
    kind: type[Any], shapes: list[kdx.Shape], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((kdx.PlanError, kdx.ConfigError), match=message):
        kind(kind.Config(**options), kdx.Given(shapes={"logits": shapes}))


def test_ensembles_keep_the_contract() -> None:
    check_target(Mean)
    check_target(Mean, of="logits", weights=[1.0, 2.0, 0.0], temperature=4.0)
    check_target(ConfidenceMean, sharpness=50.0)
    check_target(EntropyMean)


def test_the_logits_of_each_teacher_are_divided_by_its_own_temperature() -> None:
    cases: list[tuple[type[Any], tuple[Tensor, ...]]] = [
        (Mean, (FOUR,)),
        (ConfidenceMean, (FOUR, FOUR)),
        (EntropyMean, (FOUR,)),
    ]
    own = [1.0, 2.0, 0.5]
    divided = [teacher / temperature for teacher, temperature in zip(TEACHERS, own, strict=True)]
    for kind, knobs in cases:
        found, expected = make(kind, temperatures=own)(TEACHERS, *knobs), make(kind)(divided, *knobs)
        for name in found:
            torch.testing.assert_close(found[name], expected[name])
        assert not torch.allclose(found["logits"], make(kind)(TEACHERS, *knobs)["logits"])
        with pytest.raises(kdx.PlanError, match="temperatures: found 2 of them for 3 teachers, expected one for each"):
            make(kind, temperatures=[1.0, 2.0])
        with pytest.raises(kdx.ConfigError, match=r"temperatures: found \[1.0, 0.0, 2.0\], expected numbers above 0"):
            make(kind, temperatures=[1.0, 0.0, 2.0])
        check_target(kind, temperatures=own)
