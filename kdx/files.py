"""Writes files so that a kill at any moment leaves the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from kdx.errors import KdxError

FULL = {errno.ENOSPC: "no space is left on the device", errno.EDQUOT: "the quota of this user is used up",
        errno.EFBIG: "no file may grow so large here"}  # fmt: skip
"""The errors of a disk that takes no more, in words."""


def write_file(path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None) -> None:
    """Write a new file beside `path`, sync it, and rename it into place; what was there before becomes `keep`.

    Raises `KdxError` when the disk is full or not writable; `path` is as it was then. A kill leaves `path` or, for a
    moment between two renames, `keep` alone.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(fresh, path)
        sync_folder(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save ends in an error of its own
        if not isinstance(cause, OSError):
            raise
        raise KdxError(f"cannot write {path}: {reason_of(cause)}; the file is as it was before") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `write_file`."""
    write_file(path, lambda file: file.write(text.encode("utf-8")))


def remove_folder(folder: Path) -> None:
    """Take a folder away at once: a kill leaves it whole, or a hidden rest that the next call removes."""
    rest = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        if rest.exists():
            shutil.rmtree(rest)
        os.replace(folder, rest)
        sync_folder(folder.parent)
    if rest.exists():
        shutil.rmtree(rest)


def sync_folder(folder: Path) -> None:
    """Bring the names of the files in a folder onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def full_disk_is_said(folder: Path) -> Iterator[None]:
    """Within the block a disk that takes no more is a `KdxError` which says so, whoever was writing to it."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise KdxError(
            f"cannot write into {folder}: {reason_of(error)}; what was saved before is intact: make room, and start it "
            f"again to go on"
        ) from error


def reason_of(error: OSError) -> str:
    """Why a file could not be written."""
    return FULL.get(error.errno or 0, str(error.strerror or error))


def clear_once(folder: Path, command: str) -> None:
    """Take a folder and all in it away, but once for each `command`, however often its processes begin again."""
    mark = folder.parent / f".{folder.name}.fresh"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != command:
        remove_folder(folder)
        write_text(mark, command)
