"""`train.micro_batch: auto`: into how many parts a batch is split so that an update fits into memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdx.calls import NodeCall
from kdx.errors import ConfigError, KdxError
from kdx.formats import counted
from kdx.memory import TRAINING, is_out_of_memory, out_of_memory
from kdx.modules import generators
from kdx.probe import without_trace
from kdx.ranges import AUTO, parts_for
from kdx.types import Batch, Losses

if TYPE_CHECKING:
    from kdx.loop import Session


def fit(session: Session, known: int | None) -> tuple[str, ...]:
    """Decide into how many parts a batch is split, by trying an update with ever more of them; gives what to say of it.

    A run that goes on takes what it began with (`known`). Nothing is left of the tries. Raises `KdxError` where not
    even one sample at a time fits, or where a node needs the whole batch, `ConfigError` for several processes.
    """
    if session.spec.train.micro_batch != AUTO:
        return ()
    if session.runtime.group.size > 1:
        raise ConfigError("train.micro_batch: found 'auto', expected a number where several processes train together")
    nodes = [call.module for call in session.plan.calls if isinstance(call, NodeCall)]
    batch = session.spec.train.batch
    most = 1 if any(node.whole_batch for node in nodes) else batch
    session.accumulate = known or 1
    while known is None and (problem := _problem(session)) is not None:
        if session.accumulate == most:
            raise KdxError(out_of_memory(session, TRAINING, problem))
        session.accumulate = parts_for(batch, batch // (2 * session.accumulate) or 1)
    if session.accumulate == 1:
        return ()
    count = session.accumulate
    line = f"train.micro_batch: {counted(batch // count, 'sample')} at once, {count} times for an update"
    apart = sees_the_batch(session)
    return (
        line,
        *([f"train.micro_batch: {', '.join(apart)} see one micro-batch, not the whole batch"] if apart else []),
    )


def sees_the_batch(session: Session) -> list[str]:
    """What does not give for a batch the mean of what it gives for its halves: losses that compare samples or draw
    random numbers, and batch norm.
    """
    batch = _samples(session, 4)
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    with _no_trace(session, training=False), torch.no_grad():
        whole, first, second = (_forward(session, part) for part in (batch, *halves))
        means = {name: (_mean(first.terms[name]) + _mean(second.terms[name])) / 2 for name in whole.terms}
    names = [
        f"losses.{name}" for name, term in whole.terms.items()
        if not torch.allclose(_mean(term), means[name], rtol=1e-3, atol=1e-5)
    ]  # fmt: skip
    normed = any(isinstance(module, _BatchNorm) for module in session.learner.models.modules())
    return [*names, *(["batch norm"] if normed else [])]


def _problem(session: Session) -> str | None:
    """What an out-of-memory error of an update said; None where it fits."""
    batch = _samples(session, session.loader.size)
    size = -(-session.loader.size // session.accumulate)
    trained = sum(weight.nbytes for weight in session.runtime.parameters() if weight.requires_grad)
    copies = 2 + (len(session.plan.loss_calls) if session.updater.eager else 0)
    found: str | None = None
    try:
        with _no_trace(session, training=True):
            # What an optimizer will keep, and the gradients that an updater takes apart.
            held = torch.empty(copies * trained, dtype=torch.uint8, device=session.runtime.device)
            losses = _forward(session, {name: value[:size] for name, value in batch.items()})
            session.runtime.backward(losses.total)
            del held, losses
            session.runtime.wait()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = str(error).split(". ")[0]
    session.runtime.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if session.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _samples(session: Session, count: int) -> Batch:
    """So many training samples on the device, again and again the same where there are fewer."""
    size = len(session.splits.train)
    return session.feed.plain(session.splits.train.fetch([i % size for i in range(count)]))


def _forward(session: Session, batch: Batch) -> Losses:
    knobs = session.knobs.at(session.clock)
    with session.runtime.autocast():
        losses: Losses = session.learner(batch, session.teachers(batch, knobs), knobs)
    return losses


@contextmanager
def _no_trace(session: Session, *, training: bool) -> Iterator[None]:
    """Put all state of the learner and of targets back afterwards."""
    learner: nn.Module = session.learner
    was = learner.training
    random = [(generator, generator.get_state()) for generator in generators(session.plan).values()]
    try:
        with without_trace(learner, session.teachers.nodes):
            learner.train(training)
            yield
    finally:
        learner.train(was)
        for generator, state in random:
            generator.set_state(state)


def _mean(term: Tensor) -> Tensor:
    return term.mean() if term.ndim else term
