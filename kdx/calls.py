"""The steps of a compiled plan. A call reads tensors by key, runs one module, and puts its results under keys.

Keys are `owner.field` (`wide.mid`, `batch.label`, `tau.out`), the config path of a knob (`losses.kd.temperature`), or
`losses.kd` for the value of a term.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdx.components import Loss, Node
from kdx.errors import PlanError, PluginError
from kdx.presence import ALWAYS, Presence, held, masks_of, over_present, pick
from kdx.seats import Seat
from kdx.taps import Tapped, classifier_of
from kdx.types import Batch

Values = dict[str, Any]
Key = str


class Borrowed:
    """A part of a model that a node may call. Gradient flows to its input; to its weights only where it `trains`."""

    def __init__(self, module: nn.Module, *, trains: bool = False) -> None:
        self.module = module
        self.trains = trains

    def __call__(self, *inputs: Tensor) -> Tensor:
        module = self.module
        if not self.trains and any(parameter.requires_grad for parameter in module.parameters()):
            fixed = {name: parameter.detach() for name, parameter in module.named_parameters()}
            result: Tensor = torch.func.functional_call(module, fixed, inputs)
        else:
            result = module(*inputs)
        return result


def find_part(net: nn.Module, path: str, where: str) -> nn.Module:
    """The sub-module `path` of a net; `classifier` is what makes logits of an embedding in any net."""
    if path == "classifier" and (found := classifier_of(net)) is not None:
        return found
    try:
        return net.get_submodule(path)
    except AttributeError:
        raise PlanError(f"{where}: {type(net).__name__} has no part {path!r}") from None


@dataclass(frozen=True)
class ModelCall:
    """Runs a network on streams of the batch; `student@strong` is the student on the view `strong`.

    A model with a `seat` computes there. What it gives says nothing of samples without `presence`.
    """

    name: str
    where: str
    module: Tapped
    streams: Mapping[str, Key]
    gives: tuple[Key, ...]
    seat: Seat | None = None
    presence: Presence = ALWAYS

    @property
    def reads(self) -> tuple[Key, ...]:
        return tuple(self.streams.values())

    @property
    def at_hand(self) -> bool:
        """Whether there is a network that can be asked about any sample."""
        return True

    def batch(self, values: Values) -> Batch:
        """The streams that the network reads."""
        return {stream: values[key] for stream, key in self.streams.items()}

    def run(self, values: Values) -> None:
        batch, seat = self.batch(values), self.seat
        found = self.module(batch) if seat is None else seat.use(self.module, batch, self.module)
        for name, tensor in found.items():
            values[f"{self.name}.{name}"] = tensor if seat is None else seat.hand_over(tensor)

    def protect(self, values: Values) -> None:
        """Let the taps find out what they must clone."""
        batch = self.batch(values)
        if self.seat is None:
            self.module.protect(batch)
        else:
            self.seat.use(self.module, batch, self.module.protect)

    def answer(self, batch: Batch) -> Tensor:
        """What is evaluated of the network."""
        network = self.module.network
        if self.seat is None:
            return network.answer(batch)
        return self.seat.hand_over(self.seat.use(network, batch, network.answer))


@dataclass(frozen=True)
class NodeCall:
    """Runs a target, an aligner or a loss.

    `arguments` maps each parameter of `forward` to a key, a tuple of keys, or None; knobs are among them. `weight` is
    the key of a loss's weight; `parts` holds what is borrowed, a list where it is any number of parts. `presence` is
    that of all that it reads; `among` that of each ref of the input in which it copes with gaps; `by_mask` says how a
    loss leaves absent samples out.
    """

    name: str
    kind: str
    where: str
    module: Node
    arguments: Mapping[str, Key | tuple[Key, ...] | None]
    gives: tuple[Key, ...]
    parts: Mapping[str, Borrowed | list[Borrowed]] = field(default_factory=dict)
    weight: Key = ""
    label: str = ""
    presence: Presence = ALWAYS
    among: tuple[Presence, ...] = ()
    by_mask: bool = False
    _single: list[tuple[str, Key]] = field(init=False, repr=False, compare=False)
    _several: list[tuple[str, tuple[Key, ...]]] = field(init=False, repr=False, compare=False)
    _fixed: dict[str, Any] = field(init=False, repr=False, compare=False)
    """The arguments that are a tensor, those that are a list, and those that are the same in every batch."""

    def __post_init__(self) -> None:
        given = self.arguments.items()
        # Once and for all: no compiler follows a cached property.
        object.__setattr__(self, "_single", [(name, key) for name, key in given if key and isinstance(key, str)])
        object.__setattr__(self, "_several", [(name, key) for name, key in given if isinstance(key, tuple)])
        object.__setattr__(self, "_fixed", {**self.parts, **{name: None for name, key in given if key is None}})

    @property
    def reads(self) -> tuple[Key, ...]:
        masks = masks_of(self.presence) + tuple(key for one in self.among for key in masks_of(one))
        return (*_keys(self.arguments.values()), *((self.weight,) if self.weight else ()), *masks)

    @property
    def borrowed(self) -> tuple[Borrowed, ...]:
        """All borrowed parts, one after another."""
        return tuple(one for part in self.parts.values() for one in (part if isinstance(part, list) else [part]))

    def knobs(self) -> dict[str, Key]:
        """The keys of its knobs, and of the weight of a loss."""
        own = {name: self.arguments[name] for name in self.module.knobs} | {"weight": self.weight or None}
        return {name: key for name, key in own.items() if isinstance(key, str)}

    def inputs(self, values: Values) -> dict[str, Any]:
        """The arguments of `forward`."""
        arguments = {**self._fixed}
        for name, key in self._single:
            arguments[name] = values[key]
        for name, keys in self._several:
            arguments[name] = [values[one] for one in keys]
        if self.among:
            size = len(arguments[self.module.gaps][0])
            everyone = torch.ones(size, dtype=torch.bool, device=arguments[self.module.gaps][0].device)
            each = [everyone if one == ALWAYS else held(one, values) for one in self.among]
            arguments["present"] = torch.stack(each, 1)
        return arguments

    def seen(self, values: Values) -> dict[str, Any] | None:
        """The arguments of `calibrate`: those of the samples that are present, None where none is."""
        arguments = self.inputs(values)
        if self.presence == ALWAYS:
            return arguments
        rows = held(self.presence, values).nonzero().squeeze(1)
        return {name: pick(value, rows) for name, value in arguments.items()} if len(rows) else None

    def run(self, values: Values) -> None:
        arguments = self.inputs(values)
        try:
            if self.kind == "losses":
                for name, value in arguments.items():
                    arguments[name] = full_precision(value)
            if self.presence != ALWAYS and isinstance(self.module, Loss):
                present = held(self.presence, values)
                result: Any = over_present(self.module, arguments, present, by_mask=self.by_mask)
            else:
                result = self.module(**arguments)
        except Exception as error:
            error.add_note(f"in {self.label}")
            raise
        if isinstance(result, Tensor) or not isinstance(result, Mapping):  # to ask for a mapping takes long
            values[self.gives[0]] = result
            return
        for key in self.gives:
            if (name := key.rpartition(".")[2]) in result:
                values[key] = result[name]

    def check(self, values: Values) -> None:
        """Raise `PluginError` for a result that no other call could read, as it came in the midst of training."""
        index = values.get("batch.index")
        for key in self.gives:
            value = values.get(key)
            if not isinstance(value, Tensor):
                raise PluginError(f"{self.label}: {key} is {type(value).__name__}, expected a tensor")
            if not (ndim := value.ndim):
                continue
            several = ndim > 1 and self.kind == "losses"
            if several or (index is not None and value.shape[0] != index.shape[0]):
                wanted = "[B]" if self.kind == "losses" else "a tensor with the batch axis first"
                raise PluginError(
                    f"{self.label}: {key} has shape {list(value.shape)} for "
                    f"{'a batch' if index is None else len(index)} samples, expected 0-d or {wanted}"
                )


Call = ModelCall | NodeCall


def settings_of(call: NodeCall) -> dict[str, Any]:
    """What a call was made with, to make one of another class that runs the same node."""
    return {item.name: getattr(call, item.name) for item in fields(NodeCall) if item.init}


class StandIn(Protocol):
    """What answers in place of live models: it leaves in `values` all that its `calls` give, and says in which `way`.

    It is asked for training batches only; evaluation is of the models themselves.
    """

    @property
    def way(self) -> str: ...

    @property
    def calls(self) -> tuple[ModelCall, ...]: ...

    def run(self, values: Values) -> None: ...


def execute(calls: Sequence[Call], values: Values) -> None:
    """Run calls in order; each finds its inputs in `values` and leaves its results there."""
    for call in calls:
        call.run(values)
        if isinstance(call, NodeCall):
            call.check(values)


def weighted(
    calls: Iterable[NodeCall], values: Values, units: Container[Key] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each loss -> its term averaged over the batch, and the same times its weight, 0-d.

    Weights in `units` are 1 for good.
    """
    means: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for call in calls:
        name, term = call.name.removeprefix("losses."), values[call.gives[0]]
        means[name] = parts[name] = term.mean() if term.ndim else term
        if call.weight not in units:
            weight: Tensor = values[call.weight]
            parts[name] = (weight * term).mean() if weight.ndim else weight * means[name]
    return means, parts


def _keys(arguments: Iterable[Key | tuple[Key, ...] | None]) -> Iterable[Key]:
    for key in arguments:
        if isinstance(key, tuple):
            yield from key
        elif key:
            yield key


def full_precision(value: Any) -> Any:
    """A tensor or those of a list, in float32 where they have half of that."""
    if isinstance(value, list):
        return [full_precision(item) for item in value]
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
