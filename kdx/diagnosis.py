"""What stops a run whose numbers went wrong: it reads what was found on the device and says where it began.

Nothing here is a part of an update. What is computed again is computed with the weights of before the fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdx.calls import Call, Key, NodeCall, Values
from kdx.errors import KdxError
from kdx.formats import counted
from kdx.guard import EVERY, NAMED
from kdx.nonfinite import Fault, all_finite, finite_names
from kdx.plan import Plan
from kdx.probe import without_trace
from kdx.reach import base_of
from kdx.shards import whole
from kdx.types import Batch, Clock

if TYPE_CHECKING:
    from kdx.loop import Session

DATA = "the data, "
_KEPT = "The checkpoint, if there is one, is of before that, and all of its numbers are finite"


def check_numbers(session: Session, *, weights: bool = False) -> None:
    """Raise `KdxError` for answers of teachers, losses or gradients that were nan or inf since the last call, and with
    `weights` for weights that are. Waits for the device.

    With `on_nonfinite: skip` such losses and gradients are counted, and refused where no update was left.
    """
    session.guard.check()
    faults = session.runtime.faults.take()
    in_a_row = session.runtime.faults.in_a_row
    if faults and not session.runtime.faults.skip:
        raise KdxError(f"{describe(session, faults[0])}; {_advice(session)}")
    if in_a_row >= EVERY:
        raise KdxError(
            f"on_nonfinite: 'skip' left out each of the last {in_a_row} updates, so nothing is learnt any more; "
            f"the first since update {session.step - in_a_row}: "
            f"{describe(session, faults[0])}"
        )
    if weights:
        state = whole(session.learner.state_dict())
        sound = {name: value for name, value in state.items() if name in session.sound}
        if not all_finite(sound.values()):
            bad = sorted(session.sound - finite_names(state))
            raise KdxError(
                f"after update {session.step} {len(bad)} weights and statistics are nan or inf, as {bad[0]}, though "
                f"losses and gradients were finite; expected finite numbers: lower train.lr. {_KEPT}"
            )


def describe(session: Session, fault: Fault) -> str:
    """Which term or gradient was bad in which update, for which samples, and what was the first bad number."""
    where, bad = f"in update {fault.step}", _bad_anywhere(session, fault)
    if bad:
        name, samples = next(iter(bad.items()))
        call = next(call for call in session.plan.loss_calls if call.name == f"losses.{name}")
        teachers = teachers_of(session.plan, call)
        reads = f", which reads {_listed(teachers, 'teachers.')}," if teachers else ""
        others = [f"losses.{other}" for other in bad if other != name]
        also = f", as did {_listed(others)}" if others else ""
        text = f"{call.label or call.where}{reads} gave nan or inf {where}{_samples(samples)}{also}"
    else:
        text = f"train: the gradient was nan or inf {where}, though every loss was finite"
    return f"{text}; {diagnose(session, fault.step)}"


def _bad_anywhere(session: Session, fault: Fault) -> dict[str, tuple[int, ...]]:
    """The terms that were bad on any process, with the samples of this one; all processes must ask."""
    names = [call.name.removeprefix("losses.") for call in session.plan.loss_calls]
    told = session.runtime.group.any([name in fault.terms for name in names])
    return {name: fault.terms.get(name, ()) for name, is_bad in zip(names, told, strict=True) if is_bad}


def diagnose(session: Session, step: int) -> str:
    """Compute an update again and say which number is the first that is nan or inf.

    At first without batch statistics and dropout, so that a sample cannot spoil the others; then as in training.
    """
    batch = session.feed.at(step - 1)
    knobs = session.knobs.at(Clock(step - 1, session.steps_per_epoch, session.steps))
    learner = session.learner
    weights = {name: weight.detach() for name, weight in learner.named_parameters()}
    if session.runtime.group.size > 1:
        return "started as one process, the run would say which number is the first"
    if session.sound & weights.keys() - finite_names(weights):
        return "the weights are not finite any more, so that its cause cannot be computed again"
    was = learner.training
    with without_trace(learner, session.teachers), session.runtime.autocast():
        _make_neutral(learner)
        try:
            for training in (False, True):
                learner.train(training)
                for name, value in _numbers(session, batch, knobs):
                    rows = _bad_rows(value)
                    if rows is not None and bool(rows.any()):
                        own = _samples(batch["index"][rows].tolist()) if not training or name.startswith(DATA) else ""
                        when = "" if not training else ", and only with the statistics of a whole batch or dropout"
                        return f"computed again, the first such number is in {name}{own}{when}"
            with torch.enable_grad():
                losses = learner(batch, session.teachers(batch, knobs), knobs)
                named = {name: weight for name, weight in learner.named_parameters() if weight.requires_grad}
                found = torch.autograd.grad(losses.total, [*named.values()], allow_unused=True)
        finally:
            learner.train(was)
    bad = [name for name, own in zip(named, found, strict=True) if own is not None and not bool(own.isfinite().all())]
    if bad:
        return f"computed again, all is finite but the gradients of {counted(len(bad), 'weight')}, as {bad[0]}"
    return "computed again, all is finite: random numbers or the precision of the run decide"


def _make_neutral(learner: nn.Module) -> None:
    """Take nan and inf out of statistics that the fault has reached."""
    for name, buffer in learner.named_buffers():
        if buffer.is_floating_point():
            neutral = 1.0 if name.endswith("var") else 0.0
            buffer.nan_to_num_(neutral, neutral, neutral)


def teachers_of(plan: Plan, call: Call) -> list[str]:
    """The frozen teachers whose answers a call reads, directly or through targets and aligners."""
    makers = {key: maker for maker in plan.calls for key in maker.gives}
    found: dict[str, None] = {}
    waiting, seen = [*call.reads], set[Key]()
    while waiting:
        key = waiting.pop(0)
        owner = base_of(key.partition(".")[0])
        if owner in plan.spec.teachers:
            found[owner] = None
        elif key in makers and key not in seen:
            waiting += makers[key].reads
        seen.add(key)
    return [*found]


def _numbers(session: Session, batch: Batch, knobs: Mapping[Key, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All numbers of an update in the order in which they are made, with the name of each."""
    yield from ((f"{DATA}batch.{name}", value) for name, value in batch.items())
    values: Values = {f"batch.{name}": value for name, value in batch.items()} | dict(knobs)
    given = session.teachers.answers(batch, knobs)
    for call in session.plan.teacher_calls:
        yield from ((_named(call, key), given[key]) for key in call.gives if key in given)
    values |= given
    with torch.no_grad():
        for call in session.plan.learner_calls:
            call.run(values)
            yield from ((_named(call, key), values[key]) for key in call.gives)
        with torch.autocast(session.runtime.device.type, enabled=False):
            for loss in session.plan.loss_calls:
                loss.run(values)
                yield _named(loss, loss.gives[0]), values[loss.gives[0]]


def _named(call: Call, key: Key) -> str:
    if not isinstance(call, NodeCall):
        return key
    return call.label if call.label.startswith(key) else f"{key} of {call.label}"


def _bad_rows(value: Tensor) -> Tensor | None:
    """[B] or 0-d, whether any number of a sample is nan or inf; None for whole numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return None
    bad = ~value.isfinite()
    return bad.flatten(1).any(1) if bad.ndim > 1 else bad


def _samples(samples: Sequence[int]) -> str:
    if not samples:
        return ""
    more = ", ..." if len(samples) > NAMED else ""
    return f" (batch.index {', '.join(map(str, sorted(samples)[:NAMED]))}{more})"


def _listed(names: Sequence[str], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}" for name in names)


def _advice(session: Session) -> str:
    precision = ", compute in fp32 or bf16 (runtime.precision)" if session.runtime.precision == "fp16" else ""
    return (
        f"expected finite numbers: lower train.lr, limit gradients with train.clip{precision}, or leave such updates "
        f"out with `on_nonfinite: skip`. {_KEPT}"
    )
