"""Which caches on the disk hold what a run reads: the one that it would fill itself, or others that hold more."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdx.cache import Meta, Store, open_store, read_meta
from kdx.cache_key import Wanted, digest_of, lookup
from kdx.checkpoint import STUDENT, read_weights
from kdx.data import Splits
from kdx.errors import CheckpointError, DataError
from kdx.files import write_file, write_text
from kdx.recall import Stored
from kdx.result import read_result

INDEX = "index.npy"
"""The file of a cache that says which sample (`batch.index`) each row of a view is of."""
WEIGHTS = "weights.json"
"""The file of a cache that says which weights the runs had left that its teachers are from: run -> checksum of what it
has left, and hash of the run -> digest of the weights alone, for those who call it by another name."""
Part = tuple[Store, tuple[str, ...]]
"""A cache, and the fields that are read of it."""


def opened(wanted: Mapping[str, Wanted], splits: Splits, *, verify: bool) -> dict[str, Stored]:
    """What is stored for those that caches hold in full, by the item that asks for it.

    Raises `DataError` for a cache that is damaged or of something else, and for one that is named and is not there.
    """
    found: dict[str, Stored] = {}
    for item, one in wanted.items():
        parts, missing = _search(one, splits)
        if not missing:
            if verify:
                for store, fields in parts:
                    store.verify(files_of(store.meta, fields))
            found[item] = _joined(one, parts, splits)
        elif one.options.folder is not None:
            raise DataError(
                f"{one.where}: there is no complete cache in {one.folder}; `cache: true` fills one, or kdx cache "
                "CONFIG --import FILE brings answers of another program there"
            )
    return found


def lacking(wanted: Iterable[Wanted], splits: Splits) -> list[Wanted]:
    """What is in no cache and may be filled: of each that is wanted, the fields that are missing."""
    found: list[Wanted] = []
    for one in wanted:
        _, missing = _search(one, splits)
        if missing and one.options.folder is None:
            found.append(one.only(missing))
    return found


def with_fewer_views(one: Wanted, splits: Splits) -> tuple[Store, Tensor] | None:
    """The complete cache that holds most of the views that another one is to be filled with, and the row of each sample
    in a view of it; None where there is none.
    """
    positions, size = splits.train.positions, splits.facts.size
    others = [
        (meta.views, folder)
        for folder, meta in _others(replace(one, views=1), positions)
        if folder != one.folder and {*one.fields} <= {*meta.fields}
    ]
    for _, folder in sorted(others, reverse=True):
        if (store := _whole(folder)) is not None:
            held = _held(one, store.meta, folder, positions)
            assert held is not None
            rows = lookup(held, size)
            return store, positions if rows is None else rows[positions]
    return None


def folders(one: Wanted, splits: Splits) -> list[Path]:
    """The caches that a run reads for one that is wanted; empty where something is missing."""
    parts, missing = _search(one, splits)
    return [] if missing else [store.folder for store, _ in parts]


def note_samples(folder: Path, positions: Tensor) -> None:
    """Write down which samples the rows of a cache are of, so that runs on some of them find it."""
    if not (folder / INDEX).is_file():
        write_file(folder / INDEX, lambda file: np.save(file, positions.numpy()))


def note_weights(folder: Path, one: Wanted) -> None:
    """Write down which weights fill a cache: a run that is trained anew may leave others."""
    if one.runs and not (folder / WEIGHTS).is_file():
        noted = {run.name: _weights_of(run) for run in one.runs}
        noted |= {_hash_in(run.name): _content_of(run) for run in one.runs}
        write_text(folder / WEIGHTS, json.dumps(noted) + "\n")


def files_of(meta: Meta, fields: Iterable[str]) -> tuple[str, ...]:
    """The files of these fields of a cache."""
    return tuple(file for name in fields for file in meta.fields[name].files(name))


class Joined(Store):
    """The fields of several caches as those of one, whose rows are of the samples and views that a run reads."""

    def __init__(self, one: Wanted, parts: Iterable[Part], positions: Tensor, size: int) -> None:
        parts = list(parts)
        self.folder = Path(", ".join(str(store.folder) for store, _ in parts))
        kept = {name: store.meta.fields[name] for store, fields in parts for name in fields}
        self.meta = Meta({**parts[0][0].meta.parts, **one.parts}, kept, one.samples, one.views)
        self._parts = [
            (store, files_of(store.meta, fields), self._places(one, store, positions, size)) for store, fields in parts
        ]

    def rows(self, chosen: Tensor, files: tuple[str, ...]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for store, own, places in self._parts:
            read = tuple(file for file in files if file in own)
            if read:
                found |= store.rows(chosen if places is None else places[chosen], read)
        return found

    @staticmethod
    def _places(one: Wanted, store: Store, positions: Tensor, size: int) -> Tensor | None:
        """The row of a cache for each row of the whole; None where they are the same."""
        held = _held(one, store.meta, store.folder, positions)
        assert held is not None
        if torch.equal(held, positions):
            return None
        rows = lookup(held, size)
        own = positions if rows is None else rows[positions]
        return torch.cat([own + view * store.meta.samples for view in range(one.views)])


def _search(one: Wanted, splits: Splits) -> tuple[list[Part], tuple[str, ...]]:
    """The caches that hold what is wanted, each with the fields to read, and the fields that no cache holds.

    The cache that was, or would be, filled for just this comes first. One that was begun is filled to its end, unless
    others hold everything.
    """
    own, positions = open_store(one.folder), splits.train.positions
    if (run := _trained_anew(one, one.folder)) is not None:
        raise DataError(
            f"{one.where}: {one.folder} holds answers of other weights than {run} has now, for that was trained anew "
            "since; delete the folder to fill it anew"
        )
    if own is not None:
        _check(one, own.meta, own.folder, positions)
        return [(own, one.fields)], ()
    if one.options.folder is not None:
        return [], one.fields
    others, parts, missing = [*_others(one, positions)], [], list(one.fields)
    while missing and others:
        best = max(others, key=lambda meta: (len({*missing} & {*meta[1].fields}), -meta[1].size()))
        fields = tuple(name for name in missing if name in best[1].fields)
        others.remove(best)
        if not fields:
            break
        if (store := _whole(best[0])) is not None:
            parts.append((store, fields))
            missing = [name for name in missing if name not in fields]
    if missing and read_meta(one.folder) is not None:
        return [], one.fields
    return parts, tuple(missing)


def _others(one: Wanted, positions: Tensor) -> Iterator[tuple[Path, Meta]]:
    """The caches beside its own that are of the same answers, complete or not, in the order of their names."""
    for path in sorted(one.folders.glob("*/meta.json")):
        folder = path.parent
        try:
            meta = read_meta(folder)
        except DataError:  # whose it was, nobody knows; the run that asks for it by its name is told
            continue
        if meta is None or not (one.has_own_weights or folder.name.rpartition("-")[0] == one.item):
            continue
        is_same = one.difference(meta) is None and _trained_anew(one, folder) is None
        if is_same and _held(one, meta, folder, positions) is not None:
            yield folder, meta


def _trained_anew(one: Wanted, folder: Path) -> Path | None:
    """The first of the runs that now has other weights than when a cache was filled, as far as that is known."""
    try:
        noted = json.loads((folder / WEIGHTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for run in one.runs if isinstance(noted, dict) else ():
        name = run.name if run.name in noted else _hash_in(run.name)
        before, now = noted.get(name, ""), ""
        if before:
            now = _weights_of(run) if name == run.name else _content_of(run)
        if now and before != now:
            return run
    return None


def _weights_of(run: Path) -> str:
    """The checksum of what a run has left; empty where it is not finished, or does not say."""
    try:
        return read_result(run).student
    except CheckpointError:
        return ""


def _hash_in(name: str) -> str:
    """The hash in the name of a run's folder."""
    return name.rpartition("-")[2]


