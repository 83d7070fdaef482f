"""What a finished training found: the best and the last student, teachers and ensembles, on the test split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.agreement import agreements
from kdx.calls import Key, ModelCall, NodeCall
from kdx.checkpoint import STUDENT, checked_sum, load_weights
from kdx.data import View
from kdx.loop import Evaluation, Session, evaluate
from kdx.measure import measure
from kdx.result import Point, Result, Row, Seconds
from kdx.student import save_student
from kdx.taps import LOGITS
from kdx.types import Batch

Needs = Mapping[str, tuple[Path, Result]]


def conclude(
    session: Session,
    best_weights: Path,
    folder: Path,
    *,
    hash: str,
    needs: Needs,
    plain: tuple[Path, Result] | None,
    seconds: float,
) -> Result:
    """Evaluate the last and the best student once on the test split, keep the best, and sum the run up.

    The best epoch was chosen on the validation split; nothing is chosen here.
    """
    spec, splits = session.spec, session.splits
    assert session.last is not None
    assert session.best is not None
    last_test = _test(session, session.student.answer)
    if session.best["step"] != session.last["step"]:
        load_weights(session.student.net, best_weights, str(best_weights))
        best_test = _test(session, session.student.answer)
    else:
        best_test = last_test
    group, path = session.runtime.group, folder / STUDENT
    if group.leads:
        save_student(session.student, folder, session.plan, hash)
    group.wait()
    sample = {name: value[:1] for name, value in _first_batch(session).items()}
    phases = session.runtime.stopwatch.seconds()
    return Result(
        name=spec.root.shown_name,
        hash=hash,
        seed=spec.root.seed,
        status="finished",
        classes=list(splits.facts.classes),
        labelled=sum(label >= 0 for label in splits.facts.labels),
        seen=len(splits.train),
        best=_point(session.best, best_test),
        last=_point(session.last, last_test),
        confusion=_confusion(best_test),
        size=measure(session.student, sample, path),
        seconds=Seconds(
            teachers=phases.get("teachers", 0.0),
            student=phases.get("student", 0.0),
            data=phases.get("data", 0.0),
            evaluation=phases.get("evaluation", 0.0),
            total=seconds,
        ),
        teachers={name: _teacher_row(session, name, needs) for name in session.plan.teachers},
        targets={name: _evaluated(session, answer) for name, answer in _ensembles(session).items()},
        plain=None if plain is None else run_row(*plain),
        agreement=agreements(session),
        dropped=session.guard.dropped(),
        skipped=session.runtime.faults.skipped,
        student=checked_sum(path) or "",
    )


def _test(session: Session, answer: Callable[[Batch], Tensor]) -> Evaluation:
    if session.splits.test is None:
        return Evaluation({}, ())
    return evaluate(session, session.splits.test, answer)


def _numbers(session: Session, view: View | None, answer: Callable[[Batch], Tensor]) -> dict[str, float]:
    return {} if view is None else evaluate(session, view, answer).numbers


def _point(found: Mapping[str, Any], test: Evaluation) -> Point:
    return Point(found["epoch"], found["step"], dict(found["val"]), dict(test.numbers))


def _confusion(test: Evaluation) -> list[list[int]]:
    for metric in test.metrics:
        confusion = getattr(metric, "confusion", None)
        if confusion is not None:
            rows: list[list[int]] = confusion().tolist()
            return rows
    return []


def run_row(folder: Path, result: Result) -> Row:
    """What a finished run brings to the comparison."""
    best = result.best
    return Row(folder.name, result.labelled, best.epoch, best.test, best.val, result.last.test, result.size)


def _evaluated(session: Session, answer: Callable[[Batch], Tensor]) -> Row:
    test, val = (_numbers(session, view, answer) for view in (session.splits.test, session.splits.val))
    return Row(None, None, None, test, val, None, None)


def _teacher_row(session: Session, name: str, needs: Needs) -> Row:
    """A teacher that is a run brings its own numbers; any other is evaluated here."""
    if name in needs:
        return run_row(*needs[name])
    call = session.plan.teacher_models[name]
    answers = call.at_hand and session.plan.knows_classes(name)
    return _evaluated(session, call.answer) if answers else Row(None, None, None, {}, {}, None, None)


def _ensembles(session: Session) -> dict[str, Callable[[Batch], Tensor]]:
    """The teacher-side targets that give logits over the classes without looking at a label."""
    plan = session.plan
    found: dict[str, Callable[[Batch], Tensor]] = {}
    for call in plan.teacher_calls:
        if not isinstance(call, NodeCall) or call.kind != "targets" or _sees(call, "batch.label", session):
            continue
        if not all(model.at_hand for model in plan.teacher_models.values()):  # all of them run for an answer
            continue
        for key in call.gives:
            if key.endswith((f".{LOGITS}", ".out")) and plan.shapes[key] == (len(plan.facts.classes),):
                found[call.name] = _answer(session, key)
    return found


def _answer(session: Session, key: Key) -> Callable[[Batch], Tensor]:
    def answer(batch: Batch) -> Tensor:
        found: Tensor = session.teachers.answers(batch, session.knobs.at(session.clock))[key]
        return found

    return answer


def _sees(call: NodeCall, key: Key, session: Session) -> bool:
    """Whether a call reads a key, directly or through the calls that it reads."""
    makers = {made: maker for maker in session.plan.teacher_calls for made in maker.gives}
    for read in call.reads:
        if read == key:
            return True
        maker = makers.get(read)
        if isinstance(maker, NodeCall) and _sees(maker, key, session):
            return True
        if isinstance(maker, ModelCall) and key in maker.reads:
            return True
    return False


def _first_batch(session: Session) -> Batch:
    batch = session.splits.train.fetch([0])
    with torch.no_grad():
        return session.dataset.on_device(session.runtime.move(batch), None)
