"""Configs that follow from a config: the models that come from other runs, and the plain student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from kdx.cache_options import STORED
from kdx.checkpoint import STUDENT
from kdx.config import load_mapping
from kdx.data import Splits
from kdx.errors import ConfigError
from kdx.identity import network_digest
from kdx.loop import length
from kdx.reach import base_of
from kdx.sections import ModelOptions
from kdx.spec import NodeSpec, RunSpec

_KEPT = {item.name for item in fields(ModelOptions)} - {"run", "checkpoint"}
"""What a section may say of a module that was handed in; its weights are its own."""


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
        alone = "use" not in model and model.get("cache") not in (None, False, True)
        return {"use": STORED, **model} if alone else model
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

    Losses that need a teacher go, with the nodes that only they need. A single loss that is left has the weight 1, for
    its weight or schedule balanced it against the teachers; several keep theirs. An updater that needs
    teachers goes, too. Samples without a label are dropped, for nothing could be learnt from them, and an epoch keeps
    its number of updates: both students have the same budget. Its name is `plain` in every config, so that configs
    which differ in their teachers and losses alone find the same folder.
    """
    if not any(name != "student" for name in models) or not any(label >= 0 for label in splits.facts.labels):
        return None
    needy = _needy(spec)
    losses = {name: value for name, value in spec.config["losses"].items() if f"losses.{name}" not in needy}
    if not losses:
        losses = {"ce": {"use": "cross_entropy"}}
    if len(losses) == 1:
        losses = {name: {key: part[key] for key in part if key != "weight"} for name, part in losses.items()}
    own = ("title", "teachers", "targets", "align", "losses")
    config = {key: value for key, value in spec.config.items() if key not in own}
    config["losses"] = losses
    config["align"] = {name: value for name, value in (spec.config.get("align") or {}).items() if name not in needy}
    config["name"] = "plain"
    config["baseline"] = False
    config["data"] = {**config.get("data", {}), "unlabelled": "drop"}
    config["train"] = {**config["train"], "steps_per_epoch": length(spec, len(splits.train))[0]}
    if spec.updater.entry.component.needs_teachers:
        del config["train"]["updater"]
    return config


def _needy(spec: RunSpec) -> set[str]:
    """Nodes and losses that read a teacher, directly or through another node."""
    everything = {**spec.nodes, **{f"losses.{name}": node for name, node in spec.losses.items()}}

    def owners(node: NodeSpec) -> set[str]:
        refs: list[str] = []
        for value in (*node.borrows.values(), *node.inputs.values(), *node.knobs.values()):
            refs += list(value) if isinstance(value, tuple) else [value] if isinstance(value, str) else []
        return {base_of(ref.partition(".")[0]) for ref in refs}

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


def with_networks(config: Mapping[str, Any], networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Put sections for modules that were handed in; what a section says besides its component stays."""
    config = dict(config)
    teachers = dict(config.get("teachers") or {})
    for name, net in networks.items():
        section = config.get("student") if name == "student" else teachers.get(name)
        kept = {key: value for key, value in (section or {}).items() if key in _KEPT}
        section = {"use": "module", "digest": network_digest(net), **kept}
        if name == "student":
            config["student"] = section
        else:
            teachers[name] = section
    if teachers:
        config["teachers"] = teachers
    return config
