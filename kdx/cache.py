"""The answers of a frozen teacher on disk: one memory-mapped file for each field, with a checksum for each block.

A cache is a folder:

    meta.json           what the answers are of (`parts`), and the form of the rows
    FIELD.bin           rows [views * samples, ...], those of view v from row v * samples on
    blocks.jsonl        one line for each finished block of rows: its number, and the CRC-32 of its part of each file

A line is written after the rows that it speaks of are on the disk, so a kill leaves a cache that can be filled further.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.cache_options import CacheOptions
from kdx.errors import DataError
from kdx.files import full_disk_is_said, write_text
from kdx.types import Shape

SCHEMA = 1
META, BLOCKS = "meta.json", "blocks.jsonl"
BLOCK = 512
"""Rows of a block, or a few more to make whole batches."""
REST = "rest"
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in
          (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.int32, torch.int64,
           torch.uint8, torch.bool)}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One tensor of a teacher as it is stored: `shape` of a sample, type on disk and type of the teacher's answer.

    With `top`, a sample's rows are the `top` highest logits, their classes, and the level of each other class.
    """

    shape: Shape
    stored: str
    given: str
    top: int | None = None

    def files(self, name: str) -> dict[str, tuple[Shape, torch.dtype]]:
        """The files of a field of this name, with the shape of a row and its type."""
        if self.top is None:
            return {name: (self.shape, _NAMES[self.stored])}
        places = torch.int16 if self.shape[0] <= np.iinfo(np.int16).max else torch.int32
        return {
            f"{name}.top": ((self.top,), _NAMES[self.stored]),
            f"{name}.class": ((self.top,), places),
            f"{name}.{REST}": ((), torch.float32),
        }

    def encode(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """Answers [B, ...] as rows of each file."""
        if self.top is None:
            return {name: values.to(_NAMES[self.stored])}
        kept, places = values.float().topk(self.top, dim=1)
        others = values.float().scatter(1, places, -torch.inf).logsumexp(1) - np.log(self.shape[0] - self.top)
        rows = {f"{name}.top": kept, f"{name}.class": places, f"{name}.{REST}": others}
        return {file: rows[file].to(dtype) for file, (_, dtype) in self.files(name).items()}

    def decode(self, name: str, rows: Mapping[str, Tensor]) -> Tensor:
        """Answers [B, ...] of rows of each file, in the type that the teacher gave."""
        given = _NAMES[self.given]
        if self.top is None:
            return rows[name].to(given)
        level = rows[f"{name}.{REST}"].to(given)[:, None].expand(-1, self.shape[0])
        return level.scatter(1, rows[f"{name}.class"].long(), rows[f"{name}.top"].to(given))


@dataclass(frozen=True)
class Meta:
    """What a cache is of. `parts` decide what its rows are; `samples` are the rows of one view, `block` those of a
    block.
    """

    parts: Mapping[str, Any]
    fields: Mapping[str, Field]
    samples: int
    views: int
    block: int = BLOCK

    @property
    def rows(self) -> int:
        return self.samples * self.views

    @property
    def blocks(self) -> int:
        return self.views * self.blocks_of_view

    @property
    def blocks_of_view(self) -> int:
        return -(-self.samples // self.block)

    @property
    def files(self) -> dict[str, tuple[Shape, torch.dtype]]:
        return {file: kind for name, field in self.fields.items() for file, kind in field.files(name).items()}

    def span(self, block: int) -> tuple[int, int]:
        """The rows of a block, which never reaches into another view."""
        view, place = divmod(block, self.blocks_of_view)
        first = view * self.samples + place * self.block
        return first, min(first + self.block, (view + 1) * self.samples)

    def places(self, block: int) -> range:
        """The places of a block's samples in its view."""
        first, last = self.span(block)
        start = first % self.samples
        return range(start, start + last - first)

    def size(self) -> int:
        """Bytes of all rows."""
        return self.rows * sum(row_bytes(shape, dtype) for shape, dtype in self.files.values())


def row_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of one sample's row."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


class Store:
    """A complete cache, open for reading; any number of processes may read it at once."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder = folder
        self.meta = meta
        self._rows = {
            file: torch.from_file(
                str(folder / f"{file}.bin"), shared=False, size=meta.rows * int(np.prod(shape)), dtype=dtype
            ).view(meta.rows, *shape)
            for file, (shape, dtype) in meta.files.items()
        }  # fmt: skip

    def rows(self, chosen: Tensor, files: tuple[str, ...]) -> dict[str, Tensor]:
        """The chosen rows (int64 [B], on the CPU) of each of the files."""
        return {file: self._rows[file].index_select(0, chosen) for file in files}

    def verify(self, files: Container[str] | None = None) -> None:
        """Raise `DataError` for the first block that is not what was written, in some of the files or in all."""
        for block, sums in _finished(self.folder, self.meta).items():
            first, last = self.meta.span(block)
            for file, found in sums.items():
                if files is not None and file not in files:
                    continue
                if _checksum(self._rows[file][first:last]) != found:
                    view, row = divmod(first, self.meta.samples)
                    raise DataError(
                        f"{self.folder / file}.bin is altered: the checksum of rows {row} to "
                        f"{row + last - first - 1} of view {view} is another; delete the folder to fill it anew"
                    )


class Writer:
    """Fills a cache, block by block, and goes on where an earlier process was stopped.

    Raises `DataError` where the folder holds a part of another cache.
    """

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        before = read_meta(folder)
        if before is None:
            write_text(folder / META, json.dumps(_to_json(meta), indent=2) + "\n")
        elif replace(before, block=meta.block) != meta:
            raise DataError(f"{folder} holds a part of another cache; delete it to fill it anew")
        self.meta = meta = before or meta
        self._files = {file: _sized(folder / f"{file}.bin", meta.rows * row_bytes(*kind))
                       for file, kind in meta.files.items()}  # fmt: skip
        self._done = _finished(folder, meta)
        self._new: list[str] = []
        _cut_torn_line(folder / BLOCKS)

    def missing(self, view: int) -> list[int]:
        """The blocks of a view that are not there yet."""
        first = view * self.meta.blocks_of_view
        return [block for block in range(first, first + self.meta.blocks_of_view) if block not in self._done]

    def write(self, block: int, values: Mapping[str, Tensor]) -> None:
        """Write the answers for all rows of a block, field -> [rows, ...]. They count once `sync` has been called."""
        encoded = (field.encode(name, values[name]) for name, field in self.meta.fields.items())
        self.copy(block, {file: rows for files in encoded for file, rows in files.items()})

    def copy(self, block: int, rows: Mapping[str, Tensor]) -> None:
        """Write all rows of a block as another cache holds them, file -> [rows, ...]."""
        first, last = self.meta.span(block)
        sums: dict[str, int] = {}
        for file, kind in self.meta.files.items():
            assert len(rows[file]) == last - first
            content = _bytes(rows[file].cpu())
            with full_disk_is_said(self.folder):
                _write_all(self._files[file], content, first * row_bytes(*kind))
            sums[file] = zlib.crc32(content)
        self._done[block] = sums
        self._new.append(json.dumps({"block": block, "crc": sums}) + "\n")

    def sync(self) -> None:
        """Bring all blocks so far onto the disk, and then the lines that say so."""
        if not self._new:
            return
        with full_disk_is_said(self.folder):
            for file in self._files.values():
                os.fsync(file)
            with (self.folder / BLOCKS).open("a", encoding="utf-8") as lines:
                lines.writelines(self._new)
                lines.flush()
                os.fsync(lines.fileno())
        self._new.clear()

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def read_meta(folder: Path) -> Meta | None:
    """What a folder is a cache of; None where there is no cache. Raises `DataError` for a damaged one."""
    try:
        text = (folder / META).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / META} cannot be read: {error}") from error
    try:
        found = json.loads(text)
        if found["schema"] != SCHEMA:
            raise DataError(f"{folder} is a cache of form {found['schema']!r}; this kdx reads form {SCHEMA}")
        fields = {str(name): _field(item) for name, item in found["fields"].items()}
        if not all(name.isidentifier() for name in fields):
            raise ValueError(f"no field is called {[*fields]}")
        samples, views, block = (int(found[key]) for key in ("samples", "views", "block"))
        if not fields or min(samples, views, block) < 1:
            raise ValueError("it has no rows")
        return Meta(dict(found["parts"]), fields, samples, views, block)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / META} is damaged: {error!r}; delete the folder to fill it anew") from error


def open_store(folder: Path, *, verify: bool = False) -> Store | None:
    """The cache in a folder if it is complete, else None. Raises `DataError` for one that is damaged."""
    meta = read_meta(folder)
    if meta is None or len(_finished(folder, meta)) < meta.blocks:
        return None
    for file, kind in meta.files.items():
        path, expected = folder / f"{file}.bin", meta.rows * row_bytes(*kind)
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise DataError(f"{path} has {found} bytes, expected {expected}; delete the folder to fill it anew")
    store = Store(folder, meta)
    if verify:
        store.verify()
    return store


def fields_of(
    answers: Mapping[str, Tensor], dtype: torch.dtype, top: int | None = None, name_of_logits: str = "logits"
) -> dict[str, Field]:
    """How answers of these shapes [B, ...] and types are stored. What is no float keeps its type."""
    fields: dict[str, Field] = {}
    for name, value in answers.items():
        given = str(value.dtype).removeprefix("torch.")
        stored = str(dtype).removeprefix("torch.") if value.is_floating_point() else given
        fields[name] = Field(tuple(value.shape[1:]), stored, given)
        if top is not None and name == name_of_logits and value.ndim == 2 and top < value.shape[1]:
            fields[name] = replace(fields[name], top=top)
    return fields


def _finished(folder: Path, meta: Meta) -> dict[int, dict[str, int]]:
    """Block -> checksum by file, for the blocks that are whole. A torn last line does not count."""
    try:
        lines = (folder / BLOCKS).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    found: dict[int, dict[str, int]] = {}
    try:
        for line in lines:
            one = json.loads(line)
            block, sums = int(one["block"]), {str(file): int(crc) for file, crc in one["crc"].items()}
            if not 0 <= block < meta.blocks or sums.keys() != meta.files.keys():
                raise ValueError(f"block {block} is not of this cache")
            found[block] = sums
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / BLOCKS} is damaged: {error}; delete the folder to fill it anew") from error
    return found


def _cut_torn_line(path: Path) -> None:
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _sized(path: Path, size: int) -> int:
    """A file of this size, open for writing."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if os.fstat(file).st_size != size:
        os.ftruncate(file, size)
    return file


def _write_all(file: int, content: memoryview, place: int) -> None:
    """Write all bytes at a place of a file: one call may write a part, where the disk becomes full or above 2 GiB."""
    while content:
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written


def _bytes(rows: Tensor) -> memoryview:
    return rows.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(rows: Tensor) -> int:
    return zlib.crc32(_bytes(rows))


def _to_json(meta: Meta) -> dict[str, Any]:
    fields = {name: asdict(field) for name, field in meta.fields.items()}
    numbers = {"samples": meta.samples, "views": meta.views, "block": meta.block}
    return {"schema": SCHEMA, "parts": meta.parts, "fields": fields, **numbers}


def _field(found: Mapping[str, Any]) -> Field:
    shape = tuple(int(extent) for extent in found["shape"])
    top = None if found["top"] is None else int(found["top"])
    if found["stored"] not in _NAMES or found["given"] not in _NAMES or min(shape, default=1) < 1:
        raise ValueError(f"no field is {found}")
    if top is not None and not (len(shape) == 1 and 1 <= top < shape[0]):
        raise ValueError(f"no {top} classes are kept of {shape}")
    return Field(shape, found["stored"], found["given"], top)


def changes(options: CacheOptions, *, alone: bool) -> list[Any] | None:
    """What a cache changes in the numbers of a run; None where they are those of the teacher itself.

    A teacher that answers from a cache `alone` is what the cache holds.
    """
    if options.folder is None:
        return None if options.exact else [options.dtype, options.top]
    meta = read_meta(options.folder)
    if meta is None:
        return ["absent"]
    forms = sorted((name, field.stored, field.given, field.top) for name, field in meta.fields.items())
    if alone:
        sums = sorted(_finished(options.folder, meta).items())
        return [forms, hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()]
    inexact = [form for form in forms if form[3] is not None or form[1] not in ("float32", "float64", form[2])]
    is_of_plain = options.one_view and meta.parts.get("augmentation") is None
    return [*inexact, *(["one_view"] if is_of_plain else [])] or None
