"""Runs: folders named by the hash of all that decides the result, and runs that need other runs."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
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
from kdx.config import load_mapping, to_yaml
from kdx.data import SplitOptions, Splits, Viewed, make_splits
from kdx.errors import CheckpointError, ConfigError, KdxError
from kdx.files import write_text
from kdx.identity import environment, network_digest, run_hash
from kdx.loop import Session, Watchers, length, make_session, train
from kdx.modules import generators
from kdx.outcome import conclude
from kdx.plan import Plan, make_plan
from kdx.plugins import Registry, compile_hook, discover
from kdx.reach import Reach, reach
from kdx.report import write_report
from kdx.result import Result, read_result, write_result
from kdx.runtime import Runtime
from kdx.spec import ModelSpec, NodeSpec, RunSpec, check, full_config
from kdx.student import STUDENT
from kdx.table import plan_text
from kdx.types import Batch, RunInfo

CHECKPOINT = "checkpoint"
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
        config = _with_networks(config, options.networks)
    if options.data is not None:
        kept = {item.name for item in fields(SplitOptions)}
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
    sample = dataset.on_device(splits.train.fetch([0, min(1, len(splits.train) - 1)]), None)
    reached = reach(spec, splits.facts)
    alone = replace(options, networks={}, data=None)
    needs = {
        name: prepare({**spec.models[name].engine.run, "out": spec.root.out, "baseline": False}, alone)
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
    )
    compile_hook(spec.registry, "kdx_plan_ready")(plan)
    return plan


def carry_out(prepared: Prepared, options: Options) -> Result:
    """Train what is missing and give the result: first the runs that this one needs, then the plain student, then
    this one. A finished run with the same hash is taken as it is; a half-finished one goes on.
    """
    for one in family(prepared):  # whatever can be refused is refused before anything trains
        if options.fresh or not finished(one):
            build_plan(one, options, trained=False)
    for need in prepared.needs.values():
        carry_out(need, replace(options, networks={}, data=None))
    if prepared.plain is not None:
        carry_out(prepared.plain, options)
    folder = prepared.folder
    with locked(folder, options.console):
        if options.fresh:
            _clear(folder)
        if finished(prepared):
            _say(options, f"{folder.name}: finished before, taken as it is")
            return read_result(folder)
        return _train(prepared, options)


def family(prepared: Prepared) -> Iterator[Prepared]:
    """A run and all that it needs, each once, the needed ones first."""
    seen: set[str] = set()

    def walk(one: Prepared) -> Iterator[Prepared]:
        for need in (*one.needs.values(), *([one.plain] if one.plain else [])):
            yield from walk(need)
        if one.hash not in seen:
            seen.add(one.hash)
            yield one

    return walk(prepared)


def finished(prepared: Prepared) -> bool:
    """Whether the folder holds a complete result of this very run."""
    try:
        result = read_result(prepared.folder)
    except CheckpointError:
        return False
    return result.hash == prepared.hash and result.status == "finished" and (prepared.folder / STUDENT).is_file()


def expand_runs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give each model that names a run, and no component, the student section of that run.

    `run: {extends: FILE, ...}` becomes the resolved config of the run; `{use: run, folder: F}` the student of a
    finished run with its weights as `checkpoint`.
    """
    config = dict(config)
    if isinstance(config.get("student"), dict):
        config["student"] = _expand(config["student"], "student")
    if isinstance(config.get("teachers"), dict):
        config["teachers"] = {
            name: _expand(model, f"teachers.{name}") if isinstance(model, dict) else model
            for name, model in config["teachers"].items()
        }
    return config


