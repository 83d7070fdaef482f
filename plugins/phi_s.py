"""PHI-S: teacher features standardised so that all dimensions vary alike and distances are only scaled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import kdx


def hadamard(size: int) -> Tensor | None:
    """An orthonormal matrix [size, size] whose entries are all `+-1 / sqrt(size)`, float64; None where none is known.

    Built by Sylvester's doubling on Paley's matrices of both kinds, for prime fields.
    """
    signs = _signs(size)
    return None if signs is None else signs / math.sqrt(size)


def even_rotation(variances: Tensor) -> Tensor:
    """An orthonormal matrix Q [D, D] that makes the diagonal of `Q diag(variances) Q^T` constant, float64.

    A Hadamard matrix where there is one, whatever the `variances` [D]. Elsewhere a chain of at most D - 1 plane
    rotations, each of which sets one entry of the diagonal to the mean (Schur and Horn: such a chain always exists).
    """
    known = hadamard(len(variances))
    return _even_by_planes(variances.double()) if known is None else known.to(variances.device)


def phi_standardise(features: Tensor, mean: Tensor, rotation: Tensor, scale: Tensor) -> Tensor:
    """`rotation (x - mean) / scale` of features [B, D, ...], same shape; the arguments are those of `fit_phi`."""
    return torch.einsum("ij,bj...->bi...", rotation, features - _as_channels(mean, features)) / scale


def undo_phi(standardised: Tensor, mean: Tensor, rotation: Tensor, scale: Tensor) -> Tensor:
    """What `phi_standardise` was given, from what it gave, [B, D, ...]."""
    return torch.einsum("ji,bj...->bi...", rotation, standardised) * scale + _as_channels(mean, standardised)


def fit_phi(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation [D, D] and the scale, 0-d, for features with this `covariance` [D, D].

    The rotation is `Q U^T` with U the eigenvectors and Q an `even_rotation`; the scale is the root of the mean
    eigenvalue. The standardised features have variance 1 in each dimension.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    # Eigenvectors have no sign of their own: the largest entry of each is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    rotation = even_rotation(values) @ (vectors * largest.sign()).T
    scale = values.clamp(min=0).mean().sqrt().clamp(min=1e-6)
    return rotation.to(covariance.dtype), scale.to(covariance.dtype)


class PhiStandardised(kdx.Target):
    """The features of a teacher under PHI-S (Ranzinger et al., 2024), [B, D, ...] as they came.

    `x' = H U^T (x - mean) / a`, with U the eigenvectors of the covariance, `a^2` the mean eigenvalue and H a Hadamard
    matrix: each dimension has variance 1, and distances between features are those of before divided by `a`. Teachers
    of any scale then count alike in a plain `mse`, and no direction is blown up as by whitening. The statistics are
    those of the batches seen before training; `inverse` takes a student's features back.

    Features are maps [B, D, H, W] or vectors [B, D]. Where no Hadamard matrix of size D is known, a chain of plane
    rotations for this covariance stands in, which gives the variance 1 as well; the authors take a random rotation
    there.
    """

    name = "phi_s"
    confidence = "code"
    inputs = {"features": "teacher.depth_100"}

    mean: Tensor
    covariance: Tensor
    seen: Tensor
    rotation: Tensor
    scale: Tensor

    def __init__(self, config: PhiStandardised.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        shape = given.shape("features")
        if len(shape) not in (1, 3) or shape[0] < 2:
            raise kdx.PlanError(
                f"features: found {list(shape)} for one sample, expected a map [D, H, W] or a vector [D] with D >= 2"
            )
        width = shape[0]
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("covariance", torch.zeros(width, width))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("rotation", torch.eye(width))
        self.register_buffer("scale", torch.ones(()))

    def calibrate(self, **tensors: Any) -> None:
        flat = tensors["features"].detach().float().transpose(0, 1).flatten(1)
        share = flat.shape[1] / (self.seen + flat.shape[1])
        apart = flat.mean(1) - self.mean
        self.covariance.lerp_(torch.cov(flat, correction=0), share)
        self.covariance += share * (1 - share) * torch.outer(apart, apart)
        self.mean += share * apart
        self.seen += flat.shape[1]
        rotation, scale = fit_phi(self.covariance)
        self.rotation.copy_(rotation)
        self.scale.copy_(scale)

    def forward(self, features: Tensor) -> Tensor:
        features = kdx.precise(features)
        return phi_standardise(features, self.mean, self.rotation, self.scale)

    def inverse(self, standardised: Tensor) -> Tensor:
        """The teacher's features again, [B, D, ...]."""
        return undo_phi(standardised, self.mean, self.rotation, self.scale)


def _signs(size: int) -> Tensor | None:
    """A Hadamard matrix of +-1, float64."""
    if size <= 2:
        return torch.tensor([[1.0]] if size == 1 else [[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        return _bordered(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    if _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        own = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        between = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(size // 2 - 1, 1.0), between) + torch.kron(
            torch.eye(size // 2, dtype=torch.float64), own
        )
    half = _signs(size // 2)
    return None if half is None else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)


def _bordered(prime: int, left: float) -> Tensor:
    """Paley's conference matrix of size `prime + 1`: the quadratic characters of differences, with a border of 1 on top
    and of `left` at the side.
    """
    places = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[places.square() % prime] = 1.0
    character[0] = 0.0
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, left
    matrix[1:, 1:] = character[(places[:, None] - places) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _even_by_planes(variances: Tensor) -> Tensor:
    size = len(variances)
    middle = variances.mean()
    matrix, turned = variances.diag(), torch.eye(size, dtype=variances.dtype, device=variances.device)
    for _ in range(size - 1):
        apart = matrix.diagonal() - middle
        low, high = int(apart.argmin()), int(apart.argmax())
        if not apart[low] < 0 < apart[high]:
            break
        # The tangent t of the angle that sets the lower entry to the mean: a t^2 + 2 b t + c = 0, with c < 0 < a.
        a, b, c = apart[high], matrix[low, high], apart[low]
        tangent = (-b + torch.copysign((b.square() - a * c).sqrt(), b)) / a
        cosine = (1 + tangent.square()).rsqrt()
        plane = torch.stack([torch.stack([cosine, cosine * tangent]), torch.stack([-cosine * tangent, cosine])])
        pair = [low, high]
        turned[pair] = plane @ turned[pair]
        matrix[pair] = plane @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ plane.T
        matrix[low, low] = middle  # so that rounding cannot choose it again
    return turned


def _as_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *([1] * (like.ndim - 2)))


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [PhiStandardised]
