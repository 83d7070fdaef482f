"""Facts of `kdx/loop.py`: what an update is, when it is evaluated, and which epoch is the best."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_plugin import made_images
from small_run import DISTIL, PLAIN, STATEFUL, Seen, registry, session_of
from torch import Tensor, nn

import kdx
from kdx.components import Split
from kdx.data import View
from kdx.group import split
from kdx.loop import Session, Watchers, evaluate, highest, length, train
from kdx.types import Batch, Clock, EvalReport

ROOT = Path(kdx.__file__).parent


class ByHand:
    """A distillation step written out: cross-entropy, soft targets at temperature 2, and a hint through an aligner."""

    def __init__(self, session: Session, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        self.student = copy.deepcopy(session.learner.student.network.net)
        self.teacher = copy.deepcopy(session.plan.teachers["wide"].network.net)
        self.aligner = copy.deepcopy(session.learner.nodes["align/mid"])
        for net in (self.student, self.teacher):
            for module in net.modules():
                module._forward_hooks.clear()
        self.trained = [*self.student.parameters(), *self.aligner.parameters()]
        self.optimizer = optimizer(self.trained, **options)

    def loss(self, batch: Batch, weight: float) -> Tensor:
        with torch.no_grad():
            teacher_mid = self.teacher.second(self.teacher.first(batch["image"]))
            teacher = self.teacher.head(teacher_mid.mean((2, 3)))
        mid = self.student.second(self.student.first(batch["image"]))
        student = self.student.head(mid.mean((2, 3)))
        labelled = batch["label"] >= 0
        ce = F.cross_entropy(student[labelled], batch["label"][labelled])
        p = F.softmax(teacher / 2, dim=1)
        kd = (p * (p.log() - F.log_softmax(student / 2, dim=1))).sum(1).mean() * 4
        hint = F.mse_loss(self.aligner(source=mid), teacher_mid)
        return ce + weight * kd + 0.5 * hint

    def step(self, batch: Batch, weight: float, lr: float, clip: float | None = None) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = self.loss(batch, weight)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.trained, clip)
        self.optimizer.step()
        return loss.item()

    def compare(self, session: Session, tolerance: float = 1e-6) -> None:
        own = session.learner.student.network.net.state_dict()
        for name, value in self.student.state_dict().items():
            torch.testing.assert_close(own[name], value, rtol=tolerance, atol=tolerance)
        for found, wanted in zip(
            session.learner.nodes["align/mid"].parameters(), self.aligner.parameters(), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def all_batches(session: Session) -> list[Batch]:
    """The batches of a whole training."""
    found = []
    while session.step < session.steps:
        found.append(session.feed.at(session.step))
        session.step += 1
    return found


OPTIMIZERS: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": ({"use": "sgd", "momentum": 0.9}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": ({"use": "adamw", "betas": [0.8, 0.9]}, torch.optim.AdamW,
              {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.0}),
}  # fmt: skip
LR = {"use": "cosine", "peak": 0.05}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_equals_a_step_written_by_hand(name: str, clip: float | None) -> None:
    config = {"train": {"optimizer": OPTIMIZERS[name][0], "lr": LR, "clip": clip}, "data": {"labelled": 20}}
    session = session_of(DISTIL, config)
    hand = ByHand(session, OPTIMIZERS[name][1], **OPTIMIZERS[name][2])
    planned = all_batches(session_of(DISTIL, config))
    seen = Seen(session)
    assert len(planned) == 6
    assert any((batch["label"] < 0).any() for batch in planned)
    for i, (batch, report) in enumerate(zip(planned, seen.steps, strict=True)):
        lr = 0.05 * (1 + math.cos(math.pi * i / 6)) / 2
        assert report.lr == pytest.approx(lr, rel=1e-6)
        total = hand.step(batch, 1.0 - i / 6, lr, clip)
        assert report.numbers()["total"] == pytest.approx(total, rel=1e-5)
    hand.compare(session)


def test_one_backward_pass_gives_the_gradients_of_the_step_written_by_hand() -> None:
    session = session_of(DISTIL)
    hand = ByHand(session, torch.optim.SGD, lr=0.1)
    batch, knobs = all_batches(session_of(DISTIL))[0], session.knobs.at(session.clock)
    session.learner(batch, session.teachers(batch, knobs), knobs).total.backward()
    hand.loss(batch, 1.0).backward()
    own = dict(session.learner.student.network.net.named_parameters())
    for name, parameter in hand.student.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-5, atol=1e-7)


def trained_with(accumulate: int, *, clip: float | None = None) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Without batch norm, which sees the parts of a batch, and without a mean over labelled samples only."""
    session = session_of(
        DISTIL,
        {"student": {"norm": False}, "losses": {"ce": None}, "train": {"accumulate": accumulate, "clip": clip}},
    )
    seen = Seen(session)
    return session.learner.state_dict(), [report.numbers() for report in seen.steps]


