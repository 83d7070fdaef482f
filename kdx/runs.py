"""Runs: folders named by the hash of all that decides the result, and runs that need other runs."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import filelock
import torch
from rich.console import Console
from torch import nn

from kdx.builtin.watchers import JsonLines, Progress, TensorBoard
from kdx.checkpoint import load_state, load_weights, save_state, save_weights
from kdx.components import Dataset, Network
from kdx.config import to_yaml
from kdx.data import SplitOptions, Splits, make_splits
from kdx.deploy import check_answer
from kdx.derive import expand_runs, plain_config, with_networks
from kdx.errors import CheckpointError, ConfigError, KdxError
from kdx.files import write_text
from kdx.identity import environment, run_hash
from kdx.loop import Session, Watchers, batch_teachers, make_session, training
from kdx.options import plain_options
from kdx.outcome import conclude, run_row
from kdx.plan import Plan, make_plan
from kdx.plugins import Registry, compile_hook, discover
from kdx.preflight import check_ready
from kdx.randomness import derive_seed
from kdx.reach import Reach, reach
from kdx.report import write_report
from kdx.result import Result, read_result, write_result
from kdx.resume import restore, training_state
from kdx.runtime import Runtime
from kdx.spec import ModelSpec, RunSpec, check, full_config
from kdx.student import STUDENT
from kdx.table import plan_text
from kdx.types import Batch, RunInfo
from kdx.views import Viewed, with_views

CHECKPOINT = "checkpoint"
PLACE = ("device", "workers", "threads", "eval_batch")
"""What of `runtime` changes no number, and is handed down to the runs that a run needs."""
BEST = "best.safetensors"


class Stopped(KdxError):  # noqa: N818  (it is no failure)
    """A run was asked to stop; it has saved its state and goes on when it is started again."""


@dataclass(frozen=True)
class Options:
    """How runs are carried out, as opposed to what they compute."""

    fresh: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))
    quiet: bool = False
    data: Dataset | None = None
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    stop: Callable[[], bool] = field(default=lambda: False)
    trained: set[Path] = field(default_factory=set)
    """The folders that were trained already: `fresh` trains each of them once."""
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
    digest = run_hash(spec, dataset, reached, {name: need.hash for name, need in needs.items()})
    folder = Path(spec.root.out) / f"{spec.root.name}-{digest}"
    plain = None
    if spec.root.baseline and (derived := plain_config(spec, reached.models, splits)) is not None:
        own = {name: net for name, net in options.networks.items() if name == "student"}
        plain = prepare(derived, replace(options, networks=own), registry=registry)
    return Prepared(spec, dataset, splits, sample, reached, digest, folder, needs, plain, given)


def _prepare_need(run: Mapping[str, Any], spec: RunSpec, options: Options) -> Prepared:
    """A run that a model comes from. Data handed in from Python is its data too if its config says `use: tensors`; it
    computes where this run does, unless its own config says otherwise.
    """
    data = options.data if (run.get("data") or {}).get("use") == "tensors" else None
    place = {name: value for name in PLACE if (value := getattr(spec.runtime, name)) is not None}
    config = {**run, "out": spec.root.out, "baseline": False, "runtime": {**place, **(run.get("runtime") or {})}}
    return prepare(config, replace(options, networks={}, data=data))


def build_plan(prepared: Prepared, options: Options, *, trained: bool, device: torch.device | None = None) -> Plan:
    """The plan of a prepared run; with `trained`, teachers have the weights of their runs and checkpoints."""

    def ready(spec: ModelSpec, network: Network) -> None:
        if spec.engine.checkpoint is not None:
            load_weights(network.net, Path(spec.engine.checkpoint), f"{spec.where}.checkpoint")
        if spec.name in prepared.needs:
            load_weights(network.net, prepared.needs[spec.name].folder / STUDENT, f"{spec.where}.run")

    spec = prepared.spec
    networks = {name: net for name, net in options.networks.items() if name in spec.models}
    plan = make_plan(
        spec,
        prepared.splits.facts,
        prepared.sample,
        device=device,
        ready=ready if trained else None,
        networks=_copies(networks),
        classes={name: need.splits.facts.classes for name, need in prepared.needs.items() if name in spec.teachers},
    )
    check_answer(plan, {name: value[:2].to(device or "cpu") for name, value in prepared.sample.items()})
    compile_hook(spec.registry, "kdx_plan_ready")(plan)
    return plan


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
    """Refuse whatever can be refused before the runs that a run needs are trained; gives its plan."""
    runtime = Runtime(prepared.spec.runtime)
    plan = build_plan(prepared, options, trained=False)
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
    with locked(folder, options.console):
        if options.fresh and folder not in options.trained:
            _clear(folder)
        if finished(prepared):
            _say(options, f"{folder.name}: finished before, taken as it is")
            return _completed(prepared)
        with _own_randomness(prepared.spec.root.seed):
            result = yield from _train(prepared, options)
        options.trained.add(folder)
        return result


def _completed(prepared: Prepared) -> Result:
    """The result in the folder, with all that an earlier process did not come to, or was not asked for."""
    folder, plain = prepared.folder, prepared.plain
    found = read_result(folder)
    result = replace(found, name=prepared.spec.root.shown_name)
    if plain is not None and result.plain is None:
        result = replace(result, plain=run_row(plain.folder, read_result(plain.folder)))
    if result != found:
        write_result(folder, result)
        write_report(folder)
    elif not (folder / "report.html").is_file():
        write_report(folder)
    return result


def finished(prepared: Prepared) -> bool:
    """Whether the folder holds a complete result of this very run."""
    try:
        result = read_result(prepared.folder)
    except (CheckpointError, OSError):
        return False
    return result.hash == prepared.hash and result.status == "finished" and (prepared.folder / STUDENT).is_file()


class _Worked:
    """Seconds of work on a run, without its pauses."""

    def __init__(self) -> None:
        self.before = 0.0
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the block."""
        left = time.perf_counter()
        yield
        self._began += time.perf_counter() - left


