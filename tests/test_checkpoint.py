"""Facts of `kdx/checkpoint.py` and `kdx/resume.py`."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from small_run import DISTIL, STATEFUL, Seen, config_of, session_of
from torch import nn

from kdx.checkpoint import LAST, PREVIOUS, load_state, load_weights, read_weights, save_state, save_weights
from kdx.errors import CheckpointError
from kdx.loop import Watchers, train
from kdx.modules import generators
from kdx.resume import restore, training_state


def net_of(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_weights_come_back_under_the_same_names_with_their_header(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    digest = save_weights(net_of(), path, {"about": "a test"})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"about": "a test", "sha256": digest}
        assert set(file.keys()) == set(net_of().state_dict())
    other = net_of(1)
    load_weights(other, path, "here")
    assert all(torch.equal(value, net_of().state_dict()[name]) for name, value in other.state_dict().items())


def test_weights_that_share_memory_or_are_strided_can_be_saved(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last))
    net[1].weight = net[0].weight  # type: ignore[assignment]
    save_weights(net, tmp_path / "a.safetensors")
    assert torch.equal(read_weights(tmp_path / "a.safetensors")["2.weight"], net[2].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
def test_state_dicts_saved_by_torch_are_read_wherever_they_lie(tmp_path: Path, wrap: str | None) -> None:
    state = net_of().state_dict()
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "a.pt")
    assert set(read_weights(tmp_path / "a.pt")) == set(state)


def test_the_prefix_of_a_wrapped_net_is_taken_off(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in net_of().state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    net = net_of(1)
    load_weights(net, tmp_path / "a.pt", "here")
    assert torch.equal(net[0].weight, net_of()[0].weight)  # type: ignore[arg-type]


def test_a_net_with_a_part_that_is_called_module_keeps_its_names(tmp_path: Path) -> None:
    net = nn.ModuleDict({"module": nn.Linear(2, 2)})
    save_weights(net, tmp_path / "a.safetensors")
    other = nn.ModuleDict({"module": nn.Linear(2, 2)})
    load_weights(other, tmp_path / "a.safetensors", "here")
    assert torch.equal(other["module"].weight, net["module"].weight)  # type: ignore[arg-type]


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    for name, content in {"weights.pt": {"x": Evil(tmp_path / "ran")}, "bare.pt": Evil(tmp_path / "ran")}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name} holds more than tensors .* kdx loads no code"):
            read_weights(tmp_path / name)
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match=r"old\.pt"):
        read_weights(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


def test_pickled_code_in_a_state_of_training_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"step": 1, "learner": Evil(tmp_path / "ran")}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=r"last\.pt is not usable"):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_module_that_was_pickled_whole_is_refused(tmp_path: Path) -> None:
    torch.save(net_of(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="save a state dict instead"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("damage", ["torn", "empty", "text"])
def test_a_damaged_file_of_weights_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    save_weights(net_of(), path) if name.endswith("safetensors") else torch.save(net_of().state_dict(), path)
    content = {"torn": path.read_bytes()[:-40], "empty": b"", "text": b"name: a config\n"}[damage]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_weights(path)


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    for content in (torch.zeros(3), {}, {"a": 1}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="holds no state dict"):
            read_weights(tmp_path / "a.pt")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file of weights"):
        read_weights(tmp_path / "none.pt")


def without(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "0.bias"}


def misnamed(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("0.weight", "0.wieght"): value for name, value in state.items()}


def reshaped(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "0.weight": torch.zeros(5, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, r"teachers\.a\.checkpoint: .* does not fit Sequential: 1 missing, 0 unknown; '0\.bias' is missing"),
        (misnamed, r"1 missing, 1 unknown; '0\.wieght' is unknown; did you mean '0\.weight'"),
        (reshaped, r"0\.weight has shape \[5, 3\], expected \[4, 3\]"),
    ],
)
def test_weights_of_another_net_are_refused_and_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    torch.save(change(dict(net_of().state_dict())), tmp_path / "a.pt")
    net = net_of(1)
    with pytest.raises(CheckpointError, match=message):
        load_weights(net, tmp_path / "a.pt", "teachers.a.checkpoint")
    assert torch.equal(net[0].weight, net_of(1)[0].weight)  # type: ignore[arg-type]


def states(folder: Path, count: int) -> None:
    for step in range(1, count + 1):
        save_state(folder, {"step": step, "weights": torch.full((1000,), float(step))})


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    assert load_state(tmp_path / "checkpoint") is None


def test_the_newest_state_is_loaded_and_one_before_it_is_kept(tmp_path: Path) -> None:
    states(tmp_path, 3)
    found = load_state(tmp_path)
    assert found is not None
    assert found["step"] == 3
    assert torch.equal(found["weights"], torch.full((1000,), 3.0))
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [tear, alter])
def test_a_damaged_last_state_is_passed_over_with_a_warning_that_names_it(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    states(tmp_path, 2)
    damage(tmp_path / LAST)
    with pytest.warns(UserWarning, match=r"last\.pt is not usable: .*; going on from previous\.pt"):
        found = load_state(tmp_path)
    assert found is not None
    assert found["step"] == 1


def test_the_state_after_a_damaged_one_does_not_replace_the_good_one_with_it(tmp_path: Path) -> None:
    states(tmp_path, 2)
    tear(tmp_path / LAST)
    with pytest.warns(UserWarning, match="going on from"):
        load_state(tmp_path)
    assert not (tmp_path / LAST).exists(), "the next save would keep the torn file as the previous state"
    save_state(tmp_path, {"step": 5})
    tear(tmp_path / LAST)
    with pytest.warns(UserWarning, match="going on from"):
        assert load_state(tmp_path) is not None


def test_two_damaged_states_are_an_error_that_names_both(tmp_path: Path) -> None:
    states(tmp_path, 2)
    for name in (LAST, PREVIOUS):
        tear(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"last\.pt is not usable: .*previous\.pt is not usable: .*--fresh"):
        load_state(tmp_path)


def test_a_damaged_state_without_a_previous_one_is_an_error(tmp_path: Path) -> None:
    states(tmp_path, 1)
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt is not usable"):
        load_state(tmp_path)


def stopped_after(session: Any, steps: int) -> None:
    def nothing(_: Any) -> None:
        pass

    train(session, Watchers(nothing, nothing, nothing, nothing, lambda: session.step >= steps))


def restored(state: dict[str, Any], folder: Path, *layers: dict[str, Any]) -> Any:
    save_state(folder, state)
    found = load_state(folder)
    assert found is not None
    session = session_of(*layers)
    restore(session, found, "checkpoint")
    return session


@pytest.mark.parametrize("steps", [1, 4])
def test_a_restored_session_goes_on_to_the_bit(tmp_path: Path, steps: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        whole = session_of(STATEFUL)
        expected = Seen(whole)
        torch.manual_seed(7)
        first = session_of(STATEFUL)
        stopped_after(first, steps)
        state = training_state(first, 1.0)
        torch.manual_seed(99)
        second = restored(state, tmp_path, STATEFUL)
        assert second.step == steps
        seen = Seen(second)
    assert [report.numbers() for report in seen.steps] == [report.numbers() for report in expected.steps[steps:]]
    assert all(torch.equal(v, second.learner.state_dict()[k]) for k, v in whole.learner.state_dict().items())
    assert whole.average is not None
    assert second.average is not None
    averages = whole.average.model.state_dict(), second.average.model.state_dict()
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())
    assert second.learner.nodes["losses/own"].bank.shape == (6, 3), "the bank has grown"
    assert (second.best, second.last) == (whole.best, whole.last)
    for name, generator in generators(second.plan).items():
        assert torch.equal(generator.get_state(), generators(whole.plan)[name].get_state())


def test_the_state_of_targets_beside_the_teachers_is_restored(tmp_path: Path) -> None:
    config = config_of(
        DISTIL,
        {"targets": {"centre": {"use": "centred"}}, "losses": {"kd": {"inputs": {"teacher": "centre.logits"}}}},
    )
    session = session_of(config)
    stopped_after(session, 2)
    again = restored(training_state(session, 0.0), tmp_path, config)
    assert again.teachers.nodes["targets/centre"].updates.item() == 2
    assert torch.equal(again.teachers.nodes["targets/centre"].mean, session.teachers.nodes["targets/centre"].mean)


def test_times_are_carried_over(tmp_path: Path) -> None:
    session = session_of(DISTIL)
    stopped_after(session, 2)
    session.runtime.stopwatch.add("student", 1000.0)
    again = restored(training_state(session, 12.0), tmp_path, DISTIL)
    assert again.runtime.stopwatch.seconds()["student"] > 1000.0


@pytest.mark.parametrize("other", [{"student": {"width": 6}}, {"losses": {"own": {"use": "stateful"}}}])
def test_the_state_of_another_run_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    state = training_state(session_of(DISTIL), 0.0)
    with pytest.raises(CheckpointError, match="the state in checkpoint is of another run"):
        restored(state, tmp_path, DISTIL, other)