@pytest.mark.parametrize("clip", [None, 0.3])
def test_accumulation_changes_nothing_but_rounding(clip: float | None) -> None:
    whole, numbers = trained_with(1, clip=clip)
    parts, others = trained_with(4, clip=clip)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
    for one, other in zip(numbers, others, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_a_batch_that_does_not_divide_is_weighted_by_the_size_of_its_parts() -> None:
    batch = {**made_images(10, 3), "index": torch.arange(10)}
    parts = split(batch, 4)
    assert [len(part["index"]) for part in parts] == [3, 3, 3, 1]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)


def test_a_set_smaller_than_a_batch_is_one_short_batch() -> None:
    session = session_of(PLAIN, {"data": {"labelled": 6, "unlabelled": "drop"}, "train": {"batch": 12}})
    assert session.steps_per_epoch == 1
    assert [report.samples for report in Seen(session).steps] == [6] * 6


def test_the_average_is_that_of_the_weights_after_each_update() -> None:
    session = session_of(STATEFUL)
    net = session.learner.student.network.net
    expected = [parameter.detach().clone() for parameter in net.parameters()]
    given: list[list[Tensor]] = []
    watch = Watchers(
        lambda report: given.append([parameter.detach().clone() for parameter in net.parameters()]),
        lambda report: None, lambda session: None, lambda session: None,
    )  # fmt: skip
    train(session, watch)
    for n, weights in enumerate(given, 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights, strict=True)]
    assert session.average is not None
    for found, wanted in zip(session.average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_the_averaged_student_is_what_is_evaluated() -> None:
    session = session_of(STATEFUL)
    reports = Seen(session).evals
    assert session.average is not None
    assert session.splits.val is not None
    averaged, last = (
        evaluate(session, session.splits.val, model.answer).numbers
        for model in (session.average.model, session.deployed)
    )
    assert session.student is session.average.model
    assert reports[-1].metrics == averaged
    assert averaged["cross_entropy"] != last["cross_entropy"]


def test_metrics_equal_a_computation_by_hand() -> None:
    session = session_of(PLAIN, {"runtime": {"eval_batch": 5}})
    reports = Seen(session).evals
    view = session.splits.val
    assert view is not None
    batch = view.fetch(range(len(view)))
    with torch.no_grad():
        logits = session.learner.eval().student.network.net(batch["image"])
    answers = logits.argmax(1)
    recalls = [(answers[batch["label"] == c] == c).float().mean() for c in batch["label"].unique()]
    expected = {
        "accuracy": (answers == batch["label"]).float().mean().item(),
        "cross_entropy": F.cross_entropy(logits, batch["label"]).item(),
        "macro_recall": torch.stack(recalls).mean().item(),
    }
    assert reports[-1].metrics == pytest.approx(reports[-1].metrics | expected, rel=1e-5)


def test_evaluation_changes_no_mode_and_no_buffer() -> None:
    session = session_of(PLAIN)
    assert session.splits.val is not None
    before = copy.deepcopy(session.learner.state_dict())
    session.learner.train()
    evaluate(session, session.splits.val, session.student.answer)
    assert session.learner.training
    assert session.learner.student.training
    assert all(torch.equal(value, before[name]) for name, value in session.learner.state_dict().items())


def scripted(scores: Sequence[float], **options: Any) -> tuple[Session, Seen]:
    """A training that is evaluated to these numbers, epoch by epoch."""
    registry().find("metrics", "scripted", "").component.computed = 0
    train = {"epochs": len(scores), "updates": None, "monitor": "score", **options}
    session = session_of(PLAIN, {"metrics": {"scripted": {"scores": list(scores)}}, "train": train})
    return session, Seen(session)


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "minimise", "best"),
    [
        ([0.1, 0.5, 0.3], False, 2),
        ([0.1, 0.5, 0.3], True, 1),
        ([0.5, 0.2, 0.3], True, 2),
        ([0.4, 0.4, 0.4], False, 1),
        ([NAN, 0.4, NAN], False, 2),
        ([0.4, NAN, 0.3], True, 3),
    ],
)
def test_the_best_epoch_is_that_of_the_monitored_number(scores: list[float], minimise: bool, best: int) -> None:
    session, seen = scripted(scores, minimise=minimise)
    assert session.best is not None
    assert session.best["epoch"] == best
    assert session.best["step"] == 3 * best
    assert seen.improved[-1] == 3 * best
    assert [report.clock.step for report in seen.evals if report.best] == seen.improved
    assert session.last is not None
    assert session.last["step"] == 9


