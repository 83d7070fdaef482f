"""Every feature method between every two families of nets: it trains with no number typed, or says why it cannot."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from builders import VIT, batch, forward, plan_of

import kdx
from kdx.config import overlay
from kdx.plan import Plan

METHODS = (
    "fitnet", "ab", "ofd", "at", "nst", "cwd", "fsp", "vid", "review_kd", "semckd", "srrl", "vkd", "srd", "itrd", "ft",
    "diffkd", "mgd", "vitkd",
)  # fmt: skip


def timm(model: str, size: int | None = None, **args: Any) -> dict[str, Any]:
    return {"use": "timm", "model": model, "size": size, "args": args}


NETS: dict[str, dict[str, Any]] = {
    "resnet": timm(
        "resnet18", layers=[1, 1, 1, 1], channels=[8, 12, 16, 24], stem_width=8, output_stride=8
    ),
    "vit": overlay(VIT, {"args": {"depth": 4}}),
    "convnext": timm("convnext_atto", 32, depths=[1, 1, 1, 1], dims=[8, 12, 16, 24]),
    "swin": timm(
        "swin_tiny_patch4_window7_224", img_size=28, patch_size=2, window_size=7, embed_dim=16, depths=[1, 1],
        num_heads=[2, 4],
    ),
    "mixer": timm("mlp_mixer.MlpMixer", img_size=28, patch_size=7, num_blocks=4, embed_dim=24),
    "efficientnet": timm("test_efficientnet"),
    "mobilenet": timm("mobilenetv3_small_050"),
}  # fmt: skip


def plan(student: str, teacher: str, *methods: str) -> Plan:
    losses: dict[str, Any] = {"ce": None, **{method: {"use": method} for method in methods}}
    config = {"student": NETS[student], "teachers": {"t": NETS[teacher]}, "losses": losses}
    return plan_of({"student": None}, config, sample=batch(2))


@functools.cache
def depths(kind: str) -> dict[int, kdx.Shape]:
    """The shape of a net's map by relative depth."""
    names = [f"student.depth_{depth}" for depth in (8, 16, 25, 50, 75, 100)]
    toy = {"use": "at", "inputs": {"student": names, "teacher": names}}
    made = plan_of({"student": None}, {"student": NETS[kind], "losses": {"ce": None, "at": toy}})
    return {int(name.rpartition("_")[2]): made.shapes[name] for name in names}


def places(shape: kdx.Shape) -> int:
    return shape[1] * shape[2]


REFUSALS: dict[str, tuple[Callable[[dict[int, kdx.Shape], dict[int, kdx.Shape]], bool], str]] = {
    "fsp": (
        lambda s, t: [s[depth][0] for depth in (25, 50, 75, 100)] != [t[depth][0] for depth in (25, 50, 75, 100)],
        "fsp compares channel pairs, but the channels .* differ; `project: true`",
    ),
    "cwd": (
        lambda s, t: 1 in (places(s[100]), places(t[100])),
        r"cwd compares the places of maps .* is \[\d+, 1, 1\]; tap an earlier stage",
    ),
    "vitkd": (
        lambda s, t: any(s[depth][1:] != t[depth][1:] for depth in (8, 16, 100)),
        "vitkd matches places one to one, but student .*; use nets with the same grid",
    ),
}
"""Where a method is not defined: when, by the maps of both nets, and how it says so."""


def refusal(student: str, teacher: str, method: str) -> str | None:
    """What is said where a method is not defined between two nets, None where it is."""
    when, message = REFUSALS.get(method, (lambda s, t: False, ""))
    return f"losses.{method}: {message}" if when(depths(student), depths(teacher)) else None


def check_joins(student: str, teacher: str, methods: Sequence[str]) -> None:
    """All methods in one plan, which takes a tenth of the time of a plan for each: the gradient of each by itself."""
    made = plan(student, teacher, *methods)
    learner, losses = forward(made, batch(2))
    weights = dict(learner.named_parameters())
    own = {id(weight) for weight in learner.student.parameters()}
    assert set(losses.parts) == set(methods)
    for method, part in losses.parts.items():
        assert part.isfinite(), method
        gradients = torch.autograd.grad(part, [*weights.values()], retain_graph=True, allow_unused=True)
        found = [(weight, gradient) for weight, gradient in zip(weights.values(), gradients, strict=True)
                 if gradient is not None]  # fmt: skip
        assert all(gradient.isfinite().all() for _, gradient in found), method
        assert any(id(weight) in own and gradient.any() for weight, gradient in found), method


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pair if set(pair) == {"resnet", "vit"} else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(NETS, NETS)
    ],
)
def test_every_method_joins_any_two_families_or_says_why_not(student: str, teacher: str) -> None:
    said = {method: refusal(student, teacher, method) for method in METHODS}
    check_joins(student, teacher, [method for method, message in said.items() if message is None])
    for method, message in said.items():
        if message is not None:
            with pytest.raises(kdx.PlanError, match=message):
                plan(student, teacher, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_alone_joins_convolutions_and_tokens_or_says_why_not(method: str) -> None:
    if (message := refusal("resnet", "vit", method)) is not None:
        with pytest.raises(kdx.PlanError, match=message):
            plan("resnet", "vit", method)
    else:
        check_joins("resnet", "vit", [method])


def test_each_method_with_a_condition_is_refused_and_runs_somewhere() -> None:
    for when, _ in REFUSALS.values():
        found = {when(depths(student), depths(teacher)) for student, teacher in itertools.product(NETS, NETS)}
        assert found == {True, False}


def test_flow_between_any_channels_needs_one_word() -> None:
    config = {"losses": {"it": {"use": "fsp", "project": True}}}
    made = plan_of({"student": None}, {"student": NETS["resnet"], "teachers": {"t": NETS["vit"]}, **config})
    assert made.shapes["losses.it"] == ()
