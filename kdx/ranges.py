"""What the names and numbers of the engine's own sections may be."""

from __future__ import annotations

from typing import Any

from kdx.errors import ConfigError
from kdx.sections import ModelOptions, RootOptions, RuntimeOptions, TrainOptions

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def check_ranges(root: RootOptions, train: TrainOptions, runtime: RuntimeOptions) -> None:
    """Raise `ConfigError` for a number or a word of the engine's own sections that is out of its range."""

    def refuse(where: str, found: Any, expected: str) -> None:
        raise ConfigError(f"{where}: found {found!r}, expected {expected}")

    if (train.epochs is None) == (train.updates is None):
        raise ConfigError("train: say how long, with either `epochs` or `updates`")
    if train.epochs is not None and not 0 < train.epochs < float("inf"):
        refuse("train.epochs", train.epochs, "a number above 0")
    for where, value in {
        "train.updates": train.updates,
        "train.steps_per_epoch": train.steps_per_epoch,
        "train.batch": train.batch,
        "train.accumulate": train.accumulate,
        "train.evaluate": train.evaluate,
        "train.save": train.save,
        "train.calibration": train.calibration,
        "runtime.threads": runtime.threads,
        "runtime.eval_batch": runtime.eval_batch,
    }.items():
        if value is not None and value < 1:
            refuse(where, value, "a whole number from 1")
    if train.batch % train.accumulate:
        refuse("train.accumulate", train.accumulate, f"a divisor of train.batch ({train.batch})")
    if runtime.workers < 0:
        refuse("runtime.workers", runtime.workers, "0 or more")
    if not train.weight_decay >= 0:
        refuse("train.weight_decay", train.weight_decay, "0 or more")
    if train.clip is not None and not train.clip > 0:
        refuse("train.clip", train.clip, "a norm above 0")
    if train.ema is not None and not 0 < train.ema < 1:
        refuse("train.ema", train.ema, "a decay between 0 and 1")
    if runtime.precision not in PRECISIONS:
        refuse("runtime.precision", runtime.precision, f"one of {', '.join(PRECISIONS)}")
    if runtime.teacher_batching not in ("auto", "never", "always"):
        refuse("runtime.teacher_batching", runtime.teacher_batching, "auto, never or always")
    for option in ("compile", "channels_last"):
        if runtime.teacher_batching == "always" and getattr(runtime, option):
            refuse("runtime.teacher_batching", "always", f"auto or never: stacked weights do not go with `{option}`")
    if root.on_bad_teacher not in ("refuse", "drop"):
        refuse("on_bad_teacher", root.on_bad_teacher, "refuse or drop")
    if root.seed < 0:
        refuse("seed", root.seed, "0 or more")


def check_model(model: ModelOptions, where: str) -> None:
    """Raise `ConfigError` for what only a frozen teacher may say, in the section of a model that is trained."""
    if where == "student" and model.trainable:
        raise ConfigError("student.trainable: the student is always trained; leave it out")
    for option in ("device", "offload", "precision"):
        found = getattr(model, option)
        if found is not None and (where == "student" or model.trainable):
            raise ConfigError(
                f"{where}.{option}: found {found!r}, but only frozen teachers have one of their own; what is trained "
                "follows the section `runtime`"
            )
    if model.offload not in (None, "cpu"):
        raise ConfigError(f"{where}.offload: found {model.offload!r}, expected cpu")
    if model.precision not in (None, *PRECISIONS):
        raise ConfigError(f"{where}.precision: found {model.precision!r}, expected one of {', '.join(PRECISIONS)}")


def check_names(root: RootOptions) -> None:
    """Raise `ConfigError` for a name that refs could not use, that is taken twice, or that cannot be a folder."""
    owners: dict[str, str] = {"student": "student", "batch": "the batch", "losses": "the section of losses"}
    for section in ("teachers", "targets", "align"):
        for name in getattr(root, section):
            where = f"{section}.{name}"
            if not name.isidentifier():
                raise ConfigError(f"{where}: {name!r} cannot be part of a ref; use letters, digits and underscores")
            if name in owners:
                raise ConfigError(f"{where}: the name {name!r} is taken by {owners[name]}; refs would be ambiguous")
            owners[name] = where
    for name in root.losses:
        if not name.isidentifier():
            raise ConfigError(f"losses.{name}: {name!r} is no valid name; use letters, digits and underscores")
    if not root.name or any(char in root.name for char in "/\\\0") or root.name.startswith("."):
        raise ConfigError(f"name: {root.name!r} cannot be a folder name")
