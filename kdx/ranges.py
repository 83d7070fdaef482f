"""What the names and numbers of the engine's own sections may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdx.cache_options import read_cache
from kdx.errors import ConfigError
from kdx.sections import ModelOptions, RootOptions, RuntimeOptions, TrainOptions

PRECISIONS = ("fp32", "bf16", "fp16")
UNMEASURED: dict[str, Any] = {
    "device": None,
    "precision": "fp32",
    "channels_last": False,
    "compile": False,
    "workers": 0,
}
"""Settings that may be left to a measurement, in the order of the choice, and what they are without one."""
LONGEST_NAME = 200
"""Bytes of a name, as the names of folders have an end."""
AUTO, EAGER = "auto", "eager"
BACKENDS = (AUTO, EAGER, "folded", "cuda_graph", "compile", "onnxruntime", "openvino")
"""What may compute a frozen teacher."""


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
    if train.micro_batch not in (None, AUTO) and (type(train.micro_batch) is not int or train.micro_batch < 1):
        refuse("train.micro_batch", train.micro_batch, "a whole number from 1, auto, or null")
    if train.batch % train.accumulate:
        refuse("train.accumulate", train.accumulate, f"a divisor of train.batch ({train.batch})")
    for option in ("channels_last", "compile"):
        if not isinstance(getattr(runtime, option), bool):
            refuse(f"runtime.{option}", getattr(runtime, option), "true, false or auto")
    if type(runtime.workers) is not int or runtime.workers < 0:
        refuse("runtime.workers", runtime.workers, "0 or more, or auto")
    if not train.weight_decay >= 0:
        refuse("train.weight_decay", train.weight_decay, "0 or more")
    if train.save_minutes is not None and not train.save_minutes > 0:
        refuse("train.save_minutes", train.save_minutes, "a number above 0, or null")
    if train.clip is not None and not train.clip > 0:
        refuse("train.clip", train.clip, "a norm above 0")
    if train.ema is not None and not 0 < train.ema < 1:
        refuse("train.ema", train.ema, "a decay between 0 and 1")
    if runtime.precision not in PRECISIONS:
        refuse("runtime.precision", runtime.precision, f"one of {', '.join((AUTO, *PRECISIONS))}")
    if runtime.backend not in BACKENDS:
        refuse("runtime.backend", runtime.backend, f"one of {', '.join(BACKENDS)}")
    if runtime.teacher_batching not in ("auto", "never", "always"):
        refuse("runtime.teacher_batching", runtime.teacher_batching, "auto, never or always")
    for option in ("compile", "channels_last"):
        if runtime.teacher_batching == "always" and getattr(runtime, option):
            refuse("runtime.teacher_batching", "always", f"auto or never: stacked weights do not go with `{option}`")
    if root.on_bad_teacher not in ("refuse", "drop"):
        refuse("on_bad_teacher", root.on_bad_teacher, "refuse or drop")
    if root.on_nonfinite not in ("stop", "skip"):
        refuse("on_nonfinite", root.on_nonfinite, "stop or skip")
    if root.seed < 0:
        refuse("seed", root.seed, "0 or more")


def split_measured(runtime: RuntimeOptions) -> tuple[RuntimeOptions, tuple[str, ...]]:
    """The options as they are without a measurement, and the names of those that one is to decide."""
    names = [name for name in UNMEASURED if getattr(runtime, name) == AUTO]
    layouts = [name for name in names if name in ("channels_last", "compile")]
    if runtime.teacher_batching == "always" and layouts:
        raise ConfigError(
            f"runtime.{layouts[0]}: found 'auto' beside `teacher_batching: always`, whose stacked weights do not go "
            "with it; expected false"
        )
    return replace(runtime, **{name: UNMEASURED[name] for name in names}), tuple(names)


def parts_for(batch: int, micro_batch: int) -> int:
    """The least number of equal parts of a batch that hold at most `micro_batch` samples each."""
    return next(count for count in range(1, batch + 1) if batch % count == 0 and batch // count <= micro_batch)


def with_parts(train: TrainOptions) -> TrainOptions:
    """The options with `accumulate` as `micro_batch` implies it. Raises `ConfigError` where the two contradict."""
    if train.micro_batch is None:
        return train
    count = 1 if train.micro_batch == AUTO else parts_for(train.batch, train.micro_batch)
    if train.accumulate not in (1, count):
        raise ConfigError(
            f"train.accumulate: found {train.accumulate} beside train.micro_batch ({train.micro_batch}), which decides "
            "it; leave one of them out"
        )
    return replace(train, accumulate=count)


def check_model(model: ModelOptions, where: str) -> None:
    """Raise `ConfigError` for what only a frozen teacher may say, in the section of a model that is trained."""
    if where == "student" and model.trainable:
        raise ConfigError("student.trainable: the student is always trained; leave it out")
    for option in ("device", "offload", "precision", "backend"):
        found = getattr(model, option)
        if found is not None and (where == "student" or model.trainable):
            raise ConfigError(
                f"{where}.{option}: found {found!r}, but only frozen teachers have one of their own; what is trained "
                "follows the section `runtime`"
            )
    if read_cache(model.cache, f"{where}.cache") is not None and (where == "student" or model.trainable):
        raise ConfigError(f"{where}.cache: only frozen teachers give the same answer each time; leave it out")
    if model.shard and (where == "student" or model.trainable or model.device is not None or model.offload is not None):
        raise ConfigError(
            f"{where}.shard: found true, expected false: it is for frozen teachers that have no place of their own; "
            "what is trained is spread with `runtime.parallel: fsdp`"
        )
    if model.offload not in (None, "cpu"):
        raise ConfigError(f"{where}.offload: found {model.offload!r}, expected cpu")
    if model.backend not in (None, *BACKENDS):
        raise ConfigError(f"{where}.backend: found {model.backend!r}, expected one of {', '.join(BACKENDS)}")
    if read_cache(model.cache, f"{where}.cache") is not None and model.backend not in (None, EAGER, AUTO):
        raise ConfigError(
            f"{where}.backend: found {model.backend!r} beside `cache`, but what is stored is not computed; keep one"
        )
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
    if (
        not root.name.isprintable()
        or not 0 < len(root.name.encode("utf-8", "replace")) <= LONGEST_NAME
        or any(char in root.name for char in "/\\")
        or root.name.startswith((".", "~"))
    ):
        raise ConfigError(f"name: {root.name!r} cannot be a folder name")
