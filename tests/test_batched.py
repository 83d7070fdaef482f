"""Facts of `kdx/batched.py`: teachers of one architecture as one call, chosen by a measurement."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import PLAIN, Seen, config_of, prepared, quiet, session_of
from torch import nn

from kdx.batched import Choice, Together, alike, choose
from kdx.calls import ModelCall, Values
from kdx.errors import ConfigError, PlanError
from kdx.fanout import Shared
from kdx.loop import Session
from kdx.resume import restore, training_state
from kdx.runs import carry_out, check_run
from kdx.types import Batch
from kdx.ways import decide, ways

SMALL = {"use": "small", "width": 8}
THREE: dict[str, Any] = config_of(
    PLAIN,
    {
        "name": "three",
        "teachers": {"one": SMALL, "two": SMALL, "three": SMALL, "slim": {"use": "small", "width": 3}},
        "targets": {"committee": {"use": "mean"}},
        "losses": {"kd": {"use": "kd", "inputs": {"teacher": "committee.logits"}}},
    },
)
"""Three teachers that are alike but for their weights, and one that is not."""
ALWAYS: Mapping[str, Any] = {"runtime": {"teacher_batching": "always"}}


def groups_of(session: Session) -> list[tuple[ModelCall, ...]]:
    return alike(session.plan, session.teachers.live)


def start(batch: Batch) -> Values:
    return {f"batch.{name}": value for name, value in batch.items()}


def chosen(session: Session, *, always: bool) -> Choice:
    with torch.no_grad():
        return choose(groups_of(session), session.feed.at(0), always=always, wait=lambda: None)


def test_models_of_one_architecture_are_a_group() -> None:
    (group,) = groups_of(session_of(THREE))
    assert [call.name for call in group] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "layer",
    [
        {"teachers": {"two": {"width": 5}}},
        {"teachers": {"two": {"offload": "cpu"}}},
        {"teachers": {"two": {"dropout": 0.5}}},
    ],
)
def test_a_model_that_differs_or_sits_elsewhere_is_called_by_itself(layer: Mapping[str, Any]) -> None:
    (group,) = groups_of(session_of(THREE, layer))
    assert [call.name for call in group] == ["one", "three"]


def test_a_hooked_model_is_called_by_itself() -> None:
    layer = {
        "teachers": {"two": {"taps": {"mid": "second"}}},
        "losses": {"hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "two.mid"}}},
        "align": {"mid": {"use": "conv1x1", "source": "student.mid", "like": "two.mid"}},
    }
    (group,) = groups_of(session_of(THREE, layer))
    assert [call.name for call in group] == ["one", "three"]


def test_one_call_gives_what_several_give_within_rounding() -> None:
    session = session_of(THREE)
    (group,) = groups_of(session)
    found, expected = start(batch := session.feed.at(0)), start(batch)
    with torch.no_grad():
        Together(group).run(found)
        for call in group:
            call.run(expected)
    for call in group:
        torch.testing.assert_close(found[f"{call.name}.logits"], expected[f"{call.name}.logits"])
    assert not torch.equal(found["one.logits"], found["two.logits"])


def test_training_with_one_call_is_training_with_several_within_rounding() -> None:
    several, one = session_of(THREE), session_of(THREE, ALWAYS)
    assert len(decide(one, None)) == 1
    assert ways(one) == [["batched", ["one", "two", "three"]]]
    assert [call.name for call in one.teachers.live] == ["slim"]
    for mine, own in zip(Seen(several).steps, Seen(one).steps, strict=True):
        torch.testing.assert_close(own.terms["total"], mine.terms["total"], rtol=1e-5, atol=1e-6)


def test_adopted_models_keep_their_weights_and_share_the_memory_of_the_stack() -> None:
    session = session_of(THREE)
    (group,) = groups_of(session)
    before = [{name: value.clone() for name, value in call.module.state_dict().items()} for call in group]
    (together,) = chosen(session, always=True).adopted
    weight = together._weights[0]["network.net.head.weight"]
    for place, (call, state) in enumerate(zip(group, before, strict=True)):
        assert call.module.network.net.head.weight.data_ptr() == weight[place].data_ptr()
        assert all(torch.equal(value, state[name]) for name, value in call.module.state_dict().items())


def test_batch_norm_keeps_the_statistics_of_each_teacher() -> None:
    session = session_of(THREE)
    (group,) = groups_of(session)
    norm = next(part for part in group[1].module.modules() if isinstance(part, nn.BatchNorm2d))
    norm.running_mean += 3
    found, expected = start(batch := session.feed.at(0)), start(batch)
    with torch.no_grad():
        Together(group).run(found)
        group[1].run(expected)
    torch.testing.assert_close(found["two.logits"], expected["two.logits"])
    assert not any(module.training for call in group for module in call.module.modules())


def slow_down(session: Session, *, single: float = 0.0, batched: float = 0.0) -> None:
    """Make each pass of the nets take longer, by so many seconds in a call of one net or of the batched ones."""

    def wait(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        time.sleep(batched if torch._C._functorch.is_batchedtensor(output) else single)

    for call in groups_of(session)[0]:
        call.module.network.net.register_forward_hook(wait)


def test_the_faster_way_is_taken_and_said() -> None:
    session = session_of(THREE)
    slow_down(session, single=0.01)
    choice = chosen(session, always=False)
    assert re.fullmatch(
        r"teachers one, two, three: one batched call, \S+ ms; one after another \S+ ms", choice.lines[0]
    )
    assert len(choice.adopted) == 1


def test_the_slower_way_is_not_taken_and_weights_stay_where_they_are() -> None:
    session = session_of(THREE)
    (group,) = groups_of(session)
    places = [value.data_ptr() for call in group for value in call.module.parameters()]
    slow_down(session, batched=0.05)
    choice = chosen(session, always=False)
    assert re.fullmatch(
        r"teachers one, two, three: called one after another, \S+ ms; one batched call \S+ ms", choice.lines[0]
    )
    assert choice.adopted == ()
    assert [value.data_ptr() for call in group for value in call.module.parameters()] == places


def test_a_net_that_cannot_be_stacked_falls_back_and_says_why() -> None:
    session = session_of(THREE)
    for call in groups_of(session)[0]:
        call.module.network.net.register_forward_hook(lambda module, inputs, output: output * float(output.sum()))
    choice = chosen(session, always=False)
    assert choice.adopted == ()
    assert choice.lines[0].startswith("teachers one, two, three: called one after another, since they cannot be one")
    with pytest.raises(PlanError, match=r"runtime.teacher_batching: one, two, three cannot be one call: RuntimeError"):
        chosen(session, always=True)


def test_a_net_whose_code_differs_is_found_out_by_its_numbers() -> None:
    session = session_of(THREE)
    hook = groups_of(session)[0][1].module.network.net.register_forward_hook
    hook(lambda module, inputs, output: output + 1)
    (line,) = chosen(session, always=False).lines
    assert "two.logits would differ by 1" in line


def test_a_resumed_run_goes_on_as_it_began() -> None:
    first, second, third = session_of(THREE, ALWAYS), session_of(THREE), session_of(THREE)
    decide(first, None)
    state = training_state(first, 0.0)
    restore(second, state, "here")
    decide(second, state["teacher_ways"])
    assert ways(second) == [["batched", ["one", "two", "three"]]]
    assert decide(third, []) == ()
    assert ways(third) == []


def test_never_and_other_layouts_do_not_measure() -> None:
    for layer in ({"teacher_batching": "never"}, {"channels_last": True}):
        assert decide(session_of(THREE, {"runtime": layer}), None) == ()


def test_a_run_says_what_it_chose_and_writes_it_down(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    ready = prepared(THREE, {"out": str(tmp_path)})
    carry_out(ready, replace(quiet(), quiet=False, console=console))
    written = json.loads((ready.folder / "environment.json").read_text())["teacher_calls"]
    assert len(written) == 1
    assert written[0].startswith("teachers one, two, three: ")
    assert f"{ready.folder.name}: {written[0]}" in console.file.getvalue()


def test_always_is_refused_where_no_two_teachers_are_alike() -> None:
    layer = {"teachers": {"two": None, "three": None}}
    with pytest.raises(PlanError, match=r"runtime.teacher_batching: found 'always', but no two of one, slim can be"):
        check_run(prepared(THREE, layer, ALWAYS), quiet())
    check_run(prepared(THREE, ALWAYS), quiet())
    check_run(prepared(PLAIN, ALWAYS), quiet())


@pytest.mark.parametrize("option", ["compile", "channels_last"])
def test_always_does_not_go_with_other_layouts(option: str) -> None:
    with pytest.raises(ConfigError, match=f"found 'always', expected auto or never: .* go with `{option}`"):
        prepared(THREE, ALWAYS, {"runtime": {option: True}})


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime.teacher_batching: found 'yes', expected auto, never or always"):
        prepared(THREE, {"runtime": {"teacher_batching": "yes"}})


def test_the_way_of_calling_does_not_count_for_the_hash() -> None:
    assert prepared(THREE, ALWAYS).hash == prepared(THREE).hash


def test_what_is_asked_for_always_is_done_side_by_side_as_well() -> None:
    shared = Shared()
    sessions = [session_of(THREE, ALWAYS), session_of(THREE, ALWAYS)]
    for session in sessions:
        shared.join(session)
        decide(session, None)
        assert ways(session) == [["batched", ["one", "two", "three"]]]
    one, other = (session.teachers(session.feed.at(0), session.knobs.at(session.clock)) for session in sessions)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