def _expand(model: dict[str, Any], where: str) -> dict[str, Any]:
    if model.get("use") == "run":
        rest = {key: value for key, value in model.items() if key not in ("use", "folder")}
        folder = Path(str(model.get("folder", "")))
        stored = read_config(folder, f"{where}.folder")["student"]
        stored = {key: value for key, value in stored.items() if key not in ("run", "taps", "checkpoint")}
        return {**stored, "checkpoint": str(folder / STUDENT), **rest}
    if model.get("run") is None:
        return model
    if not isinstance(model["run"], dict):
        raise ConfigError(f"{where}.run: found {model['run']!r}, expected the path of a config")
    try:
        run = expand_runs(load_mapping(model["run"]))
    except ConfigError as error:
        raise ConfigError(f"{where}.run: {error}") from error
    if "use" in model:
        return {**model, "run": run}
    student = run.get("student")
    if not isinstance(student, dict):
        raise ConfigError(f"{where}.run: the config has no student")
    inherited = {key: value for key, value in student.items() if key not in ("run", "taps", "checkpoint")}
    return {**inherited, **model, "run": run}


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """The resolved config in the folder of a run."""
    path = folder / "config.yaml"
    if not path.is_file() or not (folder / STUDENT).is_file():
        raise ConfigError(f"{where}: {folder} is not the folder of a finished run")
    return load_mapping({"extends": str(path.resolve())})


def plain_config(spec: RunSpec, models: list[str], splits: Splits) -> dict[str, Any] | None:
    """The config of the same student without teachers; None when this run has no teachers, or the data no labels.

    Losses that need a teacher go, with the nodes that only they need. Samples without a label are dropped, for
    nothing could be learnt from them, and an epoch keeps its number of updates: both students have the same budget.
    """
    if not any(name != "student" for name in models) or not any(label >= 0 for label in splits.facts.labels):
        return None
    needy = _needy(spec)
    losses = {name: value for name, value in spec.config["losses"].items() if f"losses.{name}" not in needy}
    if not losses:
        losses = {"ce": {"use": "cross_entropy"}}
    config = {key: value for key, value in spec.config.items() if key not in ("teachers", "targets", "align", "losses")}
    config["losses"] = losses
    config["align"] = {name: value for name, value in (spec.config.get("align") or {}).items() if name not in needy}
    config["name"] = f"{spec.root.name}_plain"
    config["baseline"] = False
    config["data"] = {**config.get("data", {}), "unlabelled": "drop"}
    config["train"] = {**config["train"], "steps_per_epoch": length(spec, len(splits.train))[0]}
    return config


def _needy(spec: RunSpec) -> set[str]:
    """Nodes and losses that read a teacher, directly or through another node."""
    everything = {**spec.nodes, **{f"losses.{name}": node for name, node in spec.losses.items()}}

    def owners(node: NodeSpec) -> set[str]:
        refs: list[str] = list(node.borrows.values())
        for value in (*node.inputs.values(), *node.knobs.values()):
            refs += list(value) if isinstance(value, tuple) else [value] if isinstance(value, str) else []
        return {ref.partition(".")[0] for ref in refs}

    needy: set[str] = set()
    while True:
        grown = {
            name
            for name, node in everything.items()
            if owners(node) & ({*spec.teachers, "teacher", "*", *spec.targets} | needy)
        }
        if grown == needy:
            return needy
        needy = grown


def _train(prepared: Prepared, options: Options) -> Result:
    """Train a run from where it stands, and write everything that it leaves."""
    began = time.perf_counter()
    spec, folder = prepared.spec, prepared.folder
    runtime = Runtime(spec.runtime)
    plan = build_plan(prepared, options, trained=True, device=runtime.device)
    session = make_session(spec, plan, prepared.dataset, prepared.splits, runtime)
    folder.mkdir(parents=True, exist_ok=True)
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
    write_text(folder / "environment.json", json.dumps(about, indent=2) + "\n")
    state = load_state(folder / CHECKPOINT)
    spent = 0.0
    if state is not None:
        _restore(session, state)
        spent = state["seconds"]
        _say(options, f"{folder.name}: goes on after update {session.step} of {session.steps}")
    info = RunInfo(
        spec.root.name, folder, prepared.hash, spec.config, session.steps, session.steps_per_epoch, session.step
    )
    lines = JsonLines(folder)
    bars = Progress(options.console, spec.root.name, options.quiet)

    def save(session: Session) -> None:
        lines.flush()
        save_state(folder / CHECKPOINT, _state(session, spent + time.perf_counter() - began))

    def improved(session: Session) -> None:
        save_weights(session.student.net, folder / CHECKPOINT / BEST)

    with watching(spec.registry, lines, TensorBoard(folder), bars):
        step_end, eval_end = (compile_hook(spec.registry, hook) for hook in ("kdx_step_end", "kdx_eval_end"))
        compile_hook(spec.registry, "kdx_run_start")(info)
        try:
            if session.step < session.steps:
                train(session, Watchers(step_end, eval_end, improved, save, options.stop))
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
        seconds=spent + time.perf_counter() - began,
    )
    write_result(folder, result)
    write_report(folder)
    return result


