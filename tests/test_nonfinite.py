"""Facts of `kdx/nonfinite.py` and `kdx/diagnosis.py`: an update of nan or inf is not applied, named, or counted."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import DISTIL, PLAIN, STATEFUL, Seen, config_of, lines_of, prepared, quiet, run_in, session_of
from torch import Tensor, nn

from kdx.checkpoint import load_state, read_weights
from kdx.config import load_mapping
from kdx.diagnosis import teachers_of
from kdx.errors import ConfigError, KdxError
from kdx.guard import EVERY
from kdx.loop import Session, Watchers, train
from kdx.nonfinite import Fault, Faults, Rollback, all_finite, finite_names
from kdx.result import read_result
from kdx.resume import training_state
from kdx.runs import carry_out, prepare
from kdx.runtime import Runtime
from kdx.sections import RuntimeOptions
from kdx.types import Losses

LONG = {"train": {"steps_per_epoch": 1000, "updates": 1000}}
SKIP = {"on_nonfinite": "skip"}
HEAD = "models.model/student.network.net.head.weight"


def spoil_student(session: Session, sample: int, *, update: int, value: float = math.nan) -> None:
    """From an update on, the student's logits of one sample of the batch are `value`."""
    seen = 0

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        nonlocal seen
        seen += module.training
        if seen < update:
            return output
        spoilt = output.clone()
        spoilt[sample, 0] = value
        return spoilt

    session.learner.student.network.net.head.register_forward_hook(hook)


def spoil_gradient(session: Session, update: int, last: int = 10**9) -> None:
    """From one update to another the gradient of a bias of the student is nan."""
    seen = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return gradient * math.nan if update <= seen <= last else gradient

    session.learner.student.network.net.head.bias.register_hook(hook)


def weights(session: Session) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in session.learner.state_dict().items()}


def test_a_bad_loss_stops_the_run_with_term_update_samples_and_teacher() -> None:
    session = session_of(DISTIL, {"losses": {"hint": None, "ce": None}})
    samples = session.feed.at(1)["index"]
    spoil_student(session, 5, update=2)
    text = rf"losses.kd .*, which reads teachers.wide, gave nan or inf in update 2 \(batch.index {samples[5]}\); "
    with pytest.raises(KdxError, match=text) as found:
        Seen(session)
    assert f"the first such number is in student.logits (batch.index {samples[5]}); expected finite" in str(found.value)


def test_a_bad_loss_of_one_number_names_the_sample_by_computing_it_again() -> None:
    session = session_of(DISTIL, {"losses": {"hint": None, "kd": None}})
    sample = int(session.feed.at(0)["index"][7])
    spoil_student(session, 7, update=1, value=math.inf)
    with pytest.raises(KdxError, match=r"losses.ce \(.* gave nan or inf in update 1.*") as found:
        Seen(session)
    assert f"student.logits (batch.index {sample})" in str(found.value)


def test_losses_that_are_bad_as_well_are_named() -> None:
    session = session_of(DISTIL, {"losses": {"hint": None}})
    spoil_student(session, 7, update=1, value=math.inf)
    with pytest.raises(KdxError, match=r"losses.ce .* gave nan or inf in update 1, as did losses.kd; computed again"):
        Seen(session)


def test_bad_data_are_told_from_a_bad_student() -> None:
    session = session_of(PLAIN)
    sample = int(session.feed.at(0)["index"][2])
    session.splits.train.source.tensors["image"][sample] = math.nan  # type: ignore[attr-defined]
    with pytest.raises(KdxError, match=rf"the data, batch.image \(batch.index {sample}\)"):
        Seen(session_of_same(session))


def session_of_same(session: Session) -> Session:
    """The session with what its loader has read ahead forgotten."""
    session.feed._next = -1
    return session


def test_a_bad_gradient_is_named_where_all_losses_are_finite() -> None:
    session = session_of(PLAIN)
    spoil_gradient(session, 2)
    text = r"train: the gradient was nan or inf in update 2, .*the gradients of 1 weight, as .*head.bias; expected"
    with pytest.raises(KdxError, match=text):
        Seen(session)


