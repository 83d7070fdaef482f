"""The built-in components keep the contract that they ask of others."""

from __future__ import annotations

from typing import Any

import pytest

from kdx.builtin.models import Timm, Torchvision
from kdx.builtin.schedules import Constant, Cosine, ExpRampup, Linear, Step, Table
from kdx.components import Schedule
from kdx.testing import check_model, check_schedule


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (Constant, {"value": 2.0, "warmup": 1.0}),
        (Cosine, {"peak": 1.0, "end": 0.1, "per": "epoch"}),
        (ExpRampup, {"epochs": 4.0}),
        (Linear, {"start": 1.0, "end": 0.0, "begin": 1.0, "finish": 5.0}),
        (Step, {"start": 1.0, "at": [2.0, 4.0]}),
        (Table, {"values": {0: 1.0, 3: 0.5}, "interpolate": "linear"}),
    ],
)  # fmt: skip
def test_schedules_keep_the_contract(schedule: type[Schedule], options: dict[str, Any]) -> None:
    check_schedule(schedule, **options)


def test_a_timm_net_keeps_the_contract() -> None:
    check_model(Timm, model="resnet10t", args={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "stem_width": 4})


def test_a_torchvision_net_keeps_the_contract() -> None:
    check_model(Torchvision, model="shufflenet_v2_x0_5")