def test_evaluation_and_saving_follow_their_cadence_and_the_end_counts_always() -> None:
    train = {"updates": 14, "evaluate": 2, "save": 3}
    seen = Seen(session_of(PLAIN, {"train": train}))
    assert [report.clock.step for report in seen.evals] == [6, 12, 14]
    assert seen.saved == [9, 14]
    assert isinstance(seen.evals[0], EvalReport)
    assert (seen.evals[0].split, seen.evals[0].who) == ("val", "student")


def test_without_validation_the_last_epoch_counts_and_nothing_is_reported() -> None:
    session = session_of(PLAIN, {"data": {"validation": 0}, "train": {"updates": 8}})
    seen = Seen(session)
    assert seen.evals == []
    assert session.best == session.last == {"epoch": 2, "step": 8, "val": {}}


def test_length_is_in_epochs_of_full_batches_or_in_updates() -> None:
    spec = session_of(PLAIN, {"train": {"updates": None, "epochs": 2.5}}).spec
    assert length(spec, 36) == (3, 8)
    assert length(spec, 47) == (3, 8)
    assert length(spec, 5) == (1, 2)
    spec = session_of(PLAIN, {"train": {"steps_per_epoch": 10, "updates": None, "epochs": 2}}).spec
    assert length(spec, 36) == (10, 20)


def test_an_epoch_of_given_length_runs_on_into_the_next_pass() -> None:
    session = session_of(PLAIN, {"train": {"steps_per_epoch": 5, "updates": None, "epochs": 2}})
    order = [batch["index"] for batch in all_batches(session)]
    assert len(order) == 10
    for start in (0, 3, 6):
        seen = torch.cat(order[start : start + 3])
        assert len(seen.unique()) == 36, "each pass sees every sample once"


