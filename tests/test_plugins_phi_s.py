"""PHI-S: its matrices, the published invariants, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_inputs import normal
from kdx_plugins.phi_s import PhiStandardised, even_rotation, fit_phi, hadamard, phi_standardise, undo_phi
from torch import Tensor

import kdx
from kdx.testing import check_target

KNOWN = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 80, 96, 112, 384, 768)
UNKNOWN = (3, 5, 6, 10, 14, 92)


def skewed(count: int, width: int) -> Tensor:
    """Features of very different variances, correlated, [count, width]."""
    spread = torch.logspace(-2, 2, width, dtype=torch.float64)
    return (normal(0, count, width) * spread) @ normal(1, width, width) + 3


@pytest.mark.parametrize("size", KNOWN)
def test_hadamard_matrices_have_even_entries_and_are_orthonormal(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.full((size, size), 1 / math.sqrt(size), dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", UNKNOWN)
def test_no_hadamard_matrix_is_made_up(size: int) -> None:
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [2, 3, 7, 12, 30, 92])
def test_the_rotation_makes_all_variances_alike_whether_or_not_there_is_a_hadamard_matrix(size: int) -> None:
    variances = torch.logspace(-3, 2, size, dtype=torch.float64)
    rotation = even_rotation(variances)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
    diagonal = (rotation @ variances.diag() @ rotation.T).diagonal()
    torch.testing.assert_close(diagonal, variances.mean().expand(size), rtol=1e-9, atol=0)


@pytest.mark.parametrize("width", [5, 8, 12])
def test_features_vary_alike_distances_are_scaled_only_and_the_inverse_is_exact(width: int) -> None:
    features = skewed(200, width)
    mean, covariance = features.mean(0), torch.cov(features.T, correction=0)
    rotation, scale = fit_phi(covariance)
    made = phi_standardise(features, mean, rotation, scale)
    after = torch.cov(made.T, correction=0)
    torch.testing.assert_close(after.diagonal(), torch.ones(width, dtype=torch.float64), rtol=1e-9, atol=0)
    assert scale.item() == pytest.approx(math.sqrt(covariance.trace().item() / width), rel=1e-12)
    torch.testing.assert_close(torch.pdist(made), torch.pdist(features) / scale)
    torch.testing.assert_close(undo_phi(made, mean, rotation, scale), features, rtol=0, atol=1e-9)


def test_no_direction_is_blown_up_as_by_whitening() -> None:
    features = skewed(200, 8)
    covariance = torch.cov(features.T, correction=0)
    made = phi_standardise(features, features.mean(0), *fit_phi(covariance))
    before, after = torch.linalg.eigvalsh(covariance), torch.linalg.eigvalsh(torch.cov(made.T, correction=0))
    torch.testing.assert_close(after / after.mean(), before / before.mean())


def node(*shape: int) -> Any:
    return PhiStandardised(PhiStandardised.Config(), kdx.Given(shapes={"features": shape}))


def test_the_target_is_fitted_batch_by_batch_as_on_all_at_once() -> None:
    maps = skewed(6 * 4, 8).float().reshape(6, 2, 2, 8).permute(0, 3, 1, 2)
    once, parts = node(8, 2, 2), node(8, 2, 2)
    once.calibrate(features=maps)
    for part in (maps[:1], maps[1:4], maps[4:]):
        parts.calibrate(features=part)
    torch.testing.assert_close(parts.covariance, once.covariance, rtol=1e-4, atol=1e-2)
    made = parts(maps)
    assert made.shape == maps.shape
    flat = made.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(flat.var(1, correction=0), torch.ones(8), rtol=1e-3, atol=0)
    torch.testing.assert_close(parts.inverse(made), maps, rtol=1e-4, atol=1e-2)


def test_before_it_is_fitted_features_stay_as_they_are() -> None:
    vectors = normal(0, 3, 5).float()
    torch.testing.assert_close(node(5)(vectors), vectors)


def test_equal_features_give_zero() -> None:
    same, one = torch.full((4, 6), 2.5), node(6)
    one.calibrate(features=same)
    assert torch.equal(one(same), torch.zeros(4, 6))


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 2)])
def test_features_that_are_no_maps_or_vectors_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(kdx.PlanError, match=r"for one sample, expected a map \[D, H, W\] or a vector \[D\]"):
        node(*shape)


def test_the_target_keeps_the_contract() -> None:
    check_target(PhiStandardised, shapes={"features": (6, 3, 3)})
    fitted = node(12)
    fitted.calibrate(features=normal(0, 40, 12).float())
    check_target(fitted)
