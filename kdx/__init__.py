"""Knowledge distillation with several teachers and across modalities, built from plugins.

These are the public names. They are loaded when they are first used, so `import kdx` itself is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdx.api import RunResult as RunResult
    from kdx.api import make as make
    from kdx.api import run as run
    from kdx.authoring import among_present as among_present
    from kdx.authoring import check_choice as check_choice
    from kdx.authoring import check_classes as check_classes
    from kdx.authoring import check_same_classes as check_same_classes
    from kdx.authoring import check_teachers as check_teachers
    from kdx.authoring import confidence_weights as confidence_weights
    from kdx.authoring import hint_distances as hint_distances
    from kdx.authoring import over_labelled as over_labelled
    from kdx.authoring import pool_to_smaller as pool_to_smaller
    from kdx.authoring import precise as precise
    from kdx.authoring import soft_divergences as soft_divergences
    from kdx.authoring import through_stages as through_stages
    from kdx.components import OPTIONAL as OPTIONAL
    from kdx.components import REQUIRED as REQUIRED
    from kdx.components import Aligner as Aligner
    from kdx.components import Dataset as Dataset
    from kdx.components import Given as Given
    from kdx.components import Knob as Knob
    from kdx.components import Loss as Loss
    from kdx.components import Many as Many
    from kdx.components import Metric as Metric
    from kdx.components import Model as Model
    from kdx.components import Network as Network
    from kdx.components import Node as Node
    from kdx.components import Schedule as Schedule
    from kdx.components import Split as Split
    from kdx.components import Target as Target
    from kdx.components import hookimpl as hookimpl
    from kdx.components import per_sample as per_sample
    from kdx.distributed import gather as gather
    from kdx.errors import CheckpointError as CheckpointError
    from kdx.errors import ConfigError as ConfigError
    from kdx.errors import DataError as DataError
    from kdx.errors import KdxError as KdxError
    from kdx.errors import PlanError as PlanError
    from kdx.errors import PluginError as PluginError
    from kdx.fused import log_mixture as log_mixture
    from kdx.fused import soft_divergence as soft_divergence
    from kdx.fused_distance import squared_distance as squared_distance
    from kdx.plan import Plan as Plan
    from kdx.randomness import Randomness as Randomness
    from kdx.student import load_student as load_student
    from kdx.types import Batch as Batch
    from kdx.types import Clock as Clock
    from kdx.types import DataFacts as DataFacts
    from kdx.types import EvalReport as EvalReport
    from kdx.types import Losses as Losses
    from kdx.types import RunInfo as RunInfo
    from kdx.types import Shape as Shape
    from kdx.types import StepReport as StepReport
    from kdx.types import StreamFacts as StreamFacts
    from kdx.updater import Engine as Engine
    from kdx.updater import Updater as Updater

__version__ = "0.1.0"

_NAMES = {
    "kdx.api": ("RunResult", "make", "run"),
    "kdx.authoring": (
        "among_present", "check_choice", "check_classes", "check_same_classes", "check_teachers", "confidence_weights",
        "hint_distances", "over_labelled", "pool_to_smaller", "precise", "soft_divergences", "through_stages",
    ),
    "kdx.components": (
        "OPTIONAL", "REQUIRED", "Aligner", "Dataset", "Given", "Knob", "Loss", "Many", "Metric", "Model",
        "Network", "Node", "Schedule", "Split", "Target", "hookimpl", "per_sample",
    ),
    "kdx.distributed": ("gather",),
    "kdx.errors": ("CheckpointError", "ConfigError", "DataError", "KdxError", "PlanError", "PluginError"),
    "kdx.fused": ("log_mixture", "soft_divergence"),
    "kdx.fused_distance": ("squared_distance",),
    "kdx.plan": ("Plan",),
    "kdx.randomness": ("Randomness",),
    "kdx.student": ("load_student",),
    "kdx.types": (
        "Batch", "Clock", "DataFacts", "EvalReport", "Losses", "RunInfo", "Shape", "StepReport", "StreamFacts",
    ),
    "kdx.updater": ("Engine", "Updater"),
}  # fmt: skip
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
