"""What can be refused before anything trains, besides what the plan refuses."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from kdx.backends import check_backends, computed_eagerly, named_graphs
from kdx.batched import check_batching
from kdx.calls import ModelCall, NodeCall
from kdx.checkpoint import load_weights
from kdx.components import Dataset
from kdx.data import Splits
from kdx.errors import ConfigError, did_you_mean
from kdx.loop import make_metric, make_session
from kdx.plan import Plan
from kdx.reach import base_of
from kdx.recall import IdleCall
from kdx.runtime import Runtime
from kdx.seats import seat_of
from kdx.taps import LOGITS

PROBED = 8
"""How many samples are enough to learn the names of the metrics."""


def check_ready(plan: Plan, dataset: Dataset, splits: Splits, runtime: Runtime) -> None:
    """Do once all that precedes training: find devices, read checkpoints, name the best metric, make the optimizer.

    The plan is one without weights, and of no use afterwards. Raises a `KdxError` for whatever does not fit.
    """
    for name, call in plan.teacher_models.items():
        seat_of(plan.spec.models[name].engine, runtime.device, call.where)
    check_backends(plan, runtime.device)
    check_batching(plan, computed_eagerly(plan), graphs=bool(named_graphs(plan, plan.teacher_calls)))
    check_checkpoints(plan)
    check_whole_batches(plan)
    check_monitor(plan, dataset, splits)
    make_session(plan.spec, plan, dataset, splits, runtime)


def check_whole_batches(plan: Plan) -> None:
    """Raise `ConfigError` where batches are split for a node that needs the whole of each."""
    parts = plan.spec.train.accumulate
    for call in plan.calls:
        if parts > 1 and isinstance(call, NodeCall) and call.module.whole_batch:
            raise ConfigError(
                f"{call.where}: {type(call.module).name} needs all samples of a batch at once, but train.accumulate or "
                f"train.micro_batch splits it into {parts} parts; expected 1"
            )


def check_checkpoints(plan: Plan) -> None:
    """Put the weights that `checkpoint` names into the models of a plan."""
    for call in plan.calls:
        if isinstance(call, ModelCall):
            model = plan.spec.models[base_of(call.name)]
            if model.engine.checkpoint is not None and not isinstance(call, IdleCall):
                load_weights(call.module.network.net, Path(model.engine.checkpoint), f"{model.where}.checkpoint")


def check_monitor(plan: Plan, dataset: Dataset, splits: Splits) -> None:
    """Raise `ConfigError` where `train.monitor` is no number of the metrics, which a few samples tell."""
    view, monitor = splits.val, plan.spec.train.monitor
    if view is None:
        return
    chosen = range(len(view)) if view.labels is None else (view.labels >= 0).nonzero()[:, 0].tolist()
    batch = dataset.on_device(view.fetch([*chosen][:PROBED]), None)
    shape = plan.shapes.get(f"student.{LOGITS}", (len(plan.facts.classes),))
    values = {"student.logits": torch.zeros(len(batch["index"]), *shape)}
    values |= {f"batch.{name}": value for name, value in batch.items()}
    numbers: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a metric may find so few samples strange
        for part in plan.spec.metrics:
            metric = make_metric(part, plan.facts, torch.device("cpu"))
            metric.update(**{name: values[key] for name, key in metric.inputs.items()})
            numbers |= metric.compute()
    if monitor not in numbers:
        raise ConfigError(f"train.monitor: no metric is named {monitor!r}; {did_you_mean(monitor, numbers)}")