@contextmanager
def watching(registry: Registry, *watchers: object) -> Iterator[None]:
    """Register watchers of one run for the length of the block."""
    for watcher in watchers:
        registry.manager.register(watcher)
    try:
        yield
    finally:
        for watcher in watchers:
            registry.manager.unregister(watcher)


@contextmanager
def locked(folder: Path, console: Console) -> Iterator[None]:
    """Hold the lock of a run's folder; it is let go when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print(f"{folder.name}: another process works on it; waiting", markup=False, highlight=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _state(session: Session, seconds: float) -> dict[str, Any]:
    return {
        "step": session.step,
        "learner": session.learner.state_dict(),
        "targets": session.teachers.nodes.state_dict(),
        "optimizer": session.runtime.optimizer.state_dict(),
        "runtime": session.runtime.state(),
        "average": None if session.average is None else session.average.model.state_dict(),
        "generators": {name: generator.get_state() for name, generator in generators(session.plan).items()},
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "best": session.best,
        "last": session.last,
        "phases": session.runtime.stopwatch.seconds(),
        "seconds": seconds,
    }


def _restore(session: Session, state: Mapping[str, Any]) -> None:
    try:
        session.learner.load_state_dict(state["learner"])
        session.teachers.nodes.load_state_dict(state["targets"])
        session.runtime.optimizer.load_state_dict(state["optimizer"])
        session.runtime.load_state(state["runtime"])
        if session.average is not None:
            session.average.model.load_state_dict(state["average"])
        for name, generator in generators(session.plan).items():
            generator.set_state(state["generators"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the state in {CHECKPOINT}/ is of another run ({error}); start afresh with --fresh"
        ) from error
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    for name, seconds in state["phases"].items():
        session.runtime.stopwatch.add(name, seconds)
    session.step, session.best, session.last = state["step"], state["best"], state["last"]


def _clear(folder: Path) -> None:
    """Take away what an earlier run left, so that a fresh one starts from nothing."""
    if folder.exists():
        shutil.rmtree(folder)


def _make_dataset(spec: RunSpec, given: Dataset | None) -> Dataset:
    dataset: Dataset = spec.data.entry.component(spec.data.options) if given is None else given
    if not spec.views:
        return dataset
    return Viewed(dataset, {name: view.entry.component(view.options) for name, view in spec.views.items()})


def _with_networks(config: dict[str, Any], networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Put sections for modules that were handed in; what a section says besides its component stays."""
    config = dict(config)
    teachers = dict(config.get("teachers") or {})
    for name, net in networks.items():
        section = config.get("student") if name == "student" else teachers.get(name)
        kept = {key: value for key, value in (section or {}).items() if key in ("input", "taps", "trainable")}
        section = {"use": "module", "digest": network_digest(net), **kept}
        if name == "student":
            config["student"] = section
        else:
            teachers[name] = section
    if teachers:
        config["teachers"] = teachers
    return config


def _copies(networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies, so that a person's own modules stay as they were."""
    return {name: copy.deepcopy(net) for name, net in networks.items()}


def _say(options: Options, text: str) -> None:
    if not options.quiet:
        options.console.print(text, markup=False, highlight=False)
