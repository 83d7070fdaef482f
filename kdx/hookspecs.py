"""The hooks, in the order of a run.

Build-time hooks take no argument, are called once per run, and return component classes. Run-time hooks take exactly
one argument, which they must not change; what they return is ignored. There are no wrappers, no ordering marks and no
first-result hooks: data dependence orders nodes, and what must act before something else is a component.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kdx.components import Aligner, Dataset, Loss, Metric, Model, Schedule, Target
    from kdx.plan import Plan
    from kdx.types import EvalReport, RunInfo, StepReport
    from kdx.updater import Updater

hookspec = pluggy.HookspecMarker("kdx")


@hookspec
def kdx_datasets() -> list[type[Dataset]]:
    """Data sets, named by `data: {use: ...}`. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_models() -> list[type[Model]]:
    """Makers of networks, named by `student:` and `teachers:`. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_targets() -> list[type[Target]]:
    """Nodes on teacher outputs: ensembles, logit transforms, temperatures. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_aligners() -> list[type[Aligner]]:
    """Nodes that make a student tensor comparable to a teacher tensor. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_losses() -> list[type[Loss]]:
    """Loss terms, named by `losses:`. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_schedules() -> list[type[Schedule]]:
    """Schedules, named wherever a config takes a number that may move. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_metrics() -> list[type[Metric]]:
    """Evaluation metrics, named by `metrics:`. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_updaters() -> list[type[Updater]]:
    """Ways to turn terms into a change of weights, named by `train.updater`. Called when the registry is made."""
    raise AssertionError("a specification is never called")


@hookspec
def kdx_plan_ready(plan: Plan) -> None:
    """Called with each plan that is built: by `kdx explain`, before anything of a run is trained, and again with the
    trained teachers before the first update. May raise `PlanError` to refuse the run.
    """


@hookspec
def kdx_run_start(run: RunInfo) -> None:
    """Called once before the first update, also when a run is resumed."""


@hookspec
def kdx_step_end(report: StepReport) -> None:
    """Called after each update. Tensors in the report are on the device: reading them makes the host wait."""


@hookspec
def kdx_eval_end(report: EvalReport) -> None:
    """Called after each evaluation of the student, and at the end of an epoch for each target that shows something.

    The latter has `split == "train"`: its metrics are means over the epoch, and no scores.
    """


@hookspec
def kdx_run_end(run: RunInfo) -> None:
    """Called once after the last update, also when an exception leaves the loop."""
