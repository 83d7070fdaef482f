"""Tries a call on two samples: the shapes of what it gives, and whether they are what its kind must give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdx.calls import Call, Key, ModelCall, NodeCall, Values
from kdx.components import Loss
from kdx.errors import KdxError, PlanError
from kdx.randomness import random_state, same_random_state
from kdx.types import Shape


def probe(call: Call, values: Values, shapes: dict[Key, Shape]) -> None:
    """Run a call on two samples without leaving a trace, and note the shapes of what it gives."""
    modules: list[nn.Module] = [call.module]
    generator = None
    if isinstance(call, NodeCall):
        _check_knobs(call, shapes)
        modules += [part.module for part in call.borrowed]
        generator = call.module.given.generator
    versions, random = _versions(call, values), random_state()
    with without_trace(*modules, generator=generator), torch.no_grad():
        try:
            if isinstance(call, ModelCall):
                call.protect(values)
            call.run(values)
        except KdxError as error:
            raise type(error)(f"{call.where}: {error}") from error
        except Exception as error:
            given = [key for key in dict.fromkeys(call.reads) if not key.startswith(f"{call.where}.")]
            listing = ", ".join(f"{key} {list(shapes[key])}" for key in given if key in shapes)
            label = call.label if isinstance(call, NodeCall) else call.where
            raise PlanError(f"{label} does not run on {listing}: {type(error).__name__}: {error}") from error
        draws = not same_random_state(random, random_state())
    if isinstance(call, NodeCall) and draws:
        raise PlanError(
            f"{call.label}: it draws from the global random numbers, as others do; expected those of given.generator, "
            "which has a seed of its own and goes on where it was after a resume"
        )
    for key, version in _versions(call, values).items():
        if version != versions[key]:
            label = call.label if isinstance(call, NodeCall) else call.where
            raise PlanError(f"{label}: it changed {key} in place, which others read; expected a new tensor")
    for key in call.gives:
        if key not in values:
            raise PlanError(f"{call.where}: its forward gave no {key.rpartition('.')[2]!r}, which it declares")
        value = values[key]
        if not isinstance(value, Tensor) or (value.ndim and value.shape[0] != 2):
            found = f"shape {list(value.shape)} for 2 samples" if isinstance(value, Tensor) else type(value).__name__
            raise PlanError(f"{call.where}: {key} has {found}; expected a 0-d tensor or one with the batch axis first")
        shapes[key] = shape_of(value)
    if isinstance(call, NodeCall):
        _check_result(call, shapes)


def _versions(call: Call, values: Values) -> dict[Key, int]:
    """How often each tensor that a call reads was written to."""
    return {key: values[key]._version for key in call.reads if isinstance(values.get(key), Tensor)}


def _check_knobs(call: NodeCall, shapes: Mapping[Key, Shape]) -> None:
    knobs = {name: call.arguments[name] for name in call.module.knobs}
    for name, key in {**knobs, "weight": call.weight}.items():
        if isinstance(key, str) and shapes.get(key, ()) != ():
            raise PlanError(
                f"{call.where}.{name}: {key} has shape {list(shapes[key])} per sample; a knob is one number"
            )


def _check_result(call: NodeCall, shapes: Mapping[Key, Shape]) -> None:
    if isinstance(call.module, Loss) and shapes[call.gives[0]] != ():
        raise PlanError(
            f"{call.label}: its term has shape {list(shapes[call.gives[0]])} per sample; expected one value per sample "
            "or the mean over the batch"
        )
    if call.kind == "align":
        like = call.module.given.shapes["like"]
        if shapes[call.gives[0]] != like:
            raise PlanError(
                f"{call.label}: gives {list(shapes[call.gives[0]])}, expected the shape of like {list(like)}"
            )


@contextmanager
def without_trace(*modules: nn.Module, generator: torch.Generator | None = None) -> Iterator[None]:
    """Put the buffers of the modules, the random state and a generator back afterwards."""
    everything = [part for module in modules for part in module.modules()]
    buffers = [(part, dict(part._buffers)) for part in everything]
    contents = [(buffer, buffer.clone()) for _, own in buffers for buffer in own.values() if buffer is not None]
    state = generator.get_state() if generator is not None else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for part, own in buffers:  # a bank that grows may have been replaced by another tensor
            part._buffers.clear()
            part._buffers.update(own)
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)
        if generator is not None and state is not None:
            generator.set_state(state)


def shape_of(value: Tensor) -> Shape:
    """The shape of one sample's part of a tensor."""
    return tuple(value.shape[1:])
