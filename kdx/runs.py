"""Runs: folders named by the hash of all that decides the result, and runs that need other runs."""

from __future__ import annotations

import copy
import json
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from kdx.builtin.watchers import JsonLines, Progress, TensorBoard
from kdx.cache_fill import fill, held
from kdx.cache_key import Wanted, caches
from kdx.cache_targets import lacking_for, opened_for, target_caches
from kdx.checkpoint import STUDENT, checked_sum, load_state, load_weights
from kdx.components import Dataset, Network
from kdx.config import to_yaml
from kdx.data import SplitOptions, Splits, make_splits
from kdx.deploy import check_answer
from kdx.derive import expand_runs, plain_config, with_networks
from kdx.distributed import the_group
from kdx.errors import CheckpointError, ConfigError
from kdx.files import clear_once, full_disk_is_said, write_text
from kdx.garbage import as_usual, set_aside
from kdx.identity import environment, run_hash
from kdx.locks import locked
from kdx.loop import Session, Watchers, make_session, training
from kdx.micro_batch import fit
from kdx.options import plain_options
from kdx.outcome import conclude, run_row
from kdx.overlap import overlap
from kdx.plan import Plan, make_plan
from kdx.plugins import Registry, compile_hook, discover
from kdx.preflight import check_ready
from kdx.randomness import own_randomness
from kdx.reach import Reach, reach
from kdx.report import environment_of, write_report
from kdx.result import FILE as RESULT
from kdx.result import Result, read_result, write_result
from kdx.resume import restore
from kdx.runtime import Runtime
from kdx.runtime_choice import Chosen, choose
from kdx.saving import Saver
from kdx.sections import RuntimeOptions
from kdx.spec import ModelSpec, RunSpec, check, full_config
from kdx.stopping import Stopped as Stopped
from kdx.table import plan_text
from kdx.types import Batch, RunInfo
from kdx.views import Viewed, with_views
from kdx.watching import watching
from kdx.ways import decide
from kdx.worked import Worked

CHECKPOINT = "checkpoint"
PLACE = ("device", "workers", "threads", "eval_batch")
"""What of `runtime` changes no number, and is handed down to the runs that a run needs."""


