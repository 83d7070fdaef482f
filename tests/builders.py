"""Small real parts for tests: facts, a batch, configs, and plans made of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdx.calls import execute
from kdx.config import load_mapping, overlay
from kdx.modules import Knobs, Learner, Teachers
from kdx.plan import Plan, make_plan
from kdx.plugins import Registry, discover
from kdx.spec import RunSpec, check
from kdx.types import Batch, Clock, DataFacts, Losses, StreamFacts

TOYS = Path(__file__).parent / "toy_plugin.py"
CLASSES = ("cat", "dog", "emu")
FACTS = DataFacts(
    streams={
        "image": StreamFacts("image", (1, 28, 28), (0.3,), (0.25,)),
        "label": StreamFacts("label", ()),
    },
    classes=CLASSES,
    size=8,
    labels=(0, 1, 2, 0, 1, 2, 0, -1),
)
NET: dict[str, Any] = {
    "use": "timm",
    "model": "resnet18",
    "args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8},
}
WIDE = overlay(NET, {"args": {"channels": [8, 16, 32, 64]}})
VIT: dict[str, Any] = {
    "use": "timm",
    "model": "vit_tiny_patch16_224",
    "args": {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
PLAIN: dict[str, Any] = {
    "name": "small",
    "data": {"use": "tensors"},
    "student": NET,
    "losses": {"ce": {"use": "cross_entropy"}},
    "train": {"epochs": 1, "batch": 4},
}
"""The smallest config: a student that learns from labels."""


def batch(size: int = 4, seed: int = 0) -> Batch:
    """Images [size, 1, 28, 28] in `0..1`, labels and indices."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(size, 1, 28, 28, generator=generator),
        "label": torch.arange(size) % len(CLASSES),
        "index": torch.arange(size),
    }


@functools.cache
def registry() -> Registry:
    """Built-ins, shipped plugins and the toys."""
    return discover([str(TOYS)])


def spec_of(*layers: Mapping[str, Any], plugins: Registry | None = None) -> RunSpec:
    """The smallest config with these layers over it, checked."""
    return check(load_mapping(functools.reduce(overlay, layers, PLAIN)), plugins or registry())


def plan_of(
    *layers: Mapping[str, Any],
    facts: DataFacts = FACTS,
    sample: Batch | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    plugins: Registry | None = None,
) -> Plan:
    """The plan of the smallest config with these layers over it."""
    spec = spec_of(*layers, plugins=plugins)
    return make_plan(spec, facts, batch() if sample is None else sample, networks=networks)


def run_calls(plan: Plan, given: Batch) -> dict[str, Tensor]:
    """Every tensor of a plan for one batch, by key, knobs at their first value."""
    values: dict[str, Any] = {f"batch.{name}": value for name, value in given.items()}
    values.update(Knobs(plan, torch.device("cpu")).at(Clock(0, 1, 1)))
    execute(plan.calls, values)
    return values


def forward(plan: Plan, given: Batch) -> tuple[Learner, Losses]:
    """One forward pass of both sides, with a graph."""
    knobs = Knobs(plan, torch.device("cpu")).at(Clock(0, 1, 1))
    learner = Learner(plan)
    return learner, learner(given, Teachers(plan)(given, knobs), knobs)
