"""What decides the result of a run, as a hash; and what a person needs to know to repeat it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdx.cache import changes
from kdx.cache_options import read_cache
from kdx.components import Dataset, Schedule
from kdx.errors import CheckpointError
from kdx.options import plain_options
from kdx.plugins import Entry, Plugin, Registry
from kdx.ranges import AUTO
from kdx.reach import Reach, base_of
from kdx.spec import ModelSpec, NodeSpec, Part, RunSpec

LIBRARIES = ("kdx", "torch", "torchvision", "timm", "torchmetrics", "pluggy", "omegaconf", "safetensors", "numpy")


def run_hash(spec: RunSpec, dataset: Dataset, reached: Reach, needs: Mapping[str, str]) -> str:
    """Twelve hex digits for all that decides the result: live parts with every option, data, plugins, needed runs.

    `needs` are the hashes of the runs that teachers come from. Names of files and folders, devices, workers and
    whatever no loss reads do not count.
    """
    train = asdict(spec.train)
    for key in ("save", "save_minutes", "lr"):
        train.pop(key)
    if train["micro_batch"] != AUTO:
        train.pop("micro_batch")  # it is in `accumulate`
    content = {
        "seed": spec.root.seed,
        "data": [
            _in_order(spec.data.entry, dataset.config, dataset.places),
            {key: value for key, value in asdict(spec.splits).items() if key != "classes" or value is not None},
            dataset.fingerprint(),
        ],
        "views": {name: _view(spec.views[name]) for name in reached.views},
        "models": {
            name: model_content(spec.models[name], _fields(reached, name), needs.get(name)) for name in reached.models
        },
        "nodes": {name: node_content(node, reached, name) for name, node in reached.nodes.items()},
        "metrics": [_part(part) for part in spec.metrics],
        "train": [train, _knob(spec.lr), _part(spec.updater)],
        "precision": AUTO if "precision" in spec.measured else spec.runtime.precision,
        "plugins": {plugin.name: plugin.digest for plugin in used_plugins(spec, reached)},
    }
    if spec.root.on_bad_teacher != "refuse" and any(spec.models[name].frozen for name in reached.models):
        content["on_bad_teacher"] = spec.root.on_bad_teacher
    if spec.root.on_nonfinite != "stop":
        content["on_nonfinite"] = spec.root.on_nonfinite
    if spec.view_count is not None:
        content["view_count"] = spec.view_count
    cached: list[ModelSpec | NodeSpec] = [*(spec.models[name] for name in reached.models), *reached.nodes.values()]
    if caches := {part.name: own for part in cached if (own := cache_content(part)) is not None}:
        content["caches"] = caches
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def used_plugins(spec: RunSpec, reached: Reach) -> list[Plugin]:
    """The plugins that supply what a run uses, built-ins first; also the parts that options name with `use:`."""
    parts: list[ModelSpec | NodeSpec | Part] = [spec.data, spec.updater, *spec.metrics, *reached.nodes.values()]
    parts += [spec.models[name] for name in reached.models]
    names = {*suppliers(parts, spec.registry)}
    knobs = [spec.lr, *(knob for node in reached.nodes.values() for knob in node.knobs.values())]
    entries = spec.registry.entries
    names |= {entries["schedules", knob.name].plugin.name for knob in knobs if isinstance(knob, Schedule)}
    return [plugin for plugin in spec.registry.plugins if plugin.name in names]


def suppliers(parts: Iterable[ModelSpec | NodeSpec | Part], registry: Registry) -> dict[str, str]:
    """The plugins that supply some parts, and those that their options name with `use:`: name -> digest."""
    parts = [*parts]
    nested = {name for part in parts for name in _named_within(plain_options(part.options))}
    found = [part.entry.plugin for part in parts]
    found += [entry.plugin for (_, name), entry in registry.entries.items() if name in nested]
    return {plugin.name: plugin.digest for plugin in found}


def environment(
    spec: RunSpec,
    reached: Reach,
    *,
    hash: str,
    needs: Mapping[str, str],
    device: str,
    precision: str,
    processes: int = 1,
) -> dict[str, Any]:
    """Versions, plugins, seeds and the git revision of the working folder, for `environment.json`."""
    return {
        "hash": hash,
        "seed": spec.root.seed,
        "split_seed": spec.splits.split_seed,
        "needs": dict(needs),
        "plugins": [asdict(plugin) for plugin in used_plugins(spec, reached)],
        "libraries": _versions(LIBRARIES),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "device": device,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "precision": precision,
        "git": _revision(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def network_digest(net: nn.Module) -> str:
    """A digest of a module's structure and weights."""
    digest = hashlib.sha256(repr(net).encode())
    for name, value in {**net.state_dict(), **dict(net.named_buffers())}.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path, where: str) -> str:
    """The SHA-256 of a file's content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{where}: cannot read {path}: {error.strerror or error}") from error


def _fields(reached: Reach, model: str) -> set[str]:
    return {field for owner, fields in reached.fields.items() if base_of(owner) == model for field in fields}


def _part(part: Part) -> list[Any]:
    return [part.entry.component.name, plain_options(part.options)]


def _in_order(entry: Entry, options: Any, places: Iterable[str]) -> str:
    """A data set as text: augmentations act in the order in which they are given, so that order counts.

    The options and `places` are those of the data itself, which may have been handed over in Python.
    """
    counted = {key: value for key, value in plain_options(options).items() if key not in places}
    return json.dumps([entry.component.name, counted], default=str)


def _view(view: Part) -> str:
    return _in_order(view.entry, view.options, view.entry.component.places)


def model_content(spec: ModelSpec, fields: Iterable[str], need: str | None) -> dict[str, Any]:
    """What decides the answers of a model. `fields` are those that are read; `need` the hash of the run it is from."""
    checkpoint = spec.engine.checkpoint
    weights = file_digest(Path(checkpoint), f"{spec.where}.checkpoint") if checkpoint is not None else None
    options = plain_options(spec.options)
    if (file := options.get("path")) is not None and Path(file).is_file():
        options["path"] = file_digest(Path(file), f"{spec.where}.path")
    own = {} if spec.engine.precision is None else {"precision": spec.engine.precision}
    return {
        **own,
        "component": [spec.entry.component.name, options],
        "input": spec.engine.input,
        "taps": {name: tap for name, tap in spec.engine.taps.items() if name in fields},
        "trainable": spec.engine.trainable,
        "weights": [weights, need],
    }


def cache_content(spec: ModelSpec | NodeSpec) -> list[Any] | None:
    """What the cache of a teacher or target changes in the numbers of a run."""
    options = read_cache(spec.engine.cache, f"{spec.where}.cache")
    return None if options is None else changes(options, alone=isinstance(spec, ModelSpec) and not spec.at_hand)


def node_content(node: NodeSpec, reached: Reach, name: str) -> dict[str, Any]:
    """A node by what it reads: `*.logits` counts as the teachers that it stands for."""
    arguments, borrowed = reached.arguments[name], reached.borrowed[name]
    return {
        "component": [node.entry.component.name, plain_options(node.options)],
        "inputs": {name: arguments[name] for name in node.inputs},
        "knobs": {name: arguments[name] if isinstance(knob, str) else _knob(knob) for name, knob in node.knobs.items()},
        "borrows": {key: ref if isinstance(ref, str) else borrowed[key] for key, ref in node.borrows.items()},
        "training": {key: value for key, value in asdict(node.engine).items() if key != "cache"},
    }


def _named_within(options: Any) -> Iterator[str]:
    """The components that options name, as in `parts: {ear: {use: wave_cnn}}`."""
    if isinstance(options, Mapping):
        if isinstance(name := options.get("use"), str):
            yield name
        options = list(options.values())
    if isinstance(options, list):
        for value in options:
            yield from _named_within(value)


def _knob(knob: Any) -> Any:
    return [knob.name, plain_options(knob.config)] if isinstance(knob, Schedule) else knob


def _versions(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _revision() -> str | None:
    """The commit of the working folder, with a plus sign where files differ from it; None outside of a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
        state = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if state.stdout.strip() else "")