@dataclass(frozen=True)
class Options:
    """How runs are carried out, as opposed to what they compute."""

    fresh: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))
    quiet: bool = False
    data: Dataset | None = None
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    stop: Callable[[], bool] = field(default=lambda: False)
    command: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells commands apart: with `fresh` one begins each folder anew once, whatever becomes of its processes."""
    join: Callable[[Session], None] = field(default=lambda session: None)
    """Called with a session before it trains; runs that train side by side share there what they read."""


@dataclass(frozen=True)
class Prepared:
    """A config that has been understood, with its data opened and its folder named; nothing is trained yet."""

    spec: RunSpec
    dataset: Dataset
    splits: Splits
    sample: Batch
    reached: Reach
    hash: str
    folder: Path
    needs: Mapping[str, Prepared]
    plain: Prepared | None
    given: str
    caches: Mapping[str, Wanted] = field(default_factory=dict)


def prepare(
    config: Mapping[str, Any],
    options: Options | None = None,
    *,
    registry: Registry | None = None,
    given: str | None = None,
) -> Prepared:
    """Check a resolved config, open its data, and name its folder and those of the runs that it needs.

    `given` is the text that the run folder keeps as the config that a person wrote.
    """
    options = options or Options()
    given = to_yaml(config) if given is None else given
    config = expand_runs(config)
    if options.networks:
        config = with_networks(config, options.networks)
    if options.data is not None:
        kept = {"views", *(item.name for item in fields(SplitOptions))}
        data = config.get("data") or {}
        config["data"] = {"use": "tensors", **{key: value for key, value in data.items() if key in kept}}
    if registry is None:
        plugins = config.get("plugins") or []
        if not isinstance(plugins, list) or not all(isinstance(item, str) for item in plugins):
            raise ConfigError(f"plugins: found {plugins!r}, expected a list of files and modules")
        registry = discover(plugins, installed=config.get("installed_plugins", True) is not False)
    spec = check(config, registry)
    dataset = _make_dataset(spec, options.data)
    splits = make_splits(dataset, spec.splits)
    reached = reach(spec, splits.facts)
    dataset = dataset.only(reached.views) if isinstance(dataset, Viewed) else dataset
    sample = dataset.on_device(splits.train.fetch([0, min(1, len(splits.train) - 1)]), None)
    needs = {
        name: _prepare_need(spec.models[name].engine.run, spec, options)
        for name in reached.models
        if spec.models[name].engine.run is not None
    }
    hashes = {name: need.hash for name, need in needs.items()}
    digest = run_hash(spec, dataset, reached, hashes)
    folder = Path(spec.root.out) / f"{spec.root.name}-{digest}"
    plain = None
    if spec.root.baseline and (derived := plain_config(spec, reached.models, splits)) is not None:
        own = {name: net for name, net in options.networks.items() if name == "student"}
        plain = prepare(derived, replace(options, networks=own), registry=registry)
    stored = {
        **caches(spec, dataset, splits, reached, hashes), **target_caches(spec, dataset, splits, reached, hashes)
    }  # fmt: skip
    stored = {
        item: replace(one, runs=tuple(needs[name].folder for name in sorted(one.teachers & needs.keys())))
        for item, one in stored.items()
    }
    return Prepared(spec, dataset, splits, sample, reached, digest, folder, needs, plain, given, stored)


def _prepare_need(run: Mapping[str, Any], spec: RunSpec, options: Options) -> Prepared:
    """A run that a model comes from. Data handed in from Python is its data too if its config says `use: tensors`; it
    computes where this run does, unless its own config says otherwise.
    """
    data = options.data if (run.get("data") or {}).get("use") == "tensors" else None
    place = {name: value for name in PLACE if (value := getattr(spec.runtime, name)) is not None}
    config = {**run, "out": spec.root.out, "baseline": False, "runtime": {**place, **(run.get("runtime") or {})}}
    return prepare(config, replace(options, networks={}, data=data))


def build_plan(
    prepared: Prepared, options: Options, *, trained: bool, device: torch.device | None = None, rough: bool = False
) -> Plan:
    """The plan of a prepared run; with `trained`, teachers have the weights of their runs and checkpoints."""

    def ready(spec: ModelSpec, network: Network) -> None:
        if spec.engine.checkpoint is not None:
            load_weights(network.net, Path(spec.engine.checkpoint), f"{spec.where}.checkpoint")
        if spec.name in prepared.needs:
            load_weights(network.net, prepared.needs[spec.name].folder / STUDENT, f"{spec.where}.run")

    spec = prepared.spec
    # Copies, so that a person's own modules stay as they were.
    networks = {name: copy.deepcopy(net) for name, net in options.networks.items() if name in spec.models}
    plan = make_plan(
        spec,
        prepared.splits.facts,
        prepared.sample,
        device=device,
        ready=ready if trained else None,
        networks=networks,
        classes={name: need.splits.facts.classes for name, need in prepared.needs.items() if name in spec.teachers},
        stored=opened_for(prepared.caches, prepared.reached, prepared.splits, verify=trained),
        rough=rough,
    )
    check_answer(plan, {name: value[:2].to(device or "cpu") for name, value in prepared.sample.items()})
    compile_hook(spec.registry, "kdx_plan_ready")(plan)
    return plan


def fill_caches(prepared: Prepared, options: Options, runtime: Runtime) -> None:
    """Fill what a run reads and no cache holds, from its teachers, whose own runs are finished."""
    needed = prepared.caches, prepared.reached, prepared.splits
    while missing := lacking_for(*needed):
        with held(missing, lambda text: _say(options, text), options.stop):
            if lacking_for(*needed) != missing:  # another process has just filled some of it
                continue
            plan = build_plan(prepared, options, trained=True, device=runtime.device)
            with as_usual():
                fill(plan, missing, prepared.dataset, prepared.splits, runtime, options.console,
                     quiet=options.quiet, stop=options.stop)  # fmt: skip


def carry_out(prepared: Prepared, options: Options) -> Result:
    """Train what is missing and give the result: first the runs that this one needs, then the plain student, then
    this one. A finished run with the same hash is taken as it is; a half-finished one goes on.
    """
    for one, how in family(prepared, options):  # whatever can be refused is refused before anything trains
        if options.fresh or not finished(one):
            check_run(one, how)
    for one, how in family(prepared, options):
        result = to_its_end(steps_of(one, how))
    return result


def to_its_end(steps: Generator[None, None, Result]) -> Result:
    """Go through all pauses of a run."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


