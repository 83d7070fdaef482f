"""Brings answers that another program wrote into a cache, from which a teacher without a net answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kdx.cache import BLOCK, Field, Meta, Writer, open_store
from kdx.cache_key import Wanted
from kdx.cache_search import note_samples
from kdx.data import Splits
from kdx.errors import DataError
from kdx.formats import counted
from kdx.identity import file_digest

INDEX = "index"
_STORED = {torch.float64: "float32", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def import_answers(wanted: Wanted, splits: Splits, path: Path, index: Path | None, field: str) -> Path:
    """Fill the cache that a teacher names from a `.npy` or `.safetensors` file; gives its folder.

    A `.npy` file holds one field [N, ...]; a `.safetensors` file one or more, and perhaps `index`. The index [N] says
    which sample of the training source each row is of (`batch.index`); without one, row i is of sample i and there is
    a row for each. Raises `DataError` for files that do not fit.
    """
    tensors = _read(path, field)
    if index is not None:
        tensors[INDEX] = _array(index)
    places = _places(tensors.pop(INDEX, None), tensors, splits, path)
    fields = {name: _field(name, tensor, path) for name, tensor in tensors.items()}
    # Whatever was looked at, it was no version that this program makes anew in each epoch.
    parts = {**wanted.parts, "augmentation": None, "source": [path.name, file_digest(path, str(path))]}
    meta = Meta(parts, fields, wanted.samples, 1, BLOCK)
    if open_store(wanted.folder) is not None:
        raise DataError(f"{wanted.folder} holds a cache already; delete it to bring others there")
    writer = Writer(wanted.folder, meta)
    try:
        for block in writer.missing(0):
            rows = places[torch.tensor(writer.meta.places(block))]
            writer.write(block, {name: _finite(tensor[rows], rows, name, path) for name, tensor in tensors.items()})
        note_samples(wanted.folder, splits.train.positions)
        writer.sync()
    finally:
        writer.close()
    return wanted.folder


def _read(path: Path, field: str) -> dict[str, Tensor]:
    if path.suffix == ".npy":
        return {field: _array(path)}
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: found a file of kind {path.suffix!r}, expected .npy or .safetensors")
    try:
        found: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is no readable file of tensors: {error}") from error
    if not set(found) - {INDEX}:
        raise DataError(f"{path} holds no answers: expected a tensor `logits`")
    return found


def _array(path: Path) -> Tensor:
    """An array of numbers, mapped into memory; files with objects are refused."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        return torch.from_numpy(array)
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as error:
        raise DataError(f"{path} is no readable .npy file of numbers: {error}") from error


def _places(index: Tensor | None, tensors: Mapping[str, Tensor], splits: Splits, path: Path) -> Tensor:
    """The row of each training sample, int64 [samples]."""
    size, positions = splits.facts.size, splits.train.positions
    counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if index is not None and (index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool):
        raise DataError(f"{path}: found an index of {index.dtype} {list(index.shape)}, expected whole numbers [N]")
    rows = size if index is None else len(index)
    for name, count in counts.items():
        if count != rows:
            expected = f"{size}, one for each sample, or an index" if index is None else f"{rows}, as the index has"
            raise DataError(f"{path}: {name} has {count} rows, expected {expected}")
    if index is None:
        return positions
    index = index.long()
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
        raise DataError(
            f"{path}: the index goes from {int(index.min())} to {int(index.max())}, expected 0 to {size - 1}"
        )
    found = torch.full((size,), -1, dtype=torch.int64)
    found[index] = torch.arange(len(index))
    if (again := len(index) - int((found >= 0).sum())) > 0:
        raise DataError(f"{path}: the index names {counted(again, 'sample')} more than once")
    missing = positions[found[positions] < 0]
    if len(missing):
        without = counted(len(missing), "training sample")
        raise DataError(f"{path}: it has no row for {without}, the first is {int(missing[0])}")
    return found[positions]


def _field(name: str, tensor: Tensor, path: Path) -> Field:
    if not name.isidentifier():
        raise DataError(f"{path}: {name!r} cannot be part of a ref; use letters, digits and underscores")
    if tensor.dtype not in _STORED or tensor.ndim < 2:
        raise DataError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, expected floats [N, ...]")
    return Field(tuple(tensor.shape[1:]), _STORED[tensor.dtype], "float32")


def _finite(values: Tensor, rows: Tensor, name: str, path: Path) -> Tensor:
    """The values, once it is sure that they are numbers."""
    bad = ~values.flatten(1).isfinite().all(1)
    if bad.any():
        raise DataError(f"{path}: row {int(rows[bad][0])} of {name} holds nan or inf")
    return values