def test_no_weight_moves_after_the_first_fault() -> None:
    session, clean = (session_of(PLAIN, LONG) for _ in range(2))
    spoil_gradient(session, 4)
    train(clean, Watchers(lambda report: None, lambda report: None, lambda one: None, lambda one: None,
                          lambda: clean.step == 3))  # fmt: skip
    with pytest.raises(KdxError, match="in update 4"):
        Seen(session)
    assert session.step == EVERY, "found without waiting in each update"
    for (name, own), wanted in zip(clean.learner.named_parameters(), session.learner.parameters(), strict=True):
        assert torch.equal(own, wanted), name


@pytest.mark.parametrize(
    "optimizer", [{"use": "sgd", "momentum": 0.9}, {"use": "adamw"}, {"use": "lion"}, {"use": "rmsprop"}]
)
def test_a_skipped_update_changes_nothing_and_is_counted(optimizer: dict[str, Any]) -> None:
    session = session_of(STATEFUL, SKIP, {"train": {"optimizer": optimizer}, "losses": {"own": None}})
    spoil_student(session, 0, update=5)  # of the micro-batches, two for each update
    before: list[dict[str, Tensor]] = []
    hooks = Watchers(
        lambda report: before.append(weights(session)), lambda report: None, lambda one: None, lambda one: None
    )
    train(session, hooks)
    for name, value in before[-1].items():
        if "num_batches" not in name:
            assert torch.equal(value, before[1][name]), name
            assert value.isfinite().all()
    assert session.runtime.faults.skipped == 4
    assert session.average is not None
    assert all(value.isfinite().all() for value in session.average.model.state_dict().values())
    assert not before[0][HEAD].equal(before[1][HEAD])


def test_the_first_update_can_be_skipped() -> None:
    session, clean = session_of(PLAIN, SKIP), session_of(PLAIN, SKIP)
    spoil_gradient(session, 1, 1)
    first = weights(session)
    seen = Seen(session)
    assert session.runtime.faults.skipped == 1
    assert [report.numbers()["skipped"] for report in seen.steps] == [1, 0, 0, 0, 0, 0]
    state = next(iter(session.runtime.optimizer.state.values()))["momentum_buffer"]
    assert state.isfinite().all()
    Seen(clean)
    assert not torch.equal(weights(session)["models.model/student.network.net.head.bias"],
                           first["models.model/student.network.net.head.bias"])  # fmt: skip


def test_a_run_of_nothing_but_skipped_updates_is_refused() -> None:
    session = session_of(PLAIN, SKIP, LONG)
    spoil_student(session, 0, update=2)
    with pytest.raises(KdxError, match=rf"'skip' left out each of the last {2 * EVERY - 1} updates, .*losses.ce"):
        Seen(session)
    assert session.step == 2 * EVERY


def test_short_epochs_do_not_hide_that_nothing_is_learnt() -> None:
    session = session_of(PLAIN, SKIP, {"train": {"updates": 90, "evaluate": 100}})
    spoil_gradient(session, 8)
    with pytest.raises(KdxError, match=rf"left out each of the last {EVERY} updates"):
        Seen(session)
    assert session.step == 57, "the end of an epoch of 3"


def test_batch_statistics_are_those_of_the_updates_that_count() -> None:
    session = session_of(PLAIN, SKIP)
    net = session.learner.student.network.net
    seen = 0

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        nonlocal seen
        seen += module.training
        return output * math.nan if seen == 3 and module.training else output

    net.first[0].register_forward_hook(hook)
    Seen(session)
    assert session.runtime.faults.skipped == 1
    assert net.first[1].running_mean.isfinite().all()
    assert int(net.first[1].num_batches_tracked) == 5


