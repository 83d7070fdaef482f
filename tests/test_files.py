"""Facts of `kdx/files.py`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from kdx.errors import KdxError
from kdx.files import write_file, write_text


def test_text_is_written_in_utf8_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert [item.name for item in path.parent.iterdir()] == ["b.txt"]


def test_new_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text in ("a long old text", "new"):
        write_text(path, text)
    assert path.read_text() == "new"


def test_the_file_is_exchanged_as_a_whole_and_never_written_into(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "seen_by_a_reader")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "seen_by_a_reader").read_text() == "old"


def fails_with_a_bug(file: BinaryIO) -> None:
    file.write(b"half")
    raise ZeroDivisionError


def test_an_error_of_the_writer_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a", fails_with_a_bug)
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("a", "old")]


def onto_a_full_device(file: BinaryIO) -> None:
    with open("/dev/full", "wb") as full:
        full.write(b"x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_message_and_leaves_the_old_content(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(KdxError, match=r"cannot write .*/a: no space is left on the device; the file is as it was"):
        write_file(tmp_path / "a", onto_a_full_device)
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("a", "old")]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def much(file: BinaryIO) -> None:
    file.write(b"x" * 200_000)


def much_by_torch(file: BinaryIO) -> None:
    torch.save({"x": torch.zeros(100_000)}, file)


@pytest.mark.parametrize("write", [much, much_by_torch])
def test_a_real_disk_that_is_full_is_a_message_too(tiny_disk: Path, write: Callable[[BinaryIO], object]) -> None:
    write_text(tiny_disk / "a", "old")
    with pytest.raises(KdxError, match="no space is left on the device"):
        write_file(tiny_disk / "a", write)
    assert [(item.name, item.read_text()) for item in tiny_disk.iterdir()] == [("a", "old")]


def test_a_place_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file, not a folder")
    with pytest.raises(KdxError, match=r"cannot write .*Not a directory|cannot write .*File exists"):
        write_text(tmp_path / "a" / "b", "text")
