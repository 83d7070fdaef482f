"""Saves and loads weights and the state of training. Nothing here unpickles code."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kdx.errors import CheckpointError, did_you_mean
from kdx.files import write_file

LAST, PREVIOUS = "last.pt", "previous.pt"
TORN = ".torn"
WRAPPED = "module."
"""What a net saved inside of `DistributedDataParallel` puts before its names."""


def save_weights(net: nn.Module, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write the state dict of a net as safetensors, with `about` in its header."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    blob = safetensors.torch.save(tensors, metadata=dict(about or {}))
    write_file(path, lambda file: file.write(blob))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a state dict saved by torch (with `weights_only=True`).

    A state dict may lie under `state_dict`, `model` or `model_state_dict`. Raises `CheckpointError` for a file that is
    absent, torn, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file of weights {path}")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
            return tensors
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors ({_first_line(error)}); kdx loads no code: save a state dict instead"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is no readable file of weights: {_first_line(error)}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds no state dict: expected names with tensors")
    return {str(name): value for name, value in found.items()}


def load_weights(net: nn.Module, path: Path, where: str) -> None:
    """Put the weights of a file into a net; names and shapes must be the net's own."""
    tensors = read_weights(path)
    own = net.state_dict()
    if all(name.startswith(WRAPPED) for name in tensors) and not any(name.startswith(WRAPPED) for name in own):
        tensors = {name.removeprefix(WRAPPED): value for name, value in tensors.items()}
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    if missing or extra:
        first = (
            f"{extra[0]!r} is unknown; {did_you_mean(extra[0], own)[:160]}" if extra else f"{missing[0]!r} is missing"
        )
        raise CheckpointError(
            f"{where}: {path} does not fit {type(net).__name__}: {len(missing)} missing, {len(extra)} unknown; {first}"
        )
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise CheckpointError(
                f"{where}: {path}: {name} has shape {list(value.shape)}, expected {list(own[name].shape)}"
            )
    net.load_state_dict(tensors)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of training; the one before it is kept as well."""
    last = folder / LAST
    if last.exists():
        spare = folder / f".{PREVIOUS}"
        spare.unlink(missing_ok=True)
        os.link(last, spare)
        os.replace(spare, folder / PREVIOUS)
    write_file(last, lambda file: torch.save(dict(state), file))


def load_state(folder: Path) -> dict[str, Any] | None:
    """The newest readable state, or None where none was saved.

    A torn or altered file is passed over with a warning that names it; `CheckpointError` when none is readable.
    """
    problems: list[str] = []
    unusable: list[Path] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                if (torn := archive.testzip()) is not None:
                    raise CheckpointError(f"{torn} is altered")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise CheckpointError("it holds no state of training")
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError,
                CheckpointError) as error:  # fmt: skip
            problems.append(f"{path} is not usable: {_first_line(error)}")
            unusable.append(path)
            continue
        for problem, other in zip(problems, unusable, strict=True):
            warnings.warn(f"{problem}; going on from {path.name}", stacklevel=2)
            other.replace(other.with_suffix(TORN))  # or the next save would keep it in place of the good one
        return state
    if problems:
        raise CheckpointError("; ".join(problems) + "; start afresh with --fresh")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
