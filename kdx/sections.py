"""The sections of a config: their options, types and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainOptions:
    """The `train` section.

    Training lasts `epochs`, or `updates` optimizer steps. A batch of `batch` samples is worked off in `accumulate`
    parts. `evaluate` and `save` count epochs; `monitor` names the validation metric that picks the best epoch. An
    epoch is one pass over the training samples, or as many updates as `steps_per_epoch` says. Weight decay acts on
    matrices and kernels; with `decay_vectors` on vectors too, which are biases and norm scales.
    """

    epochs: float | None = None
    updates: int | None = None
    steps_per_epoch: int | None = None
    batch: int = 128
    accumulate: int = 1
    lr: Any = 0.05
    optimizer: dict[str, Any] = field(default_factory=dict)
    updater: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    decay_vectors: bool = False
    clip: float | None = None
    ema: float | None = None
    evaluate: int = 1
    save: int = 1
    monitor: str = "accuracy"
    minimise: bool = False
    calibration: int = 8


@dataclass(frozen=True)
class RuntimeOptions:
    """The `runtime` section: where and how a run computes. Only `precision` may change its numbers."""

    device: str = "auto"
    precision: str = "auto"
    channels_last: bool = False
    compile: bool = False
    workers: int = 0
    threads: int | None = None
    eval_batch: int = 256


@dataclass(frozen=True)
class RootOptions:
    """The sections of a config."""

    name: str = "run"
    seed: int = 0
    out: str = "runs"
    plugins: list[str] = field(default_factory=list)
    installed_plugins: bool = True
    baseline: bool = True
    data: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    align: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelOptions:
    """What every model section may say besides the options of its component.

    `input` names the streams that the model reads; `taps` gives names to inner tensors; `run` is a config whose
    finished student this model is; `checkpoint` a file of weights; a `trainable` teacher is a peer.
    """

    input: Any = None
    taps: dict[str, Any] = field(default_factory=dict)
    run: Any = None
    checkpoint: str | None = None
    trainable: bool = False


@dataclass(frozen=True)
class NodeOptions:
    """What every node may say besides the options of its component: how its own parameters are trained.

    `lr_scale` multiplies the learning rate; `weight_decay` stands in for that of `train`.
    """

    lr_scale: float = 1.0
    weight_decay: float | None = None