def _content_of(run: Path) -> str:
    """A digest of the weights that a run has left, whatever its name; empty where it has left none."""
    try:
        return _content(run / STUDENT, (run / STUDENT).stat().st_mtime_ns)
    except (CheckpointError, OSError):
        return ""


@functools.lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> str:
    """Read once as long as the file has the same time: a run looks for its caches several times."""
    digest = hashlib.sha256()
    for name, value in sorted(read_weights(path).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _whole(folder: Path) -> Store | None:
    """The cache in a folder; None where it is not complete, or damaged, so that it is of no use to others."""
    try:
        return open_store(folder)
    except DataError:
        return None


def _check(one: Wanted, meta: Meta, folder: Path, positions: Tensor) -> None:
    """Raise `DataError` where a cache is of something else, or of fewer samples."""
    one.check(meta, folder)
    if _held(one, meta, folder, positions) is None:
        one.refuse("samples", meta, folder)


def _held(one: Wanted, meta: Meta, folder: Path, positions: Tensor) -> Tensor | None:
    """The sample of each row of a view; None where some that are wanted are not among them, or nobody knows."""
    if meta.parts.get("samples") == one.parts["samples"]:
        return positions if meta.samples == len(positions) else None
    try:
        held = torch.from_numpy(np.load(folder / INDEX, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError):
        return None
    if held.ndim != 1 or len(held) != meta.samples or digest_of(held.tolist()) != meta.parts.get("samples"):
        return None
    return held if torch.isin(positions, held).all() else None


def _joined(one: Wanted, parts: list[Part], splits: Splits) -> Stored:
    """What a run reads of its caches."""
    positions, size = splits.train.positions, splits.facts.size
    if len(parts) == 1:
        ((store, _),) = parts
        held = _held(one, store.meta, store.folder, positions)
        assert held is not None
        return Stored(store, one.fields, lookup(held, size))
    return Stored(Joined(one, parts, positions, size), one.fields, lookup(positions, size))