def test_weights_that_are_not_finite_are_never_kept() -> None:
    session = session_of(PLAIN)
    done: list[str] = []

    def spoil(report: Any) -> None:
        if session.step == 3:
            with torch.no_grad():
                session.learner.student.network.net.head.weight[0, 0] = math.inf

    watchers = Watchers(spoil, lambda report: done.append("told"), lambda one: done.append("best"),
                        lambda one: done.append("saved"))  # fmt: skip
    with pytest.raises(KdxError, match=r"after update 3 1 weights and statistics are nan or inf, as .*head.weight"):
        train(session, watchers)
    assert done == []


def test_the_checkpoint_of_a_stopped_run_is_of_before_the_fault(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text(LATE)
    layer = {"plugins": [*PLAIN["plugins"], str(path)], "losses": {"late": {"use": "late_nan"}}, "out": str(tmp_path)}
    ready = prepare(load_mapping(config_of(PLAIN, layer)), quiet())
    with pytest.raises(KdxError, match=r"losses.late \(late_nan, plugin late.py\) gave nan or inf in update 5"):
        carry_out(ready, quiet())
    state = load_state(ready.folder / "checkpoint")
    assert state is not None
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["learner"].values() if value.is_floating_point())
    (best,) = (ready.folder / "checkpoint").glob("best*.safetensors")
    assert all(value.isfinite().all() for value in read_weights(best).values())


def test_a_run_counts_what_it_skipped_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text(LATE)
    layer = {"plugins": [*PLAIN["plugins"], str(path)], "losses": {"late": {"use": "late_nan"}}, **SKIP}
    found = run_in(tmp_path, PLAIN, layer)
    assert read_result(found.folder).skipped == 2
    assert [line["shown"]["skipped"] for line in lines_of(found.folder) if line["kind"] == "step"] == [0, 0, 0, 0, 1, 1]
    assert "2 updates were left out" in (found.folder / "report.md").read_text()


LATE = """
import kdx, torch

class LateNan(kdx.Loss):
    name = "late_nan"
    inputs = {"student": "student.logits"}

    def __init__(self, config, given):
        super().__init__(config, given)
        self.register_buffer("seen", torch.zeros(()))

    def after_update(self, clock):
        self.seen.fill_(clock.step)

    def forward(self, student):
        value = student.square().mean(1)
        return torch.where(self.seen >= 4, torch.nan, value)

@kdx.hookimpl
def kdx_losses():
    return [LateNan]
"""


def fault_of(scale: float, total: float, overflown: bool) -> tuple[list[Fault], float]:
    """What is found for an update in fp16, and whether the scaler is told to leave it out."""
    faults = Faults(torch.device("cpu"))
    losses = Losses(torch.tensor(total), {"ce": torch.tensor(total)})
    faults.add(1, torch.arange(2), losses)
    told = torch.tensor(float(overflown))
    faults.judge_scaled(told, torch.tensor(scale))
    return faults.take(), told.item()


def test_in_fp16_a_scale_that_was_too_high_is_no_fault() -> None:
    assert fault_of(65536.0, 1.0, True) == ([], 1.0)
    assert fault_of(65536.0, 1.0, False) == ([], 0.0)
    assert fault_of(1.0, 1.0, True) == ([Fault(1, {})], 1.0)
    assert fault_of(65536.0, math.nan, False) == ([Fault(1, {"ce": ()})], 1.0)


def test_a_scaled_update_that_overflows_is_left_to_the_scaler() -> None:
    net = nn.Linear(3, 2)
    runtime = Runtime(RuntimeOptions(device="cpu", precision="fp32"))
    runtime._scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, fused=True)
    runtime.prepare(net, optimizer, None)
    before = copy.deepcopy(net.state_dict())
    runtime.faults.add(1, torch.arange(4), Losses(torch.tensor(1.0), {}))
    runtime.backward(net(torch.full((4, 3), 1e35)).sum())
    runtime.update()
    assert torch.equal(net.weight, before["weight"])
    assert runtime.faults.take() == []
    assert runtime._scaler.get_scale() == 32768.0
    assert not optimizer.state  # a fused optimizer would have made a momentum of whatever was in memory
    runtime.backward(net(torch.ones(4, 3)).sum())
    runtime.update()
    assert torch.allclose(net.weight, before["weight"] - 0.5 * 4)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("asks", [(2, 4, 6), (1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6), (1, 2, 3, 4, 5, 6)])