def check_run(prepared: Prepared, options: Options) -> Plan:
    """Refuse whatever can be refused before the runs that a run needs are trained; gives its plan, a rough one."""
    set_aside()
    runtime = Runtime(prepared.spec.runtime)
    plan = build_plan(prepared, options, trained=False, rough=True)
    check_ready(plan, prepared.dataset, prepared.splits, runtime)
    return plan


def family(prepared: Prepared, options: Options) -> Iterator[tuple[Prepared, Options]]:
    """A run and all that it needs, each once, the needed ones first, with how each is carried out."""
    seen: set[Path] = set()

    def walk(one: Prepared, how: Options) -> Iterator[tuple[Prepared, Options]]:
        for need in one.needs.values():
            yield from walk(need, replace(how, networks={}))
        if one.plain is not None:
            yield from walk(one.plain, how)
        if one.folder not in seen:
            seen.add(one.folder)
            yield one, how

    return walk(prepared, options)


def steps_of(prepared: Prepared, options: Options) -> Generator[None, None, Result]:
    """Take a run as it is or train it, without those that it needs, and pause before each of its updates."""
    folder = prepared.folder
    with locked(folder, options.console, options.stop), full_disk_is_said(folder):
        if options.fresh and the_group().leads:
            clear_once(folder, options.command)
        if finished(prepared):
            _say(options, f"{folder.name}: finished before, taken as it is")
            return _completed(prepared)
        with own_randomness(prepared.spec.root.seed):
            return (yield from _train(prepared, options))


def _completed(prepared: Prepared) -> Result:
    """The result in the folder, with all that an earlier process did not come to, or was not asked for."""
    folder, plain = prepared.folder, prepared.plain
    found = read_result(folder)
    result = replace(found, name=prepared.spec.root.shown_name)
    if plain is not None and result.plain is None:
        result = replace(result, plain=run_row(plain.folder, read_result(plain.folder)))
    if the_group().leads and result != found:
        write_result(folder, result)
    if the_group().leads and (result != found or not (folder / "report.html").is_file()):
        write_report(folder)
    return result


def finished(prepared: Prepared) -> bool:
    """Whether the folder holds a complete result of this very run, unaltered; the same on all processes."""
    folder = prepared.folder
    try:
        result = read_result(folder)
        if (whole := (folder / STUDENT).is_file()) and result.student not in ("", checked_sum(folder / STUDENT)):
            raise CheckpointError(f"{folder / STUDENT} is not the student of this result: it has another checksum")
    except (CheckpointError, OSError) as error:
        if (folder / RESULT).is_file():
            warnings.warn(f"{error}; it is not used, and is made anew", stacklevel=2)
        return the_group().agreed(False)
    return the_group().agreed(whole and result.hash == prepared.hash and result.status == "finished")