def test_training_can_be_taken_up_in_the_middle_of_an_epoch() -> None:
    whole = all_batches(session_of(PLAIN))
    late = session_of(PLAIN)
    late.step = 4
    rest = all_batches(late)
    assert len(rest) == 2
    for one, other in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_samples_vary_with_the_pass_and_the_seed() -> None:
    passes = {}
    for seed in (0, 1):
        found = all_batches(session_of(PLAIN, {"seed": seed}))
        passes[seed] = [torch.cat([b["image"] for b in found[i : i + 3]]) for i in (0, 3)]
        orders = [torch.cat([b["index"] for b in found[i : i + 3]]) for i in (0, 3)]
        assert not torch.equal(*orders)
        sorted_by_index = [images[order.argsort()] for images, order in zip(passes[seed], orders, strict=True)]
        assert not torch.equal(*sorted_by_index), "the flips of two passes are the same"
    assert not torch.equal(passes[0][0], passes[1][0])


def test_stopping_saves_and_ends_after_the_update() -> None:
    session = session_of(PLAIN)
    steps: list[int] = []
    saved: list[int] = []
    watchers = Watchers(
        lambda report: steps.append(report.clock.step), lambda report: None, lambda session: None,
        lambda session: saved.append(session.step), lambda: len(steps) >= 2,
    )  # fmt: skip
    train(session, watchers)
    assert (steps, saved, session.step) == ([1, 2], [2], 2)


def test_the_highest_learning_rate_is_found_wherever_it_is() -> None:
    spec = session_of(PLAIN, {"train": {"lr": {"use": "cosine", "peak": 0.4, "warmup": 1}}}).spec
    assert highest(spec.lr, 3, 9) == pytest.approx(0.4, abs=1e-6)
    assert highest(0.3, 3, 9) == 0.3


def test_an_optimizer_that_must_know_the_highest_learning_rate_is_told() -> None:
    session = session_of(PLAIN, {"train": {"optimizer": {"use": "adamc"}, "weight_decay": 0.1}})
    assert session.runtime.optimizer.defaults["lr"] == 0.05
    assert all(math.isfinite(report.numbers()["total"]) for report in Seen(session).steps)


def test_the_clock_of_a_report_counts_finished_updates() -> None:
    seen = Seen(session_of(PLAIN))
    assert [report.clock for report in seen.steps] == [Clock(i, 3, 6) for i in range(1, 7)]
    assert set(seen.steps[0].terms) == {"ce", "total"}


def test_the_number_of_workers_changes_nothing() -> None:
    weights = []
    for workers in (0, 2):
        session = session_of(STATEFUL, {"runtime": {"workers": workers}})
        with torch.random.fork_rng():
            torch.manual_seed(3)
            Seen(session)
        weights.append(session.learner.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Counted(Split):
    def __init__(self, view: View) -> None:
        self.view = view
        self.fetched = 0
        self.labels = view.labels

    def __len__(self) -> int:
        return len(self.view)

    def fetch(self, indices: Sequence[int]) -> Batch:
        self.fetched += len(indices)
        return self.view.fetch(indices)


def test_training_never_reads_the_test_split() -> None:
    session = session_of(STATEFUL)
    assert session.splits.test is not None
    counted = Counted(session.splits.test)
    object.__setattr__(session.splits, "test", counted)
    Seen(session)
    assert counted.fetched == 0


ENGINE = (
    "loop.py",
    "modules.py",
    "calls.py",
    "taps.py",
    "builtin/losses.py",
    "builtin/aligners.py",
    "builtin/augment.py",
)
HOT = [*(ROOT / name for name in ENGINE), *(ROOT.parent / "plugins").glob("*.py")]
SYNC = re.compile(r"\.item\(|\.cpu\(|\.tolist\(|torch\.equal\(|\bprint\(|\.numpy\(")


def sync_words(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if SYNC.search(line.partition("#")[0]):
            yield f"{path.name}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", HOT, ids=lambda path: path.name)
def test_nothing_in_the_hot_path_waits_for_the_device(path: Path) -> None:
    assert list(sync_words(path)) == []


def test_the_search_for_waiting_finds_it(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = loss.item()\n# loss.item() in a comment\n")
    assert list(sync_words(tmp_path / "a.py")) == ["a.py:1: x = loss.item()"]
