"""Writes files so that a kill at any moment leaves the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from kdx.errors import KdxError


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a new file beside `path`, sync it, and rename it into place.

    Raises `KdxError` when the disk is full or not writable; `path` is as it was then.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except Exception as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save ends in an error of its own
        if not isinstance(cause, OSError):
            raise
        reason = "no space is left on the device" if cause.errno == errno.ENOSPC else str(cause.strerror or cause)
        raise KdxError(f"cannot write {path}: {reason}; the file is as it was before") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `write_file`."""
    write_file(path, lambda file: file.write(text.encode("utf-8")))
