"""One node with the tensors to try it on: the parts that `kdx.testing` makes its checks of."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from kdx.components import OPTIONAL, Aligner, Component, Given, Knob, Loss, Many, Node
from kdx.sections import NodeOptions
from kdx.types import DataFacts

RESERVED = {"use", "inputs", "borrows", "source", "like", *(item.name for item in fields(NodeOptions))}
CONFIDENCE = ("values", "code", "paper")
CLASSES = 5
FACTS = DataFacts(
    streams={},
    classes=tuple(f"class {k}" for k in range(CLASSES)),
    size=64,
    labels=tuple(k % CLASSES for k in range(64)),
)

Values = dict[str, Tensor]
"""The fields that a node gave; `out` for a plain tensor."""


class Trial:
    """Builds copies of one node and runs them on made-up inputs; every failure names the component.

    The prototype is never run, so a node that keeps state starts afresh in each check.
    """

    def __init__(
        self,
        node: type[Node] | Node,
        shapes: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module | Sequence[nn.Module]],
        options: Mapping[str, Any],
        batch: int,
    ) -> None:
        self.component: type[Node] = node if isinstance(node, type) else type(node)
        self.who = describe(self.component)
        check_declarations(self.component, self.who)
        self.batch = len(next(iter(tensors.values()))) if tensors else batch
        self.tensors = tensors
        self.modules = modules
        self.knobs = {name: knob.default for name, knob in self.component.knobs.items()}
        for name in [name for name in options if name in self.knobs]:
            self.knobs[name] = options[name]
            problem = self.component.knobs[name].problem(options[name])
            require(problem is None, self.who, f"the knob {name} = {options[name]} {problem}")
        rest = {name: value for name, value in options.items() if name not in self.knobs}
        if isinstance(node, type):
            self.config, self.facts = make_config(node, rest, self.who), FACTS
            self.refs: Mapping[str, Any] = {}
        else:
            require(not options, self.who, f"options {sorted(options)} go with a class, not with an instance")
            self.config, self.facts, self.refs = node.config, node.given.facts, node.given.refs
            shapes = shapes or node.given.shapes
        self.shapes = {name: self._shape(name, spec, shapes) for name, spec in self.component.inputs.items()}
        self.prototype = self.build(0) if isinstance(node, type) else copy.deepcopy(node)

    def build(self, seed: int) -> Node:
        """A node as the engine makes it, with weights that `seed` gives; the caller's random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shapes = {name: shape for name, shape in self.shapes.items() if shape is not None}
            return self.component(self.config, Given(shapes, self.facts, torch.Generator(), self.refs))

    def fresh(self) -> Node:
        return copy.deepcopy(self.prototype)

    def inputs(self, *, logit_scale: float = 1.0, born: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
        """Made-up inputs: normal numbers for features, `logit_scale` times that for logits, classes for labels."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: self.tensors[name].clone()
            if name in self.tensors
            else self._make(name, spec, logit_scale, born, generator)
            for name, spec in self.component.inputs.items()
        }

    def run(self, node: Node, inputs: Mapping[str, Any], *, knobs_per_sample: bool = False) -> Values:
        """What the node gives for these inputs, as named fields."""
        named = {name: value for name, value in inputs.items() if name != "like" or not isinstance(node, Aligner)}
        knobs = {
            name: torch.full((self.batch,), value) if knobs_per_sample else torch.tensor(value)
            for name, value in ((name, float(value)) for name, value in self.knobs.items())
        }
        try:
            result = node(**named, **knobs, **self.modules)
        except Exception as error:
            raise AssertionError(f"{self.who}: forward raised {type(error).__name__}: {error}") from error
        if self.component.outputs == ("out",):
            require(isinstance(result, Tensor), self.who, f"forward gave a {type(result).__name__}, expected a tensor")
            return {"out": result}
        found = sorted(result) if isinstance(result, Mapping) else type(result).__name__
        require(
            found == sorted(self.component.outputs),
            self.who,
            f"forward gave {found}, but declares outputs {sorted(self.component.outputs)}",
        )
        for name, value in result.items():
            require(isinstance(value, Tensor), self.who, f"{name} is a {type(value).__name__}, expected a tensor")
        return dict(result)

    def frozen_inputs(self) -> set[str]:
        """The inputs that come from teachers, and so must get no gradient from a loss."""
        return {
            name
            for name, spec in self.component.inputs.items()
            if name.startswith("teacher") or any(ref.startswith(("teacher.", "*.")) for ref in default_refs(spec))
        }

    def label_inputs(self) -> list[str]:
        return [name for name, spec in self.component.inputs.items() if spec == "batch.label"]

    def _shape(self, name: str, spec: Any, shapes: Mapping[str, Any]) -> Any:
        if name in shapes:
            found = shapes[name]
            is_list = all(isinstance(item, Sequence) for item in found) and len(found) > 0
            expected = "a list of shapes, one for each ref" if isinstance(spec, Many) else "one shape"
            require(
                is_list == isinstance(spec, Many), self.who, f"shapes[{name!r}]: found {found}, expected {expected}"
            )
            return [tuple(shape) for shape in found] if is_list else tuple(found)
        if name in self.tensors:
            return tuple(self.tensors[name].shape[1:])
        refs = default_refs(spec)
        if spec in ("batch.label", "batch.index"):
            return ()
        if refs and all(ref.endswith(".logits") for ref in refs):
            count = 3 if refs == ("*.logits",) else len(refs)
            return [(CLASSES,)] * count if isinstance(spec, Many) else (CLASSES,)
        require(spec is OPTIONAL, self.who, f"shapes: say the shape of one sample of the input {name!r}")
        return None

    def _make(self, name: str, spec: Any, scale: float, born: torch.dtype, generator: torch.Generator) -> Any:
        shape = self.shapes[name]
        if shape is None:
            return None
        if spec == "batch.index":
            return torch.arange(self.batch)
        if spec == "batch.label":
            return torch.randint(0, CLASSES, (self.batch,), generator=generator)
        is_logits = name == "logits" or any(ref.endswith(".logits") for ref in default_refs(spec))
        made = [
            (torch.randn(self.batch, *one, generator=generator) * (scale if is_logits else 1.0)).to(born).float()
            for one in (shape if isinstance(spec, Many) else [shape])
        ]
        return made if isinstance(spec, Many) else made[0]


def default_refs(spec: Any) -> tuple[str, ...]:
    """The refs that an input reads when the config names none."""
    if isinstance(spec, Many):
        return spec.default
    return (spec,) if isinstance(spec, str) else ()


def require(condition: bool, who: str, message: str) -> None:
    """Fail with a message that names the component, unless the condition holds."""
    if not condition:
        raise AssertionError(f"{who}: {message}")


def describe(component: type[Component]) -> str:
    return f"{component.name or '(no name)'} ({component.__module__}.{component.__qualname__})"


def make_config(component: type[Component], options: Mapping[str, Any], who: str) -> Any:
    known = {item.name for item in fields(component.Config)}
    unknown = sorted(set(options) - known)
    require(not unknown, who, f"it has no options {unknown}; its Config has {sorted(known)}")
    return component.Config(**options)


def check_config(component: type[Component], who: str) -> None:
    """A component has a name, and a Config that a config file can fill."""
    require(bool(component.name), who, "`name` is empty, so no config can name it")
    config = component.Config
    is_frozen = is_dataclass(config) and config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(is_frozen, who, "Config must be a dataclass(frozen=True)")
    try:
        OmegaConf.structured(config)
    except OmegaConfBaseException as error:
        raise AssertionError(f"{who}: a config file cannot fill its Config: {error}") from error


def check_declarations(component: type[Node], who: str) -> None:
    """What `forward` takes is what the class declares, and no name means two things."""
    check_config(component, who)
    marks = ("", *CONFIDENCE)
    require(component.confidence in marks, who, f"`confidence` is {component.confidence!r}, expected one of {marks}")
    options = {item.name for item in fields(component.Config)}
    inputs = set(component.inputs) - ({"like"} if issubclass(component, Aligner) else set())
    groups = {"inputs": inputs, "knobs": set(component.knobs), "borrows": set(component.borrows), "options": options}
    taken: dict[str, str] = dict.fromkeys(RESERVED - set(component.inputs), "the engine")
    if issubclass(component, Loss):
        taken["weight"] = "the engine"
    for group, names in groups.items():
        for name in sorted(names):
            require(name not in taken, who, f"the name {name!r} in its {group} is taken by {taken.get(name)}")
            taken[name] = f"its {group}"
    declared = inputs | set(component.knobs) | set(component.borrows)
    if component.gaps:
        many = isinstance(component.inputs.get(component.gaps), Many)
        require(many, who, f"gaps names {component.gaps!r}, expected one of its inputs of any number of refs")
        declared |= {"present"}
    parameters = list(inspect.signature(component.forward).parameters.values())[1:]
    for parameter in parameters:
        require(
            parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY),
            who,
            f"forward takes {parameter}, expected named parameters only",
        )
    taken_names = {parameter.name for parameter in parameters}
    undeclared, missing = sorted(taken_names - declared), sorted(declared - taken_names)
    require(not undeclared, who, f"forward takes {undeclared}, which are in none of inputs, knobs and borrows")
    require(not missing, who, f"it declares {missing}, which forward does not take")
    unknown = sorted(set(component.trains) - set(component.borrows))
    require(not unknown, who, f"it trains {unknown}, which are not in borrows")
    for name, knob in component.knobs.items():
        problem = knob.problem(knob.default) if isinstance(knob, Knob) else "must be a kdx.Knob"
        require(problem is None, who, f"the default of the knob {name} {problem}")


def check_gaps(trial: Trial, inputs: Mapping[str, Any], values: Values) -> None:
    """A node that declares `gaps` makes no use of what is absent, and none of a mask of what is all there."""
    name = trial.component.gaps
    count = len(inputs[name])
    everyone = torch.ones(trial.batch, count, dtype=torch.bool)
    whole = trial.run(trial.fresh(), {**inputs, "present": everyone})
    require(same_values(values, whole, exact=False), trial.who, "`present` changes the result though nothing is absent")
    present = torch.arange(trial.batch).unsqueeze(1) % (count + 1) != torch.arange(count)
    present[:, 0] |= ~present.any(1)
    moved = [torch.where(present[:, k].reshape(-1, *[1] * (x.ndim - 1)), x, x + 3) for k, x in enumerate(inputs[name])]
    found = [trial.run(trial.fresh(), {**inputs, name: one, "present": present}) for one in (inputs[name], moved)]
    require(
        same_values(*found, exact=False), trial.who, f"what is absent of {name!r} changes the result; see `present`"
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of an input: itself, or those of its list."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence):
        for item in value:
            yield from tensors_in(item)


def reindexed(inputs: Mapping[str, Any], order: Tensor) -> dict[str, Any]:
    """The inputs with their samples in another order."""
    return {
        name: [tensor[order] for tensor in value]
        if isinstance(value, list)
        else None
        if value is None
        else value[order]
        for name, value in inputs.items()
    }


def hidden_parameters(node: nn.Module) -> list[str]:
    """Attributes that hold parameters or modules where torch does not see them."""
    return [
        f"{prefix}{'.' if prefix else ''}{name}"
        for prefix, module in node.named_modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_modules", "_buffers") and _holds_weights(value)
    ]


def _holds_weights(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, nn.Module):
        return any(True for _ in value.parameters())
    if isinstance(value, Mapping):
        return any(_holds_weights(item) for item in value.values())
    return isinstance(value, list | tuple | set) and any(_holds_weights(item) for item in value)


def same_values(a: Values, b: Values, *, exact: bool) -> bool:
    rtol, atol = (0.0, 0.0) if exact else (1e-3, 1e-5)
    return all(a[name].shape == b[name].shape and torch.allclose(a[name], b[name], rtol, atol) for name in a)


def copies(value: Any, who: str) -> Iterator[tuple[str, Any]]:
    """Copies of an object by each way there is. A class inside of a function cannot be pickled by anybody."""
    ways: dict[str, Callable[[Any], Any]] = {"copy.deepcopy": copy.deepcopy}
    if "<locals>" not in type(value).__qualname__:
        ways["pickle"] = lambda original: pickle.loads(pickle.dumps(original))
    for way, duplicate in ways.items():
        try:
            yield way, duplicate(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise AssertionError(f"{who}: it cannot be copied by {way}: {error}") from error
