"""How far a trained student answers as each of its teachers does."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.data import View
from kdx.loader import in_order
from kdx.loop import Session, evaluating
from kdx.result import Metrics
from kdx.types import Batch

Answer = Callable[[Batch], Tensor]


def agreements(session: Session) -> dict[str, dict[str, Metrics]]:
    """For each frozen teacher that tells the classes apart: split (`val`, `test`) -> `same_answer` and `kl`.

    `same_answer` is the share of samples on which student and teacher have the same most probable class, `kl` the mean
    of `KL(teacher || student)` in nats at temperature 1. The student is the one that the session holds.
    """
    plan = session.plan
    answers: dict[str, Answer] = {
        name: call.answer for name, call in plan.teacher_models.items() if call.at_hand and plan.knows_classes(name)
    }
    found: dict[str, dict[str, Metrics]] = {name: {} for name in answers}
    for split, view in (("val", session.splits.val), ("test", session.splits.test)):
        if view is not None and answers:
            for name, metrics in _compare(session, view, answers).items():
                found[name][split] = metrics
    return {name: splits for name, splits in found.items() if splits}


@torch.no_grad()
def _compare(session: Session, view: View, answers: dict[str, Answer]) -> dict[str, Metrics]:
    runtime, group, size = session.runtime, session.runtime.group, session.spec.runtime.eval_batch
    sums = {name: torch.zeros(2, device=runtime.device) for name in answers}
    with runtime.stopwatch.phase("evaluation"), evaluating(session.learner):
        for batch in group.over(in_order(view, size, session.spec.runtime.workers, group.share), len(view), size):
            batch = session.dataset.on_device(runtime.move(batch), None)
            with runtime.autocast():
                student = group.gather(session.student.answer(batch).float())
                given = {name: group.gather(answer(batch).float()) for name, answer in answers.items()}
            for name, teacher in given.items():
                sums[name] += torch.stack(compared(student, teacher))
    numbers = {name: (both / len(view)).tolist() for name, both in sums.items()}
    return {name: {"same_answer": same, "kl": kl} for name, (same, kl) in numbers.items()}


def compared(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the answers are the same, and the sum of `KL(teacher || student)`, of logits [B, K]; 0-d."""
    same = (student.argmax(1) == teacher.argmax(1)).float().sum()
    divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)
    return same, divergence
