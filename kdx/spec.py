"""Gives a config its meaning: `check` turns a plain mapping into a `RunSpec`, or says what is wrong and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from kdx.cache_options import STORED, read_cache, split_views
from kdx.components import OPTIONAL, REQUIRED, Knob, Many, Node, Schedule
from kdx.data import SplitOptions
from kdx.errors import ConfigError, KdxError, did_you_mean
from kdx.optim import read_optimizer
from kdx.options import plain_options, read_options
from kdx.plugins import Entry, Registry
from kdx.ranges import AUTO, check_model, check_names, check_ranges, split_measured, with_parts
from kdx.sections import ModelOptions, NodeOptions, RootOptions, RuntimeOptions, TrainOptions, options_of
from kdx.types import Clock

KnobSpec = float | Schedule | str
"""A constant, a schedule, or a ref."""
OPTIMIZER = {"use": "sgd", "momentum": 0.9}
UPDATER = {"use": "plain"}
METRICS: dict[str, Any] = {"classification": {}}
"""What a config that leaves the section out gets."""
_MOMENTS = [Clock(step, 100, 40_000) for step in (0, 1, 100, 1_000, 10_000, 20_000, 39_999)]
"""Where a schedule is tried out before the length of training is known."""


@dataclass(frozen=True)
class ModelSpec:
    name: str
    where: str
    entry: Entry
    options: Any
    engine: ModelOptions

    @property
    def frozen(self) -> bool:
        return self.name != "student" and not self.engine.trainable

    @property
    def at_hand(self) -> bool:
        """Whether there is a net, and not a cache alone."""
        return bool(self.entry.component.name != STORED)


@dataclass(frozen=True)
class NodeSpec:
    """A target, aligner or loss. `inputs` maps a parameter to a ref, a tuple of refs (`Many`), or None (absent)."""

    name: str
    where: str
    entry: Entry
    options: Any
    inputs: Mapping[str, Any]
    knobs: Mapping[str, KnobSpec]
    borrows: Mapping[str, str | tuple[str, ...]]
    engine: NodeOptions = field(default_factory=NodeOptions)


@dataclass(frozen=True)
class Part:
    """A data set, metric or updater with its options."""

    name: str
    where: str
    entry: Entry
    options: Any


@dataclass(frozen=True)
class RunSpec:
    """A config that has been understood. `config` is the resolved mapping that it came from."""

    config: Mapping[str, Any]
    root: RootOptions
    train: TrainOptions
    runtime: RuntimeOptions
    lr: float | Schedule
    splits: SplitOptions
    data: Part
    views: Mapping[str, Part]
    updater: Part
    metrics: tuple[Part, ...]
    student: ModelSpec
    teachers: Mapping[str, ModelSpec]
    targets: Mapping[str, NodeSpec]
    align: Mapping[str, NodeSpec]
    losses: Mapping[str, NodeSpec]
    registry: Registry
    view_count: int | None = None
    measured: tuple[str, ...] = ()
    """The settings of `runtime` that a measurement decides; `runtime` holds what they are without one."""

    @property
    def models(self) -> dict[str, ModelSpec]:
        return {"student": self.student, **self.teachers}

    @property
    def nodes(self) -> dict[str, NodeSpec]:
        """Targets and aligners: what a ref can name besides models and the batch."""
        return {**self.targets, **self.align}


def check(config: Mapping[str, Any], registry: Registry) -> RunSpec:
    """Understand a resolved config; every `ConfigError` and `PluginError` starts with the path in the config."""
    if isinstance(config.get("runtime"), str):
        raise ConfigError(f"runtime: found {config['runtime']!r}, expected auto, or a mapping of options")
    root = read_options(RootOptions, config, "")
    train = read_options(TrainOptions, root.train, "train")
    runtime, measured = split_measured(read_options(RuntimeOptions, root.runtime, "runtime"))
    train = replace(train, optimizer=train.optimizer or OPTIMIZER, updater=train.updater or UPDATER)
    check_ranges(root, train, runtime)
    train = with_parts(train)
    read_optimizer(train.optimizer)
    if not root.losses:
        raise ConfigError("losses: there are none, so nothing would be learnt; add at least `ce: {use: cross_entropy}`")
    split_names = {item.name for item in fields(SplitOptions)}
    splits = read_options(SplitOptions, {key: root.data[key] for key in root.data if key in split_names}, "data")
    rest = {key: value for key, value in root.data.items() if key not in split_names and key != "views"}
    data = _part("datasets", "data", rest, "data", registry, extra={*split_names, "views"})
    view_count, named_views = split_views(root.data.get("views"))
    views = _views(named_views, rest, registry)
    updater = _part("updaters", "updater", train.updater, "train.updater", registry)
    metrics = tuple(
        _part("metrics", name, {"use": name, **_section(options, f"metrics.{name}")}, f"metrics.{name}", registry)
        for name, options in (root.metrics or METRICS).items()
    )
    lr = read_knob(train.lr, Knob(0.05, at_least=0.0), "train.lr", registry)
    if isinstance(lr, str):
        raise ConfigError(f"train.lr: found the ref {lr!r}, expected a number or a schedule")
    if not root.student:
        raise ConfigError("student: there is none; expected a model, as in `student: {use: timm, model: resnet18}`")
    student = _model("student", root.student, "student", registry)
    teachers = {name: _model(name, options, f"teachers.{name}", registry) for name, options in root.teachers.items()}
    targets = {name: _node("targets", name, options, registry) for name, options in root.targets.items()}
    align = {
        name: _node("align", name, {"use": "auto", **_section(options, f"align.{name}")}, registry)
        for name, options in root.align.items()
    }
    losses = {name: _node("losses", name, options, registry) for name, options in root.losses.items()}
    check_names(root)
    return RunSpec(
        config, root, train, runtime, lr, splits, data, views, updater, metrics, student, teachers, targets, align,
        losses, registry, view_count, measured,
    )  # fmt: skip


def read_knob(value: Any, knob: Knob, where: str, registry: Registry) -> KnobSpec:
    """A constant within the knob's range, a schedule, or a ref."""
    if isinstance(value, bool) or value is None:
        raise ConfigError(f"{where}: found {value!r}, expected a number, a schedule or a ref")
    if isinstance(value, (int, float)):
        problem = knob.problem(float(value))
        if problem:
            raise ConfigError(f"{where}: found {value!r}; it {problem}")
        return float(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        part = _part("schedules", "schedule", value, where, registry)
        try:
            schedule: Schedule = part.entry.component(part.options)
        except KdxError as error:
            raise type(error)(f"{where}: {error}") from error
        for clock in _MOMENTS:
            number = schedule.at(clock)
            if problem := knob.problem(number):
                raise ConfigError(
                    f"{where}: {part.entry.component.name} gives {number:g} after {clock.time:g} of {clock.epochs:g} "
                    f"epochs; it {problem}"
                )
        return schedule
    raise ConfigError(f"{where}: found {value!r}, expected a number, a schedule or a ref")


def split_use(options: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The component that a section names, and its other keys."""
    options = _section(options, where)
    use = options.pop("use", None)
    if not isinstance(use, str):
        raise ConfigError(f"{where}: it says no `use:`, so there is no telling which component is meant")
    return use, options


def full_config(spec: RunSpec) -> dict[str, Any]:
    """The config with every default filled in. It loads as the same run."""
    config = asdict(spec.root)
    config["data"] = {"use": spec.data.entry.component.name, **asdict(spec.splits), **plain_options(spec.data.options)}
    views: dict[str, Any] = {name: _view_options(view) for name, view in spec.views.items()}
    if spec.view_count is not None:
        views["count"] = spec.view_count
    if views:
        config["data"]["views"] = views
    config["student"] = _full_model(spec.student)
    config["teachers"] = {name: _full_model(model) for name, model in spec.teachers.items()}
    for section, nodes in (("targets", spec.targets), ("align", spec.align), ("losses", spec.losses)):
        config[section] = {name: _full_node(node) for name, node in nodes.items()}
    config["metrics"] = {
        part.name: {"use": part.entry.component.name, **plain_options(part.options)} for part in spec.metrics
    }
    updater = {"use": spec.updater.entry.component.name, **plain_options(spec.updater.options)}
    config["train"] = {**asdict(spec.train), "lr": knob_config(spec.lr), "updater": updater}
    config["runtime"] = {**asdict(spec.runtime), **dict.fromkeys(spec.measured, AUTO)}
    return config


def _view_options(view: Part) -> dict[str, Any]:
    """The options in which a view of the data may differ from the data."""
    return {
        key: value for key, value in plain_options(view.options).items() if key in view.entry.component.view_options
    }


def knob_config(knob: KnobSpec) -> Any:
    """A knob as a config says it."""
    return {"use": knob.name, **plain_options(knob.config)} if isinstance(knob, Schedule) else knob


def _full_model(model: ModelSpec) -> dict[str, Any]:
    return {"use": model.entry.component.name, **asdict(model.engine), **plain_options(model.options)}


def _full_node(node: NodeSpec) -> dict[str, Any]:
    inputs = {name: list(ref) if isinstance(ref, tuple) else ref for name, ref in node.inputs.items()}
    knobs = {name: knob_config(knob) for name, knob in node.knobs.items()}
    parts = {name: list(part) if isinstance(part, tuple) else part for name, part in node.borrows.items()}
    borrows = {"borrows": parts} if parts else {}
    options = plain_options(node.options)
    return {"use": node.entry.component.name, "inputs": inputs, **knobs, **options, **borrows, **asdict(node.engine)}


def _section(options: Any, where: str) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: found {options!r}, expected a mapping of options")
    return {str(key): value for key, value in options.items()}


def _part(kind: str, name: str, options: Any, where: str, registry: Registry, extra: set[str] | None = None) -> Part:
    use, rest = split_use(options, where)
    entry = registry.find(kind, use, f"{where}.use")
    schema = entry.component.Config
    for key in rest:
        known = {item.name for item in fields(schema)} | (extra or set())
        if key not in known:
            raise ConfigError(
                f"{where}.{key}: {use} (plugin {entry.plugin.name}) has no such option; "
                f"{did_you_mean(key, known, what='options')}"
            )
    return Part(name, where, entry, read_options(schema, rest, where, f" ({use}, plugin {entry.plugin.name})"))


def _views(views: Any, data: dict[str, Any], registry: Registry) -> dict[str, Part]:
    """Each view of a sample: the data set with some options of its own, as another augmentation."""
    found: dict[str, Part] = {}
    for name, options in _section(views, "data.views").items():
        where = f"data.views.{name}"
        if not name.isidentifier():
            raise ConfigError(f"{where}: {name!r} cannot be part of a ref; use letters, digits and underscores")
        own = _section(options, where)
        if "use" in own:
            raise ConfigError(f"{where}.use: a view is of the same data set; say only the options that differ")
        found[name] = _part("datasets", name, {**data, **own}, where, registry)
        able = found[name].entry.component.view_options
        for key in own:
            if key not in able:
                near = did_you_mean(key, able, what="views may differ in")
                raise ConfigError(f"{where}.{key}: it acts when a sample is read, so all its views share it; {near}")
    return found


def _model(name: str, options: Any, where: str, registry: Registry) -> ModelSpec:
    use, rest = split_use(options, where)
    entry = registry.find("models", use, f"{where}.use")
    own = {item.name for item in fields(ModelOptions)}
    engine = read_options(ModelOptions, {key: value for key, value in rest.items() if key in own}, where)
    check_model(engine, where)
    options = {key: value for key, value in rest.items() if key not in own}
    known = {item.name for item in fields(entry.component.Config)}
    for key in options:
        if key not in known:
            choices = known | {item.name for item in options_of(ModelOptions, where.partition(".")[0])}
            raise ConfigError(f"{where}.{key}: {use} has no such option; {did_you_mean(key, choices, what='options')}")
    who = f" ({use}, plugin {entry.plugin.name})"
    return ModelSpec(name, where, entry, read_options(entry.component.Config, options, where, who), engine)


def _node(section: str, name: str, options: Any, registry: Registry) -> NodeSpec:
    where = f"{section}.{name}"
    use, rest = split_use(options, where)
    kind = "aligners" if section == "align" else section
    entry = registry.find(kind, use, f"{where}.use")
    component: type[Node] = entry.component
    knobs = {**component.knobs, **({"weight": Knob(1.0)} if section == "losses" else {})}
    inputs = _section(rest.pop("inputs", {}), f"{where}.inputs")
    if section == "align":
        inputs |= {key: rest.pop(key) for key in ("source", "like") if key in rest}
    borrows = _section(rest.pop("borrows", {}), f"{where}.borrows")
    given_knobs = {key: rest.pop(key) for key in knobs if key in rest}
    own = {item.name for item in fields(NodeOptions)}
    engine = read_options(NodeOptions, {key: rest.pop(key) for key in own if key in rest}, where)
    if not engine.lr_scale >= 0 or not (engine.weight_decay or 0) >= 0:
        raise ConfigError(f"{where}: lr_scale and weight_decay are 0 or more")
    if read_cache(engine.cache, f"{where}.cache") is not None and section != "targets":
        raise ConfigError(f"{where}.cache: only the answers of teachers and targets are stored; leave it out")
    known = {item.name for item in fields(component.Config)}
    for key in rest:
        if key not in known:
            engine_reads = {item.name for item in options_of(NodeOptions, section)}
            ends = {"source", "like"} if section == "align" else set()
            choices = known | set(knobs) | engine_reads | ends | {"inputs"}
            raise ConfigError(
                f"{where}.{key}: {use} (plugin {entry.plugin.name}) has no such option; "
                f"{did_you_mean(key, choices, what='options')}"
            )
    for key in inputs:
        if key not in component.inputs:
            raise ConfigError(
                f"{where}.inputs.{key}: {use} reads no such input; {did_you_mean(key, component.inputs, what='inputs')}"
            )
    for key in borrows:
        if key not in component.borrows:
            raise ConfigError(
                f"{where}.borrows.{key}: {use} borrows no such part; {did_you_mean(key, component.borrows)}"
            )
    return NodeSpec(
        name,
        where,
        entry,
        read_options(component.Config, rest, where, f" ({use}, plugin {entry.plugin.name})"),
        {
            key: _read_input(inputs.get(key), spec, f"{where}.{'' if section == 'align' else 'inputs.'}{key}", use)
            for key, spec in component.inputs.items()
        },
        {
            key: read_knob(given_knobs.get(key, knob.default), knob, f"{where}.{key}", registry)
            for key, knob in knobs.items()
        },
        {
            key: _read_part(borrows.get(key, spec), spec, f"{where}.borrows.{key}")
            for key, spec in component.borrows.items()
        },
        engine,
    )


def _read_part(found: Any, spec: str | Many, where: str) -> str | tuple[str, ...]:
    if isinstance(spec, Many):
        parts = list(found.default) if isinstance(found, Many) else [found] if isinstance(found, str) else found
        if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"{where}: found {parts!r}, expected a list of parts of models, as in [student.fc]")
        return tuple(parts)
    if not isinstance(found, str):
        raise ConfigError(f"{where}: found {found!r}, expected a part of a model, as in student.fc")
    return found


def _read_input(found: Any, spec: Any, where: str, use: str) -> Any:
    if isinstance(spec, Many):
        found = list(spec.default) or None if found is None else found
        if found is None:
            raise ConfigError(f"{where}: {use} needs at least one ref here")
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not found or not all(isinstance(ref, str) for ref in found):
            raise ConfigError(f"{where}: found {found!r}, expected a list of refs")
        return tuple(found)
    if found is None:
        if spec is REQUIRED:
            raise ConfigError(f"{where}: {use} needs a ref here, as in student.mid")
        return None if spec is OPTIONAL else spec
    if not isinstance(found, str):
        raise ConfigError(f"{where}: found {found!r}, expected one ref, as in student.mid")
    return found
