"""What a plain supervised run needs, registered like any other plugin."""

from __future__ import annotations

from kdx.components import Aligner, Dataset, Loss, Metric, Model, Schedule, hookimpl
from kdx.updater import Updater


@hookimpl
def kdx_datasets() -> list[type[Dataset]]:
    from kdx.builtin.images import DATASETS

    return DATASETS


@hookimpl
def kdx_models() -> list[type[Model]]:
    from kdx.builtin.models import MODELS

    return MODELS


@hookimpl
def kdx_aligners() -> list[type[Aligner]]:
    from kdx.builtin.aligners import ALIGNERS

    return ALIGNERS


@hookimpl
def kdx_losses() -> list[type[Loss]]:
    from kdx.builtin.losses import LOSSES

    return LOSSES


@hookimpl
def kdx_schedules() -> list[type[Schedule]]:
    from kdx.builtin.schedules import SCHEDULES

    return SCHEDULES


@hookimpl
def kdx_metrics() -> list[type[Metric]]:
    from kdx.builtin.metrics import METRICS

    return METRICS


@hookimpl
def kdx_updaters() -> list[type[Updater]]:
    from kdx.builtin.updaters import UPDATERS

    return UPDATERS
