"""Targets that give a temperature for each sample, to be used as the knob of a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import kdx


def entropy_temperature(logits: Tensor, low: Tensor, high: Tensor, *, reverse: bool = False) -> Tensor:
    """`low + (high - low) * (1 - H / log K)` with `H` the entropy of `softmax(logits)`, [B], from logits [B, K].

    A sure answer gives `high`, an even one `low`; `reverse` swaps the two.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = torch.log_softmax(logits, dim=1)
    doubt = (-(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])).clamp(0, 1)
    return low + (high - low) * (doubt if reverse else 1 - doubt)


class EntropyTemperature(kdx.Target):
    """A temperature per sample from the entropy of the given logits, [B], between `low` and `high`.

    A rule of kdx itself: what a sure teacher knows beyond its answer shows only when it is softened, while an unsure
    one has said it already. It reads no labels. With `reverse`, unsure answers are softened more.
    """

    name = "entropy_temperature"
    inputs = {"logits": "teacher.logits"}
    knobs = {"low": kdx.Knob(1.0, above=0.0), "high": kdx.Knob(4.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        reverse: bool = False

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        shape = given.shape("logits")
        if len(shape) != 1 or shape[0] < 2:
            raise kdx.PlanError(f"logits: found {list(shape)} for one sample, expected [K] with K >= 2 classes")

    def forward(self, logits: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return entropy_temperature(logits, low, high, reverse=self.config.reverse)


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [EntropyTemperature]
