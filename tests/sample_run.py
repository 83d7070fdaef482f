"""Files of a finished run, as the engine leaves them: a student of two teachers that saw few of the labels."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

from kdx.history import EvalLine, StepLine, to_line
from kdx.measure import Size
from kdx.result import Metrics, Point, Result, Row, Seconds, write_result

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
EPOCHS, UPDATES = 12, 40


def metrics(accuracy: float) -> Metrics:
    return {
        "accuracy": accuracy,
        "macro_recall": accuracy - 0.0013,
        "macro_f1": accuracy - 0.0041,
        "calibration_error": 0.0473,
        "cross_entropy": 0.4212,
    }


def sample_result(seed: int = 0) -> Result:
    shift = 0.001 * seed
    wide = Row(
        "wide-1a2b",
        54000,
        18,
        metrics(0.9312),
        metrics(0.9355),
        metrics(0.93),
        Size(11173962, 557_000_000, 44_781_000, 21.31),
    )
    vit = Row(
        None, None, None, metrics(0.9127), metrics(0.9155), None, Size(5_526_346, 1_079_000_000, 22_210_000, 35.2)
    )
    both = Row(
        None, 54000, None, metrics(0.9391), metrics(0.9402), None, Size(16_700_308, 1_636_000_000, 66_991_000, 56.51)
    )
    small = Size(61706, 416_520, 251_000, 0.312)
    plain = Row("plain-3c4d", 600, 9, metrics(0.8014 - shift), metrics(0.8051), metrics(0.7967), small)
    confusion = [[0] * 10 for _ in range(10)]
    generator = random.Random(7)
    for row in range(10):
        confusion[row][row] = 820 + generator.randrange(100)
        rest = 1000 - confusion[row][row]
        for _ in range(rest):
            confusion[row][
                generator.choice([c for c in (row - 4, row + 2, row + 4, 6) if 0 <= c < 10 and c != row])
            ] += 1
    return Result(
        name="fashion-600",
        hash="9f8e7d6c5b4a",
        seed=seed,
        status="finished",
        classes=list(CLASSES),
        labelled=600,
        seen=54000,
        best=Point(11, 440, metrics(0.8433), metrics(0.8389 + shift)),
        last=Point(12, 480, metrics(0.8421), metrics(0.8375)),
        confusion=confusion,
        size=small,
        seconds=Seconds(81.2, 40.3, 9.8, 12.4, 151.7),
        teachers={"wide": wide, "vit": vit},
        targets={"committee": both},
        plain=plain,
    )


def write_history(folder: Path, top: float, *, with_steps: bool = True) -> None:
    generator = random.Random(str(top))
    lines: list[StepLine | EvalLine] = []
    for step in range(1, EPOCHS * UPDATES + 1):
        done = step / (EPOCHS * UPDATES)
        epoch = math.ceil(step / UPDATES)
        ce = 0.4 + 2 * math.exp(-6 * done) + generator.gauss(0, 0.05)
        kd = 0.9 + 4 * math.exp(-4 * done) + generator.gauss(0, 0.1)
        hint = 0.2 + math.exp(-3 * done) + generator.gauss(0, 0.02)
        terms = {"ce": ce, "kd": kd, "hint": hint, "total": 0.5 * ce + kd + (1 - done) * hint}
        knobs = {"losses.kd.temperature": 2 + 2 * done + generator.gauss(0, 0.1), "losses.hint.weight": 1 - done}
        if with_steps:
            lines.append(StepLine(step, epoch, 0.05 * (1 + math.cos(math.pi * done)), terms, knobs))
        if step % UPDATES == 0:
            accuracy = top - 0.5 * math.exp(-8 * done) - (0.0012 if epoch == EPOCHS else 0.0)
            lines.append(EvalLine(step, epoch, "val", "student", metrics(accuracy), epoch == EPOCHS - 1))
    (folder / "metrics.jsonl").write_text("".join(map(to_line, lines)), encoding="utf-8")


def write_run(runs: Path) -> Path:
    """The folder of a finished run under `runs`, the run of its plain student beside it."""
    folder, plain = runs / "fashion-600-9f8e", runs / "plain-3c4d"
    folder.mkdir(parents=True)
    plain.mkdir()
    write_result(folder, sample_result())
    write_history(folder, 0.8433)
    write_history(plain, 0.8051, with_steps=False)
    (folder / "config.yaml").write_text("name: fashion-600\nlosses:\n  kd: {use: soft_targets, temperature: 4.0}\n")
    (folder / "plan.txt").write_text(
        "teachers  wide.logits -> committee.logits\nlearner   student.logits -> losses.kd\n"
    )
    environment = {
        "python": "3.11.9",
        "libraries": {"torch": "2.14.1", "timm": "1.0.31"},
        "plugins": ["kdx.builtin", "kdx_logit"],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "student.safetensors").write_bytes(bytes(16))
    (folder / "checkpoint").mkdir()
    return folder


def bare(result: Result) -> Result:
    """The result of the same run without teachers, plain student, sizes and validation split."""
    point = dataclasses.replace(result.last, val={})
    return dataclasses.replace(
        result, teachers={}, targets={}, plain=None, size=None, best=point, last=point, confusion=[]
    )
