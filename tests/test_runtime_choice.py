"""Facts of `kdx/runtime_choice.py`: settings that a measurement decides, each in turn, stored for a resumed run."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import DISTIL, PLAIN, lines_of, prepared, quiet, run_in, session_of, weights_of
from torch import nn

from kdx import runs, runtime_choice
from kdx.checkpoint import load_state
from kdx.cli import main
from kdx.config import AUTO_RUNTIME, load_mapping
from kdx.devices import present_devices
from kdx.errors import CheckpointError, ConfigError
from kdx.loop import Session
from kdx.ranges import UNMEASURED
from kdx.resume import training_state
from kdx.runs import Options, carry_out
from kdx.runtime_choice import choose, settings
from kdx.sections import RuntimeOptions
from kdx.spec import RunSpec, full_config

OPEN: Mapping[str, Any] = {"runtime": "auto"}


def open_spec(**settings: Any) -> RunSpec:
    return prepared(DISTIL, {"runtime": {"device": "cpu", **settings}}).spec


def making(slow: Callable[[RuntimeOptions], float] = lambda runtime: 0.0) -> Callable[[RuntimeOptions], Session]:
    """Makes sessions whose student takes longer by so many seconds, as their settings say."""

    def make(runtime: RuntimeOptions) -> Session:
        session = session_of(DISTIL, {"runtime": {name: getattr(runtime, name) for name in UNMEASURED}})

        def wait(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            time.sleep(slow(runtime))

        session.learner.student.network.net.register_forward_hook(wait)
        return session

    return make


def never(runtime: RuntimeOptions) -> Session:
    raise AssertionError("a session was made")


def test_runtime_auto_leaves_every_setting_open() -> None:
    config = load_mapping({**PLAIN, "runtime": "auto"})
    assert config["runtime"] == AUTO_RUNTIME
    spec = prepared(PLAIN, OPEN).spec
    assert spec.measured == ("device", "precision", "channels_last", "compile", "workers")
    assert (spec.runtime.backend, spec.runtime.teacher_batching) == ("auto", "auto")
    assert {name: getattr(spec.runtime, name) for name in spec.measured} == UNMEASURED


def test_a_setting_by_hand_goes_with_runtime_auto() -> None:
    config = load_mapping({**PLAIN, "runtime": "auto"}, overrides=["runtime.precision=fp32", "runtime.workers=2"])
    assert config["runtime"] == {**AUTO_RUNTIME, "precision": "fp32", "workers": 2}
    config = load_mapping({**PLAIN, "runtime": {"device": "cpu"}}, overrides=["runtime=auto"])
    assert config["runtime"] == AUTO_RUNTIME


def test_the_full_config_keeps_what_is_open() -> None:
    spec = prepared(PLAIN, OPEN).spec
    runtime = full_config(spec)["runtime"]
    assert {name: runtime[name] for name in AUTO_RUNTIME} == AUTO_RUNTIME


def test_without_an_open_setting_nothing_is_measured() -> None:
    spec = open_spec(precision="fp32")
    assert choose(spec, never).runtime == spec.runtime
    assert choose(spec, never).lines == []


def test_only_the_precision_counts_for_the_hash() -> None:
    plain = prepared(DISTIL).hash
    assert prepared(DISTIL, {"runtime": {"channels_last": "auto", "compile": "auto", "workers": "auto"}}).hash == plain
    assert prepared(DISTIL, {"runtime": {"device": "auto"}}).hash == plain
    assert prepared(DISTIL, {"runtime": {"precision": "auto"}}).hash != plain


def test_a_run_that_says_nothing_of_precision_is_the_same_on_every_machine() -> None:
    silent = prepared(DISTIL, {"runtime": {"precision": None}})
    assert silent.spec.measured == ()
    assert silent.hash == prepared(DISTIL, {"runtime": {"precision": "fp32"}}).hash


@pytest.mark.parametrize(("slow", "taken"), [("cpu:0", "cpu"), ("cpu", "cpu:0")])
def test_the_device_on_which_an_update_takes_less_time_is_taken(slow: str, taken: str) -> None:
    make = making(lambda runtime: 0.03 if runtime.device == slow else 0.0)
    chosen = choose(open_spec(device="auto"), make, devices=["cpu", "cpu:0"])
    assert chosen.runtime.device == taken
    assert re.fullmatch(rf"{taken}, \S+ ms an update; {slow} \S+ ms", chosen.why["device"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_does_not_work_is_reported_and_not_taken() -> None:
    chosen = choose(open_spec(device="auto"), making(), devices=["cpu", "cuda"])
    assert chosen.runtime.device == "cpu"
    expected = r"cpu, \S+ ms an update; cuda does not work: runtime.device: found 'cuda', but this machine has no such"
    assert re.match(expected, chosen.why["device"])


def test_a_cpu_that_multiplies_far_too_slowly_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_choice, "_operations_a_second", lambda device: 1e6)
    made: list[str | None] = []

    def make(runtime: RuntimeOptions) -> Session:
        made.append(runtime.device)
        return making()(runtime)

    chosen = choose(open_spec(device="auto"), make, devices=["cpu:0", "cpu"])
    assert made == ["cpu:0"]
    expected = r"cpu:0, \S+ ms an update; cpu not tried, as its products of matrices alone would take \S+ m?s"
    assert re.fullmatch(expected, chosen.why["device"])


@pytest.mark.skipif(len(present_devices()) > 1, reason="this machine has several kinds of device")
def test_where_there_is_only_a_cpu_the_choice_says_so() -> None:
    assert choose(open_spec(device="auto"), making()).lines == ["runtime.device: cpu, the only one here"]


def test_operations_of_an_update_are_counted_and_a_cpu_does_some_in_a_second() -> None:
    trial = runtime_choice._Trial(making()(open_spec().runtime), never)
    assert trial.operations() > 10_000
    assert runtime_choice._operations_a_second(torch.device("cpu")) > 1e6


@pytest.mark.parametrize("faster", [True, False])
def test_the_layout_that_takes_less_time_is_taken(faster: bool) -> None:
    spec = open_spec(precision="fp32", channels_last="auto")
    chosen = choose(spec, making(lambda runtime: 0.02 if runtime.channels_last is not faster else 0.0))
    assert chosen.runtime == replace(spec.runtime, channels_last=faster)
    (line,) = chosen.lines
    now, than = ("true", "false") if faster else ("false", "true")
    assert re.fullmatch(rf"runtime.channels_last: {now}, \S+ ms an update; {than} \S+ ms", line)


@pytest.mark.parametrize("faster", [True, False])
def test_where_the_chosen_layout_excludes_one_call_of_teachers_the_choice_says_so(faster: bool) -> None:
    twin = {"teachers": {"twin": {"use": "small", "width": 8}}, "targets": {"all": {"use": "mean"}}}
    both = {"losses": {"kd": {"inputs": {"teacher": "all.logits"}}}, "runtime": {"channels_last": "auto"}}
    chosen = choose(prepared(DISTIL, twin, both).spec, making(lambda runtime: 0.02 * (runtime.channels_last != faster)))
    expected = "runtime.teacher_batching: never, as stacked weights do not go with channels_last"
    assert (expected in chosen.lines) is faster


@pytest.mark.parametrize(("times", "low"), [(0.5, "bf16"), (14.0, "fp32")])
def test_bf16_is_tried_where_products_are_faster_in_it(times: float, low: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_choice, "_half_of_products", lambda device, low: times)
    spec = open_spec(precision="auto")
    chosen = choose(spec, making(lambda runtime: 0.03 if runtime.precision == "fp32" else 0.0))
    assert chosen.runtime.precision == low
    if low == "fp32":
        assert chosen.why["precision"] == "fp32, as products of matrices take 14 times as long in bf16"
    else:
        assert re.fullmatch(r"bf16, \S+ ms an update; fp32 \S+ ms", chosen.why["precision"])


def test_a_precision_in_which_numbers_are_not_finite_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_choice, "_half_of_products", lambda device, low: 0.5)

    def make(runtime: RuntimeOptions) -> Session:
        session = making(lambda runtime: 0.01 if runtime.precision == "fp32" else 0.0)(runtime)
        if runtime.precision == "bf16":
            session.learner.student.network.net.head.register_forward_hook(lambda module, inputs, out: out * math.nan)
        return session

    chosen = choose(open_spec(precision="auto"), make)
    assert chosen.runtime.precision == "fp32"
    assert chosen.why["precision"] == "fp32: losses or gradients were nan or inf in updates that were timed"


def test_products_are_timed_on_this_very_machine() -> None:
    assert 0.01 < runtime_choice._half_of_products(torch.device("cpu"), "bf16") < 1000


@pytest.mark.parametrize(("times", "taken"), [(0.1, "bf16"), (0.7, "fp32")])
def test_products_alone_decide_the_precision_of_several_processes(
    times: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_choice, "_half_of_products", lambda device, low: times)
    spec = open_spec(precision="auto", workers="auto")
    chosen = runtime_choice._for_several(spec.runtime, spec.measured, None)
    assert (chosen.runtime.precision, chosen.runtime.workers) == (taken, 0)
    assert chosen.why == {
        "precision": f"{taken}, as products of matrices take {times} times as long in bf16; several processes train "
        "together",
        "workers": "0, not measured; several processes train together",
    }


def test_a_run_takes_the_precision_of_its_plain_student() -> None:
    chosen = choose(open_spec(precision="auto"), making(), plain="bf16")
    assert chosen.runtime.precision == "bf16"
    assert chosen.why == {"precision": "bf16, as the plain student has it"}


def test_the_precision_of_the_plain_student_is_read_from_its_folder(tmp_path: Path) -> None:
    ready = prepared(DISTIL, {"runtime": {"precision": "auto"}, "baseline": True, "out": str(tmp_path)})
    assert ready.plain is not None
    ready.plain.folder.mkdir()
    (ready.plain.folder / "environment.json").write_text('{"precision": "bf16"}')
    chosen = runs._chosen(ready, quiet(), None)
    assert chosen.lines == ["runtime.precision: bf16, as the plain student has it"]


def test_a_compilation_that_cannot_pay_is_not_tried() -> None:
    chosen = choose(open_spec(precision="fp32", compile="auto"), making())
    assert chosen.runtime.compile is False
    assert re.fullmatch(r"false, as the whole training takes about \S+ s", chosen.why["compile"])


def test_what_does_not_compile_falls_back_with_the_reason() -> None:
    sessions = making()

    def make(runtime: RuntimeOptions) -> Session:
        if runtime.compile:
            raise ConfigError("runtime.compile: the updater pcgrad takes the step apart")
        return sessions(runtime)

    chosen = choose(open_spec(precision="fp32", compile="auto"), make, worth_compiling=0.0)
    assert chosen.why["compile"] == "false: runtime.compile: the updater pcgrad takes the step apart"


def test_a_setting_that_does_not_work_is_not_taken() -> None:
    def fail(runtime: RuntimeOptions) -> float:
        if runtime.channels_last:
            raise RuntimeError("no kernel for this layout\nin detail")
        return 0.0

    chosen = choose(open_spec(precision="fp32", channels_last="auto"), making(fail))
    assert chosen.runtime.channels_last is False
    assert chosen.lines == [
        "runtime.channels_last: false, as true does not work: RuntimeError: no kernel for this layout"
    ]


def test_reading_that_takes_no_time_stays_in_the_process() -> None:
    spec = open_spec(precision="fp32", workers="auto")
    chosen = choose(spec, making(lambda runtime: 0.05))
    assert chosen.runtime.workers == 0
    assert re.match(r"0, as reading a batch takes \S+ ms and an update \S+ ms", chosen.why["workers"])


def test_slow_reading_gets_a_worker_where_there_is_a_core_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_choice, "_cores", lambda: 3)
    session = session_of(DISTIL, {"data": {"size": 400}})
    split = session.splits.train.source
    real = split.fetch

    def slowly(indices: Any) -> Any:
        time.sleep(0.04)
        return real(indices)

    split.fetch = slowly  # type: ignore[method-assign]
    busy = session.learner.student.network.net
    busy.register_forward_hook(lambda module, inputs, output: time.sleep(0.05))
    chosen = choose(open_spec(precision="fp32", workers="auto"), lambda runtime: session)
    assert chosen.runtime.workers == 1
    assert re.fullmatch(r"1, \S+ ms an update with its batch; 0 \S+ ms", chosen.why["workers"])


def test_a_measurement_leaves_torchs_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    choose(open_spec(precision="fp32", channels_last="auto"), making())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run_takes_what_it_began_with() -> None:
    spec = open_spec(precision="auto", channels_last="auto", workers=1)
    known = {"device": "cpu", "precision": "bf16", "channels_last": True, "compile": True, "workers": 3}
    chosen = choose(spec, never, known)
    assert chosen.runtime == replace(spec.runtime, precision="bf16", channels_last=True)
    assert chosen.why == {"precision": "bf16, as the run began", "channels_last": "true, as the run began"}


@pytest.mark.skipif(len(present_devices()) > 1, reason="this machine has several kinds of device")
@pytest.mark.parametrize("known", [{"precision": "auto"}, {}])
def test_a_checkpoint_that_does_not_say_its_precision_is_refused(known: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"^runtime.precision: found .* in the checkpoint, expected one of fp32, "
    ):
        choose(open_spec(precision="auto"), never, known)


def test_a_run_that_began_on_a_device_that_is_not_here_goes_on_where_it_can() -> None:
    chosen = choose(open_spec(device="auto", precision="auto"), never, {"device": "cuda", "precision": "bf16"})
    assert (chosen.runtime.device, chosen.runtime.precision) == (None, "bf16")
    assert chosen.why["device"] == "cpu, the first that is here; what the run began on is not"


def test_a_checkpoint_keeps_the_settings_of_its_session() -> None:
    session = session_of(DISTIL, {"runtime": {"channels_last": True}})
    expected = {**UNMEASURED, "device": "cpu", "channels_last": True}
    assert settings(session.spec) == expected
    assert training_state(session, 0.0)["settings"] == expected


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"workers": "many"}, r"runtime.workers: found 'many', expected 0 or more, or auto"),
        ({"workers": -1}, r"runtime.workers: found -1, expected 0 or more, or auto"),
        ({"compile": "yes"}, r"runtime.compile: found 'yes', expected true, false or auto"),
        ({"channels_last": 1}, r"runtime.channels_last: found 1, expected true, false or auto"),
        (
            {"compile": "auto", "teacher_batching": "always"},
            r"runtime.compile: found 'auto' beside `teacher_batching: always`, .* expected false",
        ),
        ({"precision": "quick"}, r"runtime.precision: found 'quick', expected one of auto, fp32, bf16, fp16"),
    ],
)
def test_other_words_are_refused(layer: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(PLAIN, {"runtime": layer})


def test_a_teachers_own_precision_is_not_measured() -> None:
    with pytest.raises(ConfigError, match=r"teachers.wide.precision: found 'auto', expected one of fp32, bf16, fp16"):
        prepared(DISTIL, {"teachers": {"wide": {"precision": "auto"}}})


def test_a_run_says_what_it_chose_keeps_it_and_explain_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = {"runtime": "auto", "out": str(tmp_path)}
    console = Console(file=io.StringIO(), width=300)
    ready = prepared(DISTIL, layer)
    result = carry_out(ready, replace(quiet(), quiet=False, console=console))
    about = json.loads((ready.folder / "environment.json").read_text())
    assert list(about["runtime"]) == ["device", "precision", "channels_last", "compile", "workers"]
    assert f"{ready.folder.name}: {about['teacher_calls'][0]}" in console.file.getvalue()
    assert about["teacher_calls"][0].startswith("teacher wide: eager, ")
    for name, why in about["runtime"].items():
        assert f"{ready.folder.name}: runtime.{name}: {why}" in console.file.getvalue()
        assert f"runtime.{name}" in (ready.folder / "report.md").read_text()
    assert result.status == "finished"
    file = tmp_path / "config.yaml"
    file.write_text((ready.folder / "config.yaml").read_text())
    assert main(["explain", str(file)]) == 0
    said = capsys.readouterr().out
    names = ", ".join(f"runtime.{name}" for name in (*UNMEASURED, "backend"))
    assert f"a measurement decides when the run starts: {names}" in said
    assert f"runtime.precision: {about['runtime']['precision']}" in said


def test_a_measurement_changes_nothing_but_what_it_chose(tmp_path: Path) -> None:
    """The trained weights are those of a run with the chosen settings by hand."""
    measured = run_in(tmp_path / "a", DISTIL, {"runtime": {"workers": "auto", "compile": "auto"}})
    plain = run_in(tmp_path / "b", DISTIL)
    assert measured.folder.name == plain.folder.name
    own, mine = weights_of(measured.folder), weights_of(plain.folder)
    assert all(torch.equal(value, mine[name]) for name, value in own.items())
    one, other = (
        [line["terms"] for line in lines_of(run.folder) if line["kind"] == "step"] for run in (measured, plain)
    )
    assert one == other


def test_a_stopped_run_goes_on_with_the_stored_settings(tmp_path: Path) -> None:
    layer = {"runtime": {"channels_last": "auto"}, "out": str(tmp_path)}
    ready, asked = prepared(DISTIL, layer), iter([False, False, False, True, True, True])
    with pytest.raises(Exception, match="stopped after update"):
        carry_out(ready, Options(quiet=True, console=quiet().console, stop=lambda: next(asked)))
    state = load_state(ready.folder / "checkpoint")
    assert state is not None
    carry_out(ready, quiet())
    about = json.loads((ready.folder / "environment.json").read_text())
    word = str(state["settings"]["channels_last"]).lower()
    assert about["runtime"] == {"channels_last": f"{word}, as the run began"}
