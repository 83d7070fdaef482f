"""The file that a run leaves to be used: weights, and in the header what builds the network again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from kdx.checkpoint import load_weights, save_weights
from kdx.components import Network
from kdx.errors import CheckpointError
from kdx.plugins import discover
from kdx.spec import RunSpec, plain_options, read_options
from kdx.types import DataFacts, StreamFacts

STUDENT = "student.safetensors"
_HEADER = "kdx"


def save_student(network: Network, folder: Path, spec: RunSpec, facts: DataFacts, hash: str) -> Path:
    """Write `student.safetensors`: the state dict of the bare net under the names of its own library."""
    about = {
        "component": spec.student.entry.component.name,
        "options": plain_options(spec.student.options),
        "streams": list(network.streams),
        "facts": {
            "streams": {name: asdict(stream) for name, stream in facts.streams.items()},
            "classes": facts.classes,
        },
        "plugins": [item for item in spec.root.plugins if not item.endswith(".py")],
        "run": f"{spec.root.name}-{hash}",
    }
    path = folder / STUDENT
    save_weights(network.net, path, {_HEADER: json.dumps(about)})
    return path


def load_student(folder: str | Path, net: nn.Module | None = None) -> Network:
    """The student of a finished run, in evaluation mode: `network(images)` takes raw images in `0..1`, `[B, C, H, W]`.

    `folder` is that of the run, or its `student.safetensors`. A module that was handed to `kdx.run` cannot be built
    again from a file: give a fresh one as `net`. Raises `CheckpointError` for a file that is absent or altered.
    """
    path = Path(folder)
    path = path / STUDENT if path.is_dir() else path
    about = read_header(path)
    network = _build(about, path, net)
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


def _build(about: dict[str, Any], path: Path, net: nn.Module | None) -> Network:
    try:
        streams = {
            name: StreamFacts(item["kind"], tuple(item["shape"]), tuple(item["mean"]), tuple(item["std"]))
            for name, item in about["facts"]["streams"].items()
        }
        facts = DataFacts(streams, tuple(about["facts"]["classes"]))
        component, options, read = about["component"], dict(about["options"]), tuple(about["streams"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header lacks {error}") from error
    if net is not None:
        return net if isinstance(net, Network) else Network(net, read)
    if component == "module":
        raise CheckpointError(f"{path}: its net was handed in from Python; give one of the same kind as net=...")
    entry = discover(about.get("plugins", [])).find("models", component, str(path))
    model = entry.component(read_options(entry.component.Config, options, str(path)), facts, read)
    network: Network = model.skeleton()
    return network
