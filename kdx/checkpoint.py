"""Saves and loads weights and the state of training. Nothing here unpickles code."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kdx.errors import CheckpointError, did_you_mean
from kdx.files import write_file

STUDENT = "student.safetensors"
"""The file of weights that a run leaves."""
LAST, PREVIOUS = "last.pt", "previous.pt"
TORN = ".torn"
WRAPPED = "module."
"""What a net saved inside of `DistributedDataParallel` puts before its names."""
SUM = "sha256"
"""Names the checksum in the header of a file of weights."""


def save_weights(net: nn.Module, path: Path, about: Mapping[str, str] | None = None) -> str:
    """Write the state dict of a net as safetensors, with `about` and a checksum of it all in its header.

    Gives the checksum, the SHA-256 of `about`, of the names, types and shapes, and of the weights.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    blob = safetensors.torch.save(tensors, metadata=dict(about or {}))
    size = int.from_bytes(blob[:8], "little")
    header, weights = json.loads(blob[8 : 8 + size]), memoryview(blob)[8 + size :]
    digest = _begun(header, weights).hexdigest()
    header["__metadata__"] = {**header.get("__metadata__", {}), SUM: digest}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the weights begin at a multiple of eight bytes

    def write(file: BinaryIO) -> None:
        for part in (len(text).to_bytes(8, "little"), text, weights):
            file.write(part)

    write_file(path, write)
    return digest


def checked_sum(path: Path) -> str | None:
    """The checksum of a file that `save_weights` wrote, None for one that has none.

    Raises `CheckpointError` for a file whose content is not what the checksum is of.
    """
    try:
        stat = path.stat()
        return _checked_sum(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no readable file of weights: {_first_line(error)}") from error


@functools.lru_cache(maxsize=256)
def _checked_sum(path: Path, changed: int, size: int) -> str | None:
    """Read once as long as the file has the same time and size: several runs may ask for one teacher."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        expected: str | None = header.get("__metadata__", {}).get(SUM)
        if expected is None:
            return None
        found = hashlib.file_digest(file, lambda: _begun(header)).hexdigest()
    if found != expected:
        raise CheckpointError(f"{path} is altered: its content is not what its checksum is of")
    return expected


def _begun(header: Mapping[str, Any], weights: bytes | memoryview = b"") -> hashlib._Hash:
    """The checksum of a header, without the checksum in it, and of what follows."""
    about = {name: value for name, value in header.get("__metadata__", {}).items() if name != SUM}
    text = json.dumps({**header, "__metadata__": about}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    digest.update(weights)
    return digest


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a state dict saved by torch (with `weights_only=True`).

    A state dict may lie under `state_dict`, `model` or `model_state_dict`. Raises `CheckpointError` for a file that is
    absent, torn, altered (where it has checksums), or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file of weights {path}")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
            checked_sum(path)
            return tensors
        if zipfile.is_zipfile(path):
            _check_archive(path)
        found = _unpickled(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors ({_first_line(error)}); kdx loads no code: save a state dict instead"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile,
            safetensors.SafetensorError) as error:  # fmt: skip
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
    write_file(folder / LAST, lambda file: torch.save(dict(state), file), keep=folder / PREVIOUS)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The newest readable state, or None where none was saved.

    A state counts only with the best student so far, which lies in a file of its own (`state["best_file"]`: its name
    and checksum). A torn or altered file is passed over with a warning that names it; `CheckpointError` when none is
    readable.
    """
    problems: list[str] = []
    unusable: list[Path] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            _check_archive(path)
            state = _unpickled(path)
            if not isinstance(state, dict):
                raise CheckpointError("it holds no state of training")
            if (best := state.get("best_file")) is not None:
                check_best(folder, *best)
        except (OSError, RuntimeError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile,
                pickle.UnpicklingError, CheckpointError) as error:  # fmt: skip
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


def check_best(folder: Path, name: str, digest: str) -> Path:
    """The file of the best student so far. Raises `CheckpointError` unless it is there with this checksum."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"the best student so far, {path}, is missing")
    if checked_sum(path) != digest:
        raise CheckpointError(f"{path} is not the best student so far: it has another checksum")
    return path


def _check_archive(path: Path) -> None:
    """Raise `ValueError` for a part of torch's archive that is not what its checksum is of."""
    with zipfile.ZipFile(path) as archive:
        if (altered := archive.testzip()) is not None:
            raise ValueError(f"its part {altered} is altered")


def _unpickled(path: Path) -> Any:
    """What a file of torch's holds, without code. For a damaged one torch raises anything; this, `ValueError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forms that torch does not write
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError):
            raise
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