def test_the_update_of_a_fault_is_known_however_often_an_updater_applies_gradients(
    asks: tuple[int, ...], skip: bool
) -> None:
    faults = Faults(torch.device("cpu"))
    faults.skip = skip
    for update in range(1, 7):
        good = torch.tensor(1.0)
        faults.add(update, torch.arange(2), Losses(good, {"ce": good}))
        for last in range(asks.count(update), 0, -1):
            faults.judge([[torch.tensor([math.nan if update == 4 and last == 1 else 1.0])]])
    later = [] if skip else [update for update in (5, 6) if update in asks]
    assert [fault.step for fault in faults.take()] == [4, *later]
    assert faults.take() == []


def test_an_update_that_is_not_judged_keeps_its_buffers() -> None:
    norm, found = nn.BatchNorm1d(2), torch.ones(())
    rollback = Rollback([norm], found)
    rollback.save()
    norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
    rollback.restore()
    assert torch.equal(norm.running_mean, torch.full((2,), 3.0))  # type: ignore[arg-type]
    found.fill_(1.0)
    norm.running_mean.fill_(5.0)  # type: ignore[union-attr]
    rollback.restore()
    assert torch.equal(norm.running_mean, torch.zeros(2))  # type: ignore[arg-type]


def test_a_buffer_whose_numbers_lie_in_memory_once_is_looked_at() -> None:
    one = torch.ones(1)
    assert all_finite([one.expand(3), torch.ones(2)])
    assert not all_finite([(one * math.inf).expand(3)])


def test_tensors_are_finite_though_their_sum_is_not() -> None:
    state = {
        "good": torch.ones(3),
        "large": torch.full((4,), torch.finfo(torch.float32).max),
        "half": torch.full((4,), 60_000.0, dtype=torch.float16),
        "nan": torch.tensor([1.0, math.nan]),
        "inf": torch.tensor([math.inf, 1.0]),
        "opposite": torch.tensor([math.inf, -math.inf]),
        "counts": torch.tensor([1]),
        "empty": torch.zeros(0),
    }
    assert finite_names(state) == {"good", "large", "half"}
    assert finite_names({"counts": state["counts"]}) == frozenset()


def test_the_choice_is_checked_and_counts_for_the_hash() -> None:
    with pytest.raises(ConfigError, match="on_nonfinite: found 'ignore', expected stop or skip"):
        prepared(PLAIN, {"on_nonfinite": "ignore"})
    assert prepared(PLAIN).hash != prepared(PLAIN, SKIP).hash


def test_skip_changes_no_number_where_all_is_well() -> None:
    found = []
    for layer in (SKIP, {}):
        session = session_of(STATEFUL, layer)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(Seen(session))
    mine, own = found
    assert [report.numbers()["total"] for report in mine.steps] == [report.numbers()["total"] for report in own.steps]


def test_teachers_are_found_through_targets_and_aligners() -> None:
    plan = session_of(DISTIL, {"targets": {"doubt": {"use": "doubt"}}, "losses": {"kd": {"temperature": "doubt"}}}).plan
    found = {call.name: teachers_of(plan, call) for call in plan.loss_calls}
    assert found == {"losses.ce": [], "losses.kd": ["wide"], "losses.hint": ["wide"]}


def test_the_number_of_skipped_updates_is_a_part_of_the_state() -> None:
    session = session_of(PLAIN, SKIP)
    spoil_gradient(session, 1, 2)
    Seen(session)
    assert training_state(session, 0.0)["faults"] == {"skipped": 2}
