"""kdx from Python: run a config with a person's own modules and data, or make one component to call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdx.components import OPTIONAL, Dataset, Given, Model, Network, Node
from kdx.config import load, load_mapping
from kdx.errors import ConfigError, did_you_mean
from kdx.options import read_options
from kdx.plugins import KINDS, discover
from kdx.result import Result
from kdx.runs import Options, carry_out, prepare
from kdx.student import load_student
from kdx.types import DataFacts


@dataclass(frozen=True)
class RunResult:
    """What a run left. `metrics` are those of the student at its best epoch, on the test split where there is one."""

    folder: Path
    result: Result
    _nets: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    _plugins: tuple[str, ...] = field(default=(), repr=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.result.best.test or self.result.best.val

    def student(self) -> Network:
        """The trained student in evaluation mode; it takes raw images in `0..1`."""
        return load_student(self.folder, copy.deepcopy(dict(self._nets)), plugins=self._plugins)


def run(
    config: str | Path | Mapping[str, Any],
    *,
    overrides: str | Sequence[str] | Mapping[str, Any] = (),
    models: Mapping[str, nn.Module] | None = None,
    data: Any = None,
    fresh: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Carry a run out, with all runs that it needs, and give its result.

    `config` is a file or a mapping; `overrides` are `key=value` texts or a mapping laid over it. `models` maps
    `student` or a teacher's name to a module that stands in for that section; the module itself stays as it is, and
    the trained one comes from `RunResult.student()`. `data` is a `kdx.Dataset`, a mapping of splits to tensors, or a
    mapping of splits to torch data sets of (input, label) pairs. Raises a `KdxError` for whatever does not fit.
    """
    layers = [overrides] if isinstance(overrides, (str, Mapping)) else overrides
    if isinstance(config, (str, Path)):
        given = load(config, layers)
    elif isinstance(config, Mapping):
        given = load_mapping(config, overrides=layers)
    else:
        raise ConfigError(f"config: found a {type(config).__name__}, expected the path of a file or a mapping")
    networks = dict(models or {})
    for name, net in networks.items():
        if not isinstance(net, nn.Module):
            raise ConfigError(f"models[{name!r}]: found a {type(net).__name__}, expected a torch module")
    options = Options(fresh=fresh, quiet=quiet, data=_dataset(data), networks=networks)
    prepared = prepare(given, options)
    result = carry_out(prepared, options)
    files = tuple(item for item in prepared.spec.root.plugins if item.endswith(".py"))
    return RunResult(prepared.folder, result, networks, files)


def make(
    kind: str,
    name: str,
    /,
    *,
    shapes: Mapping[str, Any] | None = None,
    facts: DataFacts | None = None,
    skeleton: bool = False,
    **options: Any,
) -> Any:
    """A component ready to call: `kdx.make("losses", "kd")(student=z_s, teacher=z_t, temperature=torch.tensor(2.0))`.

    `shapes` maps each input to the shape of one sample, for components that build modules from it; `facts` describe
    the data; a model made as a `skeleton` has no published weights. A knob may be given here as a number, or as an
    argument of the call; else it has its default. Raises `ConfigError` for a kind, name or option that does not exist,
    and for shapes that are needed and absent.
    """
    if kind not in KINDS:
        raise ConfigError(f"make: no kind of component is called {kind!r}; {did_you_mean(kind, KINDS, what='kinds')}")
    component = discover().find(kind, name, "make").component
    if facts is None and kind in ("models", "metrics"):
        raise ConfigError(f"make: {name} is made for the data that it will see; give facts=kdx.DataFacts(...)")
    facts = facts or DataFacts(streams={})
    if issubclass(component, Node):
        return _make_node(component, name, options, Given(dict(shapes or {}), facts))
    config = read_options(component.Config, options, name)
    if kind == "models":
        streams = tuple(stream for stream, about in facts.streams.items() if about.kind != "label")
        model: Model = component(config, facts, streams or ("image",))
        return model.skeleton() if skeleton else model.build()
    if kind == "metrics":
        return component(config, facts, torch.device("cpu"))
    return component(config)


def _make_node(component: type[Node], name: str, options: Mapping[str, Any], given: Given) -> _Callable:
    knobs = {key: options.get(key, knob.default) for key, knob in component.knobs.items()}
    for key, value in knobs.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        problem = component.knobs[key].problem(value) if number else "must be a number"
        if problem:
            raise ConfigError(f"{name}.{key}: found {value!r}; it {problem}")
    config = read_options(component.Config, {key: options[key] for key in options if key not in knobs}, name)
    try:
        return _Callable(component(config, given), knobs)
    except KeyError as error:
        if error.args[0] not in component.inputs:
            raise
        example = f"shapes={{{error.args[0]!r}: (10,), ...}}"
        raise ConfigError(f"{name}: it is built from the shapes of its inputs; give them, as in {example}") from error


class _Callable(nn.Module):
    """A node whose knobs have values unless a call gives others."""

    def __init__(self, node: Node, knobs: Mapping[str, float]) -> None:
        super().__init__()
        self.node = node
        self.knobs = dict(knobs)

    def forward(self, **tensors: Any) -> Any:
        needed = [name for name, spec in self.node.inputs.items() if spec is not OPTIONAL and name != "like"]
        if missing := [name for name in (*needed, *self.node.borrows) if name not in tensors]:
            raise TypeError(f"{self.node.name} is called without {', '.join(missing)}")
        knobs = {name: torch.tensor(float(value)) for name, value in self.knobs.items() if name not in tensors}
        absent = {name: None for name, spec in self.node.inputs.items() if spec is OPTIONAL and name not in tensors}
        return self.node(**absent, **knobs, **tensors)


def _dataset(data: Any) -> Dataset | None:
    if data is None or isinstance(data, Dataset):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"data: found a {type(data).__name__}, expected a kdx.Dataset or a mapping of splits")
    from kdx.builtin.tensor_data import TensorDataset

    known = inspect.signature(TensorDataset.from_tensors).parameters
    for key in data:
        if key not in known:
            raise ConfigError(f"data: {key!r} is no split or option; {did_you_mean(str(key), known)}")
    if "train" not in data:
        raise ConfigError("data: there is no split `train`")
    return TensorDataset.from_tensors(**data)