def _train(prepared: Prepared, options: Options) -> Generator[None, None, Result]:
    """Train a run from where it stands, and write everything that it leaves."""
    worked = _Worked()
    spec, folder = prepared.spec, prepared.folder
    runtime = Runtime(spec.runtime)
    plan = build_plan(prepared, options, trained=True, device=runtime.device)
    session = make_session(spec, plan, prepared.dataset, prepared.splits, runtime)
    options.join(session)
    write_text(folder / "config.given.yaml", prepared.given)
    write_text(folder / "config.yaml", to_yaml(full_config(spec)))
    write_text(folder / "plan.txt", plan_text(plan))
    folders = {name: need.folder.name for name, need in prepared.needs.items()}
    about = environment(
        spec,
        prepared.reached,
        hash=prepared.hash,
        needs=folders,
        device=str(runtime.device),
        precision=runtime.precision,
    )
    state = load_state(folder / CHECKPOINT)
    if state is not None:
        restore(session, state, str(folder / CHECKPOINT))
        worked.before = state["seconds"]
        _say(options, f"{folder.name}: goes on after update {session.step} of {session.steps}")
    about["teacher_calls"] = batch_teachers(session, None if state is None else state["batched"])
    for line in about["teacher_calls"]:
        _say(options, f"{folder.name}: {line}")
    write_text(folder / "environment.json", json.dumps(about, indent=2) + "\n")
    info = RunInfo(
        spec.root.name, folder, prepared.hash, spec.config, session.steps, session.steps_per_epoch, session.step
    )
    lines = JsonLines(folder)
    bars = Progress(options.console, spec.root.shown_name, options.quiet)

    def save(session: Session) -> None:
        lines.flush()
        save_state(folder / CHECKPOINT, training_state(session, worked.seconds()))

    def improved(session: Session) -> None:
        save_weights(session.student.net, folder / CHECKPOINT / BEST)

    with watching(spec.registry, lines, TensorBoard(folder), bars):
        step_end, eval_end = (compile_hook(spec.registry, hook) for hook in ("kdx_step_end", "kdx_eval_end"))
        compile_hook(spec.registry, "kdx_run_start")(info)
        try:
            if session.step < session.steps:
                for _ in training(session, Watchers(step_end, eval_end, improved, save, options.stop)):
                    with worked.paused():
                        yield
        finally:
            compile_hook(spec.registry, "kdx_run_end")(info)
    if session.step < session.steps:
        raise Stopped(f"{folder.name}: stopped after update {session.step} of {session.steps}; start it again to go on")
    result = conclude(
        session,
        folder / CHECKPOINT / BEST,
        folder,
        hash=prepared.hash,
        needs={name: (need.folder, read_result(need.folder)) for name, need in prepared.needs.items()},
        plain=None if prepared.plain is None else (prepared.plain.folder, read_result(prepared.plain.folder)),
        seconds=worked.seconds(),
    )
    write_result(folder, result)
    write_report(folder)
    return result


@contextmanager
def watching(registry: Registry, *watchers: object) -> Iterator[None]:
    """Register watchers of one run for the length of the block."""
    for watcher in watchers:
        registry.manager.register(watcher, name=f"kdx {type(watcher).__name__}")
    try:
        yield
    finally:
        for watcher in watchers:
            registry.manager.unregister(watcher)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Torch's global random numbers, which dropout draws, follow the run's seed; the caller's go on undisturbed."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive_seed(seed, "training"))
        yield


@contextmanager
def locked(folder: Path, console: Console) -> Iterator[None]:
    """Hold the lock of a run's folder; it is let go when the process ends, however it ends."""
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print(f"{folder.name}: another process works on it; waiting", markup=False, highlight=False)
        lock.acquire()
    except OSError as error:
        raise KdxError(f"out: nothing can be written into {folder.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _clear(folder: Path) -> None:
    """Take away what an earlier run left, so that a fresh one starts from nothing."""
    if folder.exists():
        shutil.rmtree(folder)


def _make_dataset(spec: RunSpec, given: Dataset | None) -> Dataset:
    dataset: Dataset = spec.data.entry.component(spec.data.options) if given is None else given
    named: Mapping[str, Any] = spec.config.get("data", {}).get("views") or {}
    options = {name: plain_options(view.options) for name, view in spec.views.items()}
    return with_views(dataset, {name: {key: own[key] for key in named[name] or {}} for name, own in options.items()})


def _copies(networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies, so that a person's own modules stay as they were."""
    return {name: copy.deepcopy(net) for name, net in networks.items()}


def _say(options: Options, text: str) -> None:
    if not options.quiet:
        options.console.print(text, markup=False, highlight=False)
