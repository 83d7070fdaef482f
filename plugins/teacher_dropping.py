"""Teachers that are left out at random, so that a student does not lean on any one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kdx


class DenseGuidance(kdx.Target):
    """Weights of M teachers, 1 or 0 by chance (Son et al.: Densely guided knowledge distillation, ICCV 2021).

    Gives `weights` [B, M] for `weighted_kd`. Each teacher stays with the probability `survival`, drawn anew in every
    update, for all samples of it alike; none may stay, and then only the label speaks. Its teachers are all the
    earlier nets of a chain: the first teacher and every assistant.

        L = (1 - lambda) CE + lambda sum_k b_k KL_k

    survival: 0.75 is published; 1 keeps all. Out of training all weights are 1. With `accumulate`, each micro-batch
    draws for itself.
    """

    name = "dgkd"
    confidence = "paper"
    inputs = {"logits": kdx.Many("*.logits")}
    outputs = ("weights",)

    @dataclass(frozen=True)
    class Config:
        survival: float = 0.75

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        if not 0 < config.survival <= 1:
            raise kdx.ConfigError(f"survival: found {config.survival}, expected a probability above 0, up to 1")
        self.count = kdx.check_teachers(given)

    def forward(self, logits: list[Tensor]) -> dict[str, Tensor]:
        shape, like = (len(logits[0]), self.count), kdx.precise(logits[0])
        if not (self.training and torch.is_grad_enabled()):
            return {"weights": like.new_ones(shape)}
        draw = torch.rand(self.count, generator=self.given.generator, device=like.device)
        return {"weights": (draw < self.config.survival).to(like.dtype).expand(shape)}


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [DenseGuidance]