def _train(prepared: Prepared, options: Options) -> Generator[None, None, Result]:
    """Train a run from where it stands, and write everything that it leaves."""
    worked = Worked()
    given, folder, group = prepared.spec, prepared.folder, the_group()
    lines = JsonLines(folder)
    saver = Saver(folder / CHECKPOINT, lines, worked, given.train.save_minutes)
    with group.in_turn():
        fill_caches(prepared, options, Runtime(given.runtime))
        state = load_state(folder / CHECKPOINT)
    chosen = _chosen(prepared, options, state)
    spec = replace(given, runtime=chosen.runtime)
    prepared, runtime = replace(prepared, spec=spec), Runtime(spec.runtime)
    plan = build_plan(prepared, options, trained=True, device=runtime.device)
    session = make_session(spec, plan, prepared.dataset, prepared.splits, runtime)
    options.join(session)
    if group.leads:
        write_text(folder / "config.given.yaml", prepared.given)
        write_text(folder / "config.yaml", to_yaml(full_config(given)))
        write_text(folder / "plan.txt", plan_text(plan))
    folders = {name: need.folder.name for name, need in prepared.needs.items()}
    about = environment(
        spec,
        prepared.reached,
        hash=prepared.hash,
        needs=folders,
        device=str(runtime.device),
        precision=runtime.precision,
        processes=group.size,
    )
    if state is not None:
        restore(session, state, str(folder / CHECKPOINT))
        saver.take_up(state)
        worked.before = state["seconds"]
        _say(options, f"{folder.name}: goes on after update {session.step} of {session.steps}")
    about["runtime"] = chosen.why
    about["micro_batch"] = fit(session, None if state is None else state["accumulate"])
    about["teacher_calls"] = decide(session, None if state is None else state["teacher_ways"]) + overlap(session)
    for line in (*chosen.lines, *about["micro_batch"], *about["teacher_calls"]):
        _say(options, f"{folder.name}: {line}")
    if group.leads:
        write_text(folder / "environment.json", json.dumps(about, indent=2) + "\n")
    info = RunInfo(
        spec.root.name, folder, prepared.hash, spec.config, session.steps, session.steps_per_epoch, session.step
    )
    bars = Progress(options.console, spec.root.shown_name, options.quiet)
    with watching(spec.registry, bars, lines, TensorBoard(folder), leads=group.leads) as hook:
        stop = group.stop(options.stop)
        hook("kdx_run_start")(info)
        try:
            if session.step < session.steps:
                watchers = Watchers(
                    hook("kdx_step_end"), hook("kdx_eval_end"), saver.improved, saver.save, stop, saver.is_due
                )
                with as_usual():
                    for _ in training(session, watchers):
                        with worked.paused():
                            yield
        finally:
            hook("kdx_run_end")(info)
    if session.step < session.steps:
        raise Stopped(f"{folder.name}: stopped after update {session.step} of {session.steps}; start it again to go on")
    result = conclude(
        session,
        saver.best(session),
        folder,
        hash=prepared.hash,
        needs={name: (need.folder, read_result(need.folder)) for name, need in prepared.needs.items()},
        plain=None if prepared.plain is None else (prepared.plain.folder, read_result(prepared.plain.folder)),
        seconds=worked.seconds(),
    )
    if group.leads:
        write_result(folder, result)
        write_report(folder)
    group.wait()
    return result


def _chosen(prepared: Prepared, options: Options, state: Mapping[str, Any] | None) -> Chosen:
    """What is chosen of `runtime`, with sessions that lack the weights of the teachers' runs."""

    def make(runtime: RuntimeOptions) -> Session:
        tried, here = replace(prepared, spec=replace(prepared.spec, runtime=runtime)), Runtime(runtime)
        plan = build_plan(tried, options, trained=False, device=here.device)
        session = make_session(tried.spec, plan, prepared.dataset, prepared.splits, here)
        fit(session, None)
        return session

    plain = None if prepared.plain is None else environment_of(prepared.plain.folder).get("precision")
    return choose(prepared.spec, make, None if state is None else state["settings"], plain=plain)


def _make_dataset(spec: RunSpec, given: Dataset | None) -> Dataset:
    dataset: Dataset = spec.data.entry.component(spec.data.options) if given is None else given
    named: Mapping[str, Any] = spec.config.get("data", {}).get("views") or {}
    options = {name: plain_options(view.options) for name, view in spec.views.items()}
    return with_views(dataset, {name: {key: own[key] for key in named[name] or {}} for name, own in options.items()})


def _say(options: Options, text: str) -> None:
    if not options.quiet and the_group().leads:
        options.console.print(text, markup=False, highlight=False)
