"""kdx from Python: run a config with a person's own modules and data, or make one component to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdx.components import Dataset, Given, Network, Node
from kdx.config import load, load_mapping, overlay, parse_override
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
    _net: nn.Module | None = field(default=None, repr=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.result.best.test or self.result.best.val

    def student(self) -> Network:
        """The trained student in evaluation mode; it takes raw images in `0..1`."""
        return load_student(self.folder, self._net)


def run(
    config: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
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
    given = load(config) if isinstance(config, (str, Path)) else load_mapping(config)
    layers = [overrides] if isinstance(overrides, Mapping) else [parse_override(text) for text in overrides]
    for layer in layers:
        given = overlay(given, layer)
    networks = dict(models or {})
    for name, net in networks.items():
        if not isinstance(net, nn.Module):
            raise ConfigError(f"models[{name!r}]: found a {type(net).__name__}, expected a torch module")
    options = Options(fresh=fresh, quiet=quiet, data=_dataset(data), networks=networks)
    prepared = prepare(load_mapping(given), options)
    result = carry_out(prepared, options)
    return RunResult(prepared.folder, result, networks.get("student"))


def make(
    kind: str, name: str, *, shapes: Mapping[str, Any] | None = None, facts: DataFacts | None = None, **options: Any
) -> Any:
    """A component ready to call: `kdx.make("losses", "kd")(student=z_s, teacher=z_t, temperature=torch.tensor(2.0))`.

    `shapes` maps each input to the shape of one sample, for components that build modules from it; `facts` describe
    the data. Knobs take part as arguments of the call; those left out have their defaults. Raises `ConfigError` for a
    kind, name or option that does not exist.
    """
    if kind not in KINDS:
        raise ConfigError(f"make: no kind of component is called {kind!r}; {did_you_mean(kind, KINDS, what='kinds')}")
    component = discover().find(kind, name, "make").component
    config = read_options(component.Config, options, name)
    facts = facts or DataFacts(streams={})
    if issubclass(component, Node):
        return _Callable(component(config, Given(dict(shapes or {}), facts)))
    if kind == "models":
        streams = tuple(stream for stream, about in facts.streams.items() if about.kind != "label")
        return component(config, facts, streams or ("image",)).build()
    if kind == "metrics":
        return component(config, facts, torch.device("cpu"))
    return component(config)


class _Callable(nn.Module):
    """A node whose knobs default to what a config would give."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, **tensors: Any) -> Any:
        knobs = {name: torch.tensor(knob.default) for name, knob in self.node.knobs.items() if name not in tensors}
        absent = {name: None for name in self.node.inputs if name not in tensors and name != "like"}
        return self.node(**absent, **knobs, **tensors)


def _dataset(data: Any) -> Dataset | None:
    if data is None or isinstance(data, Dataset):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"data: found a {type(data).__name__}, expected a kdx.Dataset or a mapping of splits")
    from kdx.builtin.tensor_data import TensorDataset

    return TensorDataset.from_tensors(**data)
