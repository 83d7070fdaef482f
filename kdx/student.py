"""The file that a run leaves to be used: weights, and in the header what builds the network again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from kdx.calls import NodeCall, find_part
from kdx.checkpoint import STUDENT, load_weights, save_weights
from kdx.components import Given, Loss, Model, Network
from kdx.deploy import Extended, answer_fields, answering, owner_of
from kdx.errors import CheckpointError, PluginError
from kdx.options import plain_options, read_options
from kdx.plan import Plan, streams_of
from kdx.plugins import discover
from kdx.spec import ModelSpec
from kdx.taps import read_taps
from kdx.types import DataFacts, StreamFacts

_HEADER = "kdx"


def save_student(network: Network, folder: Path, plan: Plan, hash: str) -> Path:
    """Write `student.safetensors`: the state dict of the bare net under the names of its own library."""
    spec, facts, call = plan.spec, plan.facts, answering(plan)
    parts = {name: owner_of(plan, call, name) for name in _answering_parts(call)} if call is not None else {}
    streams = {
        *network.streams,
        *(name for owner, _ in parts.values() for name in streams_of(spec.models[owner], facts)),
    }
    about = {
        "model": _described(spec.student),
        "streams": list(network.streams),
        "facts": {
            "streams": {name: asdict(stream) for name, stream in facts.streams.items() if name in streams},
            "classes": facts.classes,
            "size": facts.size,
        },
        "plugins": [item for item in spec.root.plugins if not item.endswith(".py")],
        "plugin_files": [Path(item).name for item in spec.root.plugins if item.endswith(".py")],
        "run": f"{spec.root.name}-{hash}",
    }
    if call is not None:
        about["answer"] = {
            "component": call.module.name,
            "options": plain_options(call.module.config),
            "shapes": dict(call.module.given.shapes),
            "fields": answer_fields(call),
            "taps": dict(spec.student.engine.taps),
            "parts": {
                name: [owner, path, *_described(spec.models[owner]), streams_of(spec.models[owner], facts)]
                for name, (owner, path) in parts.items()
            },
        }
    path = folder / STUDENT
    save_weights(network.net, path, {_HEADER: json.dumps(about)})
    return path


def _answering_parts(call: NodeCall) -> list[str]:
    return [name for name in call.parts if isinstance(call.module, Loss) and name in call.module.answers]


def _described(model: ModelSpec) -> list[Any]:
    return [model.entry.component.name, plain_options(model.options)]


Nets = nn.Module | Mapping[str, nn.Module] | None


def load_student(folder: str | Path, net: Nets = None, *, plugins: Sequence[str | Path] = ()) -> Network:
    """The student of a finished run, in evaluation mode: `network(images)` takes raw images in `0..1`, `[B, C, H, W]`.

    `folder` is that of the run, or its `student.safetensors`. A module that was handed to `kdx.run` cannot be built
    again from a file: give a fresh one as `net`, or, where a teacher's part is deployed too, a mapping as
    `kdx.run(models=...)` takes it. `plugins` are the plugin files that its components are in; they are never found by
    themselves. Raises `CheckpointError` for a file that is absent or altered.
    """
    path = Path(folder)
    path = path / STUDENT if path.is_dir() else path
    about = read_header(path)
    try:
        nets = {"student": net} if isinstance(net, nn.Module) else dict(net or {})
        network = _build(about, path, nets, [str(item) for item in plugins])
    except PluginError as error:
        if not (files := about.get("plugin_files")) or plugins:
            raise
        raise PluginError(f"{error}\nits run used {', '.join(files)}: give the files as plugins=[...]") from error
    load_weights(network.net, path, str(path))
    return network.eval()


def read_header(path: Path) -> dict[str, Any]:
    """What `save_student` wrote into the header."""
    if not path.is_file():
        raise CheckpointError(f"there is no student {path}; a run that has finished leaves one")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_HEADER])
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no student that kdx wrote: {error!r}") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} is no student that kdx wrote: its header is no mapping")
    return about


def _build(about: dict[str, Any], path: Path, nets: Mapping[str, nn.Module], files: Sequence[str]) -> Network:
    try:
        streams = {
            name: StreamFacts(
                item["kind"], tuple(item["shape"]), tuple(item["mean"]), tuple(item["std"]), item.get("rate", 0)
            )
            for name, item in about["facts"]["streams"].items()
        }
        facts = DataFacts(streams, tuple(about["facts"]["classes"]), about["facts"].get("size", 0))
        (component, options), read = about["model"], tuple(about["streams"])
        answer = about.get("answer")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header lacks {error}") from error
    registry = discover([*about.get("plugins", []), *files])

    def network(role: str, component: str, options: Mapping[str, Any], streams: Sequence[str]) -> Network:
        if role in nets:
            net = nets[role]
            return net if isinstance(net, Network) else Network(net, tuple(streams))
        if component == "module":
            what, how = ("net", "net=...") if role == "student" else (f"teacher {role}", f"net={{{role!r}: ...}}")
            raise CheckpointError(f"{path}: its {what} was handed in from Python; give one of the same kind as {how}")
        entry = registry.find("models", component, str(path))
        read = read_options(entry.component.Config, options, str(path))
        model: Model = entry.component(read, facts, tuple(streams))
        return model.skeleton()

    student = network("student", component, options, read)
    if answer is None:
        return student
    try:
        node = registry.find("losses", answer["component"], str(path)).component
        config = read_options(node.Config, answer["options"], str(path))
        shapes = {name: _shape(shape) for name, shape in answer["shapes"].items()}
        parts = {
            name: find_part(network(role, component, options, streams).net, part, str(path))
            for name, (role, part, component, options, streams) in answer["parts"].items()
        }
        taps = read_taps(answer["taps"], str(path))
        return Extended(student, node(config, Given(shapes, facts)), answer["fields"], taps, parts)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header is damaged: {error!r}") from error


def _shape(shape: list[Any]) -> Any:
    """The shape of one sample, or a list of them."""
    return [tuple(one) for one in shape] if shape and isinstance(shape[0], list) else tuple(shape)
