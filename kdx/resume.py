"""The state of training: what a checkpoint holds, and how a session takes it up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdx.errors import CheckpointError
from kdx.loop import Session
from kdx.modules import generators
from kdx.runtime_choice import settings
from kdx.shards import spread_optimizer, spread_state, whole
from kdx.ways import ways


def training_state(session: Session, seconds: float) -> dict[str, Any]:
    """All that an interrupted run needs to go on as if nothing had happened."""
    return {
        "step": session.step,
        "learner": whole(session.learner.state_dict()),
        "targets": session.teachers.nodes.state_dict(),
        "optimizer": whole(session.runtime.optimizer.state_dict()),
        "runtime": session.runtime.state(),
        "updater": session.updater.state_dict(),
        "average": None if session.average is None else session.average.model.state_dict(),
        "generators": {name: generator.get_state() for name, generator in _generators(session).items()},
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "best": session.best,
        "last": session.last,
        "phases": session.runtime.stopwatch.seconds(),
        "seconds": seconds,
        "tally": session.tally.state(),
        "guard": session.guard.state(),
        "faults": session.runtime.faults.state(),
        "accumulate": session.accumulate,
        "teacher_ways": ways(session),
        "settings": settings(session.spec),
    }


def restore(session: Session, state: Mapping[str, Any], where: str) -> None:
    """Put a session where `training_state` was taken. Raises `CheckpointError` for the state of another run."""
    try:
        _load(session.learner, spread_state(state["learner"], session.learner))
        _load(session.teachers.nodes, state["targets"])
        optimizer = session.runtime.optimizer
        optimizer.load_state_dict(spread_optimizer(state["optimizer"], optimizer))
        session.runtime.refresh()
        session.runtime.load_state(state["runtime"])
        _load(session.updater, state["updater"])
        if session.average is not None:
            _load(session.average.model, state["average"])
        for name, generator in _generators(session).items():
            generator.set_state(state["generators"][name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        for name, seconds in state["phases"].items():
            session.runtime.stopwatch.add(name, seconds)
        session.guard.load_state(state["guard"])
        session.runtime.faults.load_state(state["faults"])
        session.tally.load_state(state["tally"], session.runtime.device)
        session.step, session.best, session.last = state["step"], state["best"], state["last"]
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the state in {where} is of another run ({error}); start afresh with --fresh") from error


def _generators(session: Session) -> dict[str, torch.Generator]:
    return {**generators(session.plan), "train.updater": session.updater.given.generator}


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As `load_state_dict`, also for banks that grow: a buffer takes the size that it had."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            saved = state.get(f"{prefix}.{name}" if prefix else name)
            if saved is not None and saved.shape != buffer.shape:
                part.register_buffer(name, buffer.new_empty(saved.shape))
    module.load_state_dict(state)
