"""Who is compared in a run, what each saw, and what the student gained: the facts behind every table and sentence."""

from __future__ import annotations

from dataclasses import dataclass

from kdx.formats import percent, points, whole
from kdx.measure import Size
from kdx.result import Metrics, Result, Row


@dataclass(frozen=True)
class Standing:
    """One line of a comparison. `role` is `teacher`, `ensemble`, `plain student`, `distilled student` or `student`."""

    role: str
    name: str
    labelled: int | None
    epoch: int | None
    test: Metrics
    size: Size | None


@dataclass(frozen=True)
class Gain:
    """Distilled minus plain test accuracy as fractions; None where one of the two is not known."""

    best: float | None
    last: float | None


def standings(result: Result) -> list[Standing]:
    """Teachers, ensembles, the plain student and the student itself, each at its best epoch."""
    return [
        *(_standing("teacher", name, row) for name, row in result.teachers.items()),
        *(_standing("ensemble", name, row) for name, row in result.targets.items()),
        *([] if result.plain is None else [_standing("plain student", "", result.plain)]),
        Standing(student_role(result), "", result.labelled, result.best.epoch, result.best.test, result.size),
    ]


def student_role(result: Result) -> str:
    """What the trained network is called: it is distilled only if something taught it."""
    return "distilled student" if result.teachers or result.targets else "student"


def gain(result: Result) -> Gain:
    """What the teachers added to the student's test accuracy, at the best and at the last epoch of each."""
    plain = result.plain
    if plain is None:
        return Gain(None, None)
    return Gain(
        _difference(result.best.test, plain.test),
        None if plain.last_test is None else _difference(result.last.test, plain.last_test),
    )


def label_sentences(result: Result) -> list[str]:
    """How many labels the student, the plain student and the teachers saw, and what that means for a gain."""
    plain, seen = result.plain, result.seen
    sentences = [f"The student saw {_labels(result.labelled, seen)}."]
    if plain is not None and plain.labelled == result.labelled:
        sentences[0] = f"The student, distilled or plain, saw {_labels(result.labelled, seen)}."
    elif plain is not None:
        sentences.append(
            f"The plain student saw {_labels(plain.labelled, seen)}, "
            "so the two students differ in more than the teachers and their difference is not the gain of distillation."
        )
    if result.teachers:
        sentences.append(f"{_teachers(result)}.")
        counts = [row.labelled for row in result.teachers.values()]
        carries = "carries" if any(count is not None and count > result.labelled for count in counts) else "may carry"
        if carries == "carries" or None in counts:
            sentences.append(
                f"A gain over the plain student therefore also {carries} labels that only the teachers saw: "
                "it is the value of having these teachers, not of the method alone."
            )
    return sentences


def gain_sentence(result: Result) -> str | None:
    """Distilled minus plain in words, or None if there is nothing to compare."""
    found, plain = gain(result), result.plain
    if plain is None or found.best is None:
        return None
    sentence = (
        f"Distilled minus plain on the test split: {points(found.best)} at the best epoch "
        f"({percent(result.best.test['accuracy'])} against {percent(plain.test['accuracy'])})"
    )
    if found.last is not None and plain.last_test is not None:
        sentence += (
            f" and {points(found.last)} at the last epoch "
            f"({percent(result.last.test['accuracy'])} against {percent(plain.last_test['accuracy'])})"
        )
    return f"{sentence}. This is one seed, and one seed concludes little: repeat the run with `--seeds 0,1,2`."


def _standing(role: str, name: str, row: Row) -> Standing:
    return Standing(role, name, row.labelled, row.best_epoch, row.test, row.size)


def _difference(distilled: Metrics, plain: Metrics) -> float | None:
    if "accuracy" not in distilled or "accuracy" not in plain:
        return None
    return distilled["accuracy"] - plain["accuracy"]


def _labels(count: int | None, seen: int) -> str:
    if count is None:
        return "an unknown number of labels"
    if count == seen:
        return f"the labels of all {whole(seen)} training samples"
    if count > seen:  # a teacher that had more images
        return f"the labels of {whole(count)} training samples"
    return f"the labels of {whole(count)} of {whole(seen)} training samples"


def _teachers(result: Result) -> str:
    counts = {row.labelled for row in result.teachers.values()}
    if len(counts) == 1:
        who = "The teacher" if len(result.teachers) == 1 else "The teachers"
        return f"{who} saw {_labels(counts.pop(), result.seen)}"
    each = ", ".join(f"`{name}` {_labels(row.labelled, result.seen)}" for name, row in result.teachers.items())
    return f"The teachers saw different numbers of labels: {each}"
