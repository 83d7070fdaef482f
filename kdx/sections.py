"""The sections of a config: their options, types and defaults."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any

ONLY = "only"
"""What names, in the metadata of an option, the one section whose parts may say it."""


@dataclass(frozen=True)
class TrainOptions:
    """The `train` section.

    Training lasts `epochs`, or `updates` optimizer steps. A batch of `batch` samples is worked off in `accumulate`
    parts, or in as few as have at most `micro_batch` samples; `auto` finds out when a run starts how few parts fit into
    memory. `evaluate` and `save` count epochs; within an epoch the state is saved `save_minutes` after the last time.
    `monitor` names the validation metric that picks the best epoch. An epoch is one pass over the training samples, or
    as many updates as `steps_per_epoch` says. Weight decay acts on matrices and kernels; with `decay_vectors` on
    vectors too, which are biases and norm scales.
    """

    epochs: float | None = None
    updates: int | None = None
    steps_per_epoch: int | None = None
    batch: int = 128
    accumulate: int = 1
    micro_batch: Any = None
    lr: Any = 0.05
    optimizer: dict[str, Any] = field(default_factory=dict)
    updater: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    decay_vectors: bool = False
    clip: float | None = None
    ema: float | None = None
    evaluate: int = 1
    save: int = 1
    save_minutes: float | None = 10.0
    monitor: str = "accuracy"
    minimise: bool = False
    calibration: int = 8


@dataclass(frozen=True)
class RuntimeOptions:
    """The `runtime` section: where and how a run computes. Only `precision` changes its numbers by more than rounding.

    `teacher_batching` says whether several frozen teachers are one call: those of one architecture a batched call of
    the nets, those that read the same streams one graph of their backend. `auto` times either way on a training batch
    when a run starts and says what it found (graphs with `backend: auto` alone), `always` and `never` do not ask.
    `backend` is what computes frozen teachers that name none of their own.

    `auto` for `device`, `precision`, `channels_last`, `compile` and `workers` leaves the choice to a measurement when a
    run starts; `runtime: auto` leaves all of these open, and `backend`. Without `device` a run computes on the first of
    GPU, MPS and CPU that is there.

    `parallel` says how several processes train together: `ddp` keeps all weights on each, `fsdp` spreads weights,
    gradients and the state of the optimizer over them; `auto` is `ddp` where there are several.
    """

    device: str | None = None
    precision: str = "fp32"
    channels_last: Any = False
    compile: Any = False
    workers: Any = 0
    threads: int | None = None
    eval_batch: int = 256
    teacher_batching: str = "auto"
    parallel: str = "auto"
    backend: str = "eager"


@dataclass(frozen=True)
class RootOptions:
    """The sections of a config.

    `name` is a part of the names of folders; `title` is what reports show in its place, and decides nothing else.
    `on_bad_teacher` says what a nan or inf in a frozen teacher's logits leads to: `refuse` ends the run and names
    teacher, update and samples; `drop` puts the mean of the other teachers' logits in its place for these samples, and
    counts them. `on_nonfinite` is about losses and gradients: `stop` ends the run and names loss, update and samples;
    `skip` leaves such updates out and counts them.
    """

    name: str = "run"
    title: str = ""
    seed: int = 0
    out: str = "runs"
    plugins: list[str] = field(default_factory=list)
    installed_plugins: bool = True
    baseline: bool = True
    on_bad_teacher: str = "refuse"
    on_nonfinite: str = "stop"
    data: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    align: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)

    @property
    def shown_name(self) -> str:
        """What the run is called in reports and tables."""
        return self.title or self.name


@dataclass(frozen=True)
class ModelOptions:
    """What every model section may say besides the options of its component.

    `input` names the streams that the model reads; `taps` gives names to inner tensors; `run` is a config whose
    finished student this model is; `checkpoint` a file of weights; a `trainable` teacher is a peer.

    The rest is for frozen teachers, and says how one computes: on a `device` of its own; with `offload: cpu` its
    weights lie in main memory and are on the device only while it runs, so that teachers take turns there; in a
    `precision` of its own, which is otherwise that of the run, or fp32 on another kind of device than the run's; by
    a `backend` (eager, folded, cuda_graph, compile, onnxruntime, openvino), where auto takes the fastest. With `cache`
    its answers are stored once and read in place of it. With `shard` its weights are spread over the processes of a
    run; on one process that changes nothing.
    """

    input: Any = None
    taps: dict[str, Any] = field(default_factory=dict)
    run: Any = None
    checkpoint: str | None = None
    trainable: bool = field(default=False, metadata={ONLY: "teachers"})
    device: str | None = field(default=None, metadata={ONLY: "teachers"})
    offload: str | None = field(default=None, metadata={ONLY: "teachers"})
    precision: str | None = field(default=None, metadata={ONLY: "teachers"})
    backend: str | None = field(default=None, metadata={ONLY: "teachers"})
    cache: Any = field(default=None, metadata={ONLY: "teachers"})
    shard: bool = field(default=False, metadata={ONLY: "teachers"})


@dataclass(frozen=True)
class NodeOptions:
    """What every node may say besides the options of its component: how its own parameters are trained, and whether the
    answers of a target are stored.

    `lr_scale` multiplies the learning rate; `weight_decay` stands in for that of `train`. With `cache` the answers of a
    target that learns nothing are stored once and read in place of it and of the teachers that it alone reads.
    """

    lr_scale: float = 1.0
    weight_decay: float | None = None
    cache: Any = field(default=None, metadata={ONLY: "targets"})


def options_of(schema: type[Any], section: str) -> list[Field[Any]]:
    """The options of a schema that the parts of a section may say."""
    return [item for item in fields(schema) if item.metadata.get(ONLY, section) == section]
